"""One benchmark: its files, how its questions are read, and who scores the answers."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llava.eval.judged_scores import Judged
from llava.eval.matching import check_asked
from llava.eval.server_files import Upload
from llava.eval.tasks import Question, jsonl_questions, read_jsonl, subset

JSONL_FIELDS = ("question_id", "text")
SHARED_IMAGES = "images"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    questions: question file, relative to the data folder
    images:    image folder in the published layout; None where images are inside the questions
    metric:    what `score` is
    evaluate:  (data folder, question file, answers) -> dict with `score`, `count` and details;
               `percent` where `score` is not one; None: the right answers are not public
    report:    that dict -> the text the reference scorer prints
    truth:     files with the right answers, besides the questions
    read, to_questions: reader of the question file, and of one record
    together:  record -> what it shares with those it must not be parted from by a limit
    judge:     how a judge scores the answers, where that is the metric
    upload:    file that a server scores
    server_if: with this file in the data folder the questions are those of the hidden split
    """

    name: str
    questions: str
    images: str | None
    metric: str
    evaluate: Callable[[str, str, list[dict]], dict] | None = None
    report: Callable[[dict], str] | None = None
    truth: tuple[str, ...] = ()
    read: Callable[[str], list[dict]] = partial(read_jsonl, fields=JSONL_FIELDS)
    to_questions: Callable = jsonl_questions
    together: Callable[[dict], object] | None = None
    judge: Judged | None = None
    upload: Upload | None = None
    server_if: str | None = None

    def load_questions(self, path: str, limit: int | None = None) -> list[Question]:
        """Returns the questions of a file, or about `limit` of them."""
        records = subset(self.read(path), limit, self.together)
        return [question for record in records for question in self.to_questions(record)]

    def image_folder(self, data_dir: str) -> str:
        """Returns the folder all benchmarks share, where there is one, else the published one."""
        shared = os.path.join(data_dir, SHARED_IMAGES)
        return shared if os.path.isdir(shared) else os.path.join(data_dir, self.images or "")

    def scorable(self, data_dir: str) -> bool:
        """True when the right answers to the questions in the data folder are there."""
        if self.evaluate is None or self.server_scored(data_dir):
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
        hidden = self.evaluate is None or self.server_if is not None
        return hidden and self.judge is None and self.has_upload(data_dir)

    def check_complete(self, path: str, answers: list[dict], limit: int | None) -> None:
        """Raises ValueError unless `answers` are those to all questions of the file."""
        asked = [question.head for question in self.load_questions(path, limit)]
        check_asked(asked, answers, path)

    def score(self, data_dir: str, path: str, answers: list[dict], limit: int | None) -> dict:
        """Returns the scores of a complete set of answers to the questions of file `path`."""
        if not self.scorable(data_dir):
            names = ", ".join(os.path.join(data_dir, name) for name in self.truth) or "none exist"
            raise ValueError(f"{self.name}: right answers are needed to score here ({names})")
        self.check_complete(path, answers, limit)
        return self.labelled(self.evaluate(data_dir, path, answers))

    def labelled(self, result: dict) -> dict:
        """Returns a result with the benchmark's name, its metric and the score in percent."""
        return {"benchmark": self.name, "metric": self.metric, "percent": result["score"]} | result
