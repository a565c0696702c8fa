"""Answers files with their questions, pictures, masks and scores, and two of them side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from llava.eval.answering.questions import Question, questions_of
from llava.eval.benchmarks import all_benchmarks, data_files, find_benchmark
from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.browse.conditions import Condition
from llava.eval.files import box_counts
from llava.eval.files.answer_lines import is_failed, read_lines
from llava.eval.files.answer_places import around_answers
from llava.eval.files.matching import names_of, question_id
from llava.eval.files.records import Records, is_id
from llava.eval.files.side_files import SCORERS, scored_files


@dataclass
class Source:
    """The questions that answers belong to.

    images: folder below which their pictures lie
    asked:  the records of the question file
    """

    benchmark: Benchmark
    data_dir: str
    images: str
    asked: Records

    @cached_property
    def questions(self) -> dict[str, Question]:
        """The questions by what identifies them in an answers file, see `key_of`."""
        found = questions_of(self.asked, self.benchmark.to_questions, skip_bad=True)
        names = names_of([question.head for question in found])
        return {key_of(question.head, names): question for question in found}

    def question(self, line: dict) -> Question | None:
        """The question that a line answers."""
        return self.questions.get(key_of(line, self.names))

    @cached_property
    def names(self) -> list[str]:
        """Fields of a line that say which question it answers."""
        return names_of([question.head for question in self.questions.values()])


def key_of(record: dict, names) -> str:
    values = (record.get(name) for name in names)
    return json.dumps([str(v) if is_id(v) else v for v in values], sort_keys=True)


def find_source(
    path: str,
    benchmark: str | None = None,
    data_dir: str | None = None,
    question_file: str | None = None,
    image_folder: str | None = None,
) -> Source:
    """The questions of an answers file, from where it lies (`DATA_DIR/BENCHMARK/answers/...`, as
    the scripts write it) unless they are named.

    Raises ValueError when that does not say which benchmark it is, or a file or folder is missing.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no answers file {path}")
    if image_folder is not None and not os.path.isdir(os.path.expanduser(image_folder)):
        raise ValueError(f"there is no image folder {image_folder}")
    around = around_answers(path)
    if benchmark is not None:
        own = find_benchmark(benchmark)
    elif around is not None:
        own = _benchmark_of(path, *around)
    else:
        raise ValueError(
            f"{path} does not lie in a folder `answers` of an evaluation folder, which would say "
            "what was asked: name it with --benchmark"
        )
    folder = data_dir or (around[0] if around else None)
    has = folder is not None and os.path.exists(os.path.join(folder, own.questions))
    if not question_file and (data_dir or not has):
        folder, images = data_files.find(own, data_dir)
    else:
        folder = folder or "."
        images = own.image_folder(folder)
    images = os.path.expanduser(image_folder or images)
    asked = own.located(own.read(question_file or os.path.join(folder, own.questions)), images)
    return Source(own, folder, images, asked)


def _benchmark_of(path: str, folder: str, top: str, split: str) -> Benchmark:
    stem = os.path.splitext(os.path.basename(path))[0]
    fitting = [
        own
        for own in all_benchmarks().values()
        if own.questions.split("/")[0] == top
        and os.path.splitext(os.path.basename(own.questions))[0] == split
    ]
    labelled = [own for own in fitting if own.label and own.label in stem]
    found = labelled or [own for own in fitting if not own.label] or fitting
    if not found:
        raise ValueError(
            f"{path}: no benchmark of {top} asks the questions {split}: name it with --benchmark"
        )
    return found[0]


