"""One benchmark: its files, how its questions are read, and who scores the answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llava.errors import broken_files_named
from llava.eval.answering.questions import Question, jsonl_questions, questions_of, subset
from llava.eval.files.answer_lines import answers_among, is_failed
from llava.eval.files.matching import check_asked, question_id, source
from llava.eval.files.records import Records, read_jsonl
from llava.eval.scoring.units import Units, accuracy_report

if TYPE_CHECKING:
    from llava.eval.scoring.judge import Judge

SHARED_IMAGES = "images"
BUNDLE = (
    "the evaluation bundle of LLaVA (eval.zip, linked in docs/Evaluation.md of "
    "https://github.com/haotian-liu/LLaVA), unpacked into the data folder"
)
COCO = "http://images.cocodataset.org/zips"


@dataclass(frozen=True)
class Upload:
    """A file for a server.

    ending: of its name
    write:  (data folder, records of the question file, answers, path of the upload)
    server: where it goes, and what is known of that server
    folder: in place of `answers` in the path of the answers file
    """

    ending: str
    write: Callable[[str, Records, list[dict], str], None]
    server: str
    folder: str = "answers_upload"


@dataclass(frozen=True)
class JudgedRun:
    """A complete set of answers and what its judge may need besides.

    asked:   the records of the question file
    answers: with the path of their file
    output:  file of verdicts to write; what an earlier run was told comes from the judge's cache
    wording: file with the benchmark's own instruction to the judge; None: ours
    """

    data_dir: str
    asked: Records
    answers: Records
    output: str
    wording: str | None = None


@dataclass(frozen=True)
class Judged:
    """How a judge scores a benchmark.

    model, max_tokens, temperature: of the published verdicts
    wording: file in the data folder with the benchmark's own instruction, if the user put it there
    score: (judge, run) -> what the score is made of
    report: those units -> text
    """

    model: str
    max_tokens: int
    temperature: float
    wording: str | None
    score: Callable[[Judge, JudgedRun], Units]
    report: Callable[[Units], str]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. Paths are relative to a data folder: that of the published bundle
    (`playground/data/eval`), or one of the playground's, with the same layout and one image folder.

    questions: question file
    images:    image folder; None where images are inside the questions
    metric:    what `score` is
    sources:   file or folder, or the beginning of several -> where to get it
    units:     (data folder, records of the question file, answers) -> what the score is made of; a
               unit that names no image gets that of the question whose id is its key. None: the
               right answers are not public
    report:    those units -> the text that the reference scorer prints
    truth:     files with the right answers, besides the questions
    read, to_questions: reader of the question file, and of one record
    program:   module of `llava.eval` that asks the questions, and its options
    label:     ending of answers files, where another benchmark asks the same questions differently
    judge:     how a judge scores the answers, where that is the metric
    upload:    file that a server scores
    server_if: with this file in the data folder the questions are those of the hidden split
    together:  record -> what it shares with those it must not be parted from by a limit
    joint:     line of an answers file -> what it shares with those it is scored together with;
               None: every question is scored alone
    unit_of:   line of an answers file -> key of the unit that it is scored in
    hidden_images: what names of images begin with if the questions are those of the hidden split
    located:   (records of the question file, image folder) -> the records, their images named as
               they lie there
    """

    name: str
    questions: str
    images: str | None
    metric: str
    sources: dict[str, str] = field(hash=False)
    units: Callable[[str, Records, list[dict]], Units] | None = None
    report: Callable[[Units], str] = accuracy_report
    truth: tuple[str, ...] = ()
    read: Callable[[str], Records] = read_jsonl
    to_questions: Callable = jsonl_questions
    program: tuple[str, ...] = ("model_vqa_loader",)
    label: str = ""
    judge: Judged | None = None
    upload: Upload | None = None
    server_if: str | None = None
    together: Callable[[dict], object] | None = None
    joint: Callable[[dict], object] | None = None
    unit_of: Callable[[dict], object] = question_id
    hidden_images: str | None = None
    located: Callable[[Records, str], Records] = lambda records, folder: records

    def select(
        self, asked: Records, limit: int | None = None, skip_bad: bool = False
    ) -> list[Question]:
        """Returns the questions in the records of the question file, or about `limit` of them; see
        `questions_of`."""
        return questions_of(subset(asked, limit, self.together), self.to_questions, skip_bad)

    def image_folder(self, data_dir: str) -> str:
        """Returns the folder all benchmarks share, where there is one, else the published one."""
        shared = os.path.join(data_dir, SHARED_IMAGES)
        return shared if os.path.isdir(shared) else os.path.join(data_dir, self.images or "")

    def source_of(self, name: str) -> str:
        """Where a file or folder of the data folder comes from."""
        known = [start for start in self.sources if name.startswith(start)]
        return self.sources[max(known, key=len)] if known else "the authors of the benchmark"

    def scorable(self, data_dir: str) -> bool:
        """True when the right answers to the questions in the data folder are there."""
        if self.units is None or self.server_scored(data_dir):
            return False
        return all(os.path.exists(os.path.join(data_dir, name)) for name in self.truth)

    def has_upload(self, data_dir: str) -> bool:
        """True when a server takes answers to the questions in the data folder."""
        needed = self.server_if
        return bool(self.upload) and (
            needed is None or os.path.exists(os.path.join(data_dir, needed))
        )

    def server_scored(self, data_dir: str) -> bool:
        """True when only a server knows the right answers to the questions in the data folder."""
        hidden = self.units is None or self.server_if is not None
        return hidden and self.judge is None and self.has_upload(data_dir)

    def asks_hidden(self, question: Question) -> bool:
        """True when a question is one of the hidden split, which only a server can score."""
        begins = self.hidden_images
        return begins is not None and any(i.startswith(begins) for i in question.images)

    def check_complete(
        self, asked: Records, records: list[dict], limit: int | None
    ) -> list[Question]:
        """Returns the questions that were asked; ValueError unless `records` are those to all of
        them: answers, or records of questions that failed."""
        questions = self.select(asked, limit, skip_bad=True)
        check_asked([question.head for question in questions], records, asked.path)
        return questions

    def score(
        self, data_dir: str, asked: Records, records: list[dict], limit: int | None = None
    ) -> Units:
        """Returns the units of a complete set of answers.

        asked:   the records of the question file
        records: lines of an answers file

        Questions that failed do not count, nor do those that are scored jointly with one of them;
        the result says how many there are (`failed`, `left_out`). Raises ValueError when nothing
        is left, and names the files when those with the right answers cannot be read.
        """
        truth = [os.path.join(data_dir, name) for name in self.truth]
        if not self.scorable(data_dir):
            names = ", ".join(truth) or "none exist"
            raise ValueError(f"{self.name}: right answers are needed to score here ({names})")
        questions = self.check_complete(asked, records, limit)
        counted = self.counted(records)
        with broken_files_named((asked.path, *truth), source(counted)):
            found = self.units(data_dir, asked, counted).about(questions)
        details = self.head() | found.details | self.failures(records, counted)
        return replace(found, name=self.name, details=details)

    def head(self) -> dict:
        """What every result starts with; some say another metric, or another scale."""
        return {"benchmark": self.name, "metric": self.metric}

    def counted(self, records: list[dict]) -> list[dict]:
        """The answers among the records of an answers file that a score can be made of."""
        answers = answers_among(records)
        if len(answers) == len(records):
            return answers
        broken = {self.joint(r) for r in records if is_failed(r)} if self.joint else ()
        counted = (a for a in answers if not self.joint or self.joint(a) not in broken)
        counted = Records(answers.path, counted)
        if not counted:
            raise ValueError(
                f"{self.name}: no question is left to score, because all were failed or are scored "
                f"jointly with one that failed ({len(records) - len(answers)} of {len(records)})"
            )
        return counted

    @staticmethod
    def failures(records: list[dict], counted: list[dict]) -> dict:
        """What a result says of questions that failed, and of those left out for their sake."""
        failed = [record for record in records if is_failed(record)]
        if not failed:
            return {"failed": 0}
        left_out = len(records) - len(failed) - len(counted)
        return {
            "failed": len(failed),
            "left_out": left_out,
            "failed_questions": [[r["question_id"], r["error"]] for r in failed],
        }