@dataclass
class Run:
    """An answers file. lines: those of the file that are answers, by number from 0."""

    path: str
    source: Source
    lines: dict[int, dict] = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    unit_of: Callable[[dict], object] = question_id

    @classmethod
    def read(cls, path: str, source: Source) -> Run:
        records = read_lines(path)
        lines = {n: line for n, line in enumerate(records) if not is_failed(line)}
        if not lines:
            raise ValueError(f"{path}: there are no answers in it")
        run = cls(path, source, lines)
        run.scores = run._scores(records)
        return run

    @property
    def name(self) -> str:
        """What tells the file from others: the end of its path."""
        around = around_answers(self.path)
        parts = os.path.abspath(self.path).split(os.sep)
        return os.sep.join(parts[-3:] if around else parts[-1:])

    def _scores(self, records: Records) -> dict:
        """Score from 0 to 1 by `unit_of` a line: those in the lines, of a judge's file beside
        them, or of the benchmark's own scorer; nothing where there are none."""
        own = _scores_in(self.lines.values())
        if own:
            return own
        scored = [file for name in SCORERS for file in scored_files(self.path, name)]
        if scored:
            return self._scores_beside(scored[0])
        benchmark = self.source.benchmark
        if benchmark.units is None or not benchmark.scorable(self.source.data_dir):
            return {}
        try:
            asked = self._asked(records)
            units = benchmark.units(self.source.data_dir, asked, benchmark.counted(records))
        except ValueError as error:  # such as a question that is not there
            print(f"note: {self.path} is shown without scores: {error}", file=sys.stderr)
            return {}
        self.unit_of = benchmark.unit_of
        return {unit.key: unit.value for unit in units.found}

    def _scores_beside(self, path: str) -> dict:
        """Those of a file with scored lines, of answers that still are what was scored."""
        given = {question_id(line): line.get("text") for line in self.lines.values()}
        scored = read_lines(path)
        fitting = [line for line in scored if given.get(question_id(line)) == line.get("text")]
        if len(fitting) < len(scored):
            print(
                f"note: {path} scores {len(scored) - len(fitting)} answers that are others in "
                f"{self.path}: those are shown without scores",
                file=sys.stderr,
            )
        return _scores_in(fitting)

    def _asked(self, records: Records) -> Records:
        """The records of the question file, those alone that were answered."""
        ids = {question_id(line) for line in records if "question_id" in line}
        asked = self.source.asked
        kept = [r for r in asked if "question_id" not in r or question_id(r) in ids]
        return Records(asked.path, kept)

    def score(self, number: int) -> float | None:
        line = self.lines[number]
        if "question_id" not in line:
            return None
        return self.scores.get(self.unit_of(line))

    def iou(self, number: int) -> float | None:
        """With the boxes of the question."""
        found = box_counts.of(self.lines[number])
        return None if found is None else found[box_counts.IOU]

    def ratio(self, number: int) -> float | None:
        """Share of the visual tokens that was left in the last layer."""
        return box_counts.kept_share(self.lines[number])


def _scores_in(lines) -> dict:
    known = (line for line in lines if type(line.get("score")) in (int, float))
    return {question_id(line): float(line["score"]) for line in known}


@dataclass
class Pair:
    """Two answers files to the same questions, or one (`other` is None)."""

    run: Run
    other: Run | None = None

    def __post_init__(self):
        if self.other is None:
            self.places = {number: None for number in self.run.lines}
            return
        names = self.run.source.names
        theirs = {key_of(line, names): n for n, line in self.other.lines.items()}
        keys = {number: key_of(line, names) for number, line in self.run.lines.items()}
        self.places = {n: theirs[key] for n, key in keys.items() if key in theirs}
        if not self.places:
            raise ValueError(
                f"{self.run.path} and {self.other.path} have no question in common: choose answers "
                "to one benchmark"
            )

    def numbers(self, place: int) -> dict[str, float | None]:
        """What conditions speak of, for the line `place` of the first file."""
        found = {
            "gen": self.run.score(place),
            "iou": self.run.iou(place),
            "ratio": self.run.ratio(place),
        }
        there = self.places[place]
        if self.other is not None and there is not None:
            found |= {
                "ref": self.other.score(there),
                "ref_iou": self.other.iou(there),
                "ref_ratio": self.other.ratio(there),
            }
        return found

    def chosen(self, condition: Condition) -> list[int]:
        """Lines of the first file whose numbers fulfil a condition, in order."""
        return [place for place in self.places if condition(self.numbers(place))]
