"""The table of benchmarks: where the files lie, how questions are read and answers scored.

Paths are relative to a data folder: that of the published bundle (`playground/data/eval`) or one of
the playground's own, which have the same layout but one folder of images.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llava.eval import (
    eval_gqa,
    eval_mmbench,
    eval_mme,
    eval_pope,
    eval_qbench,
    eval_refcoco,
    eval_science_qa,
    eval_textvqa,
    eval_vizwiz,
    eval_vqav2,
    judged_scores,
    local_scores,
    server_files,
    viscot,
)
from llava.eval.eval_qbench import qbench_questions
from llava.eval.judged_scores import Judged
from llava.eval.server_files import Upload
from llava.eval.tasks import (
    Question,
    jsonl_questions,
    mmbench_questions,
    read_json_list,
    read_jsonl,
    read_table,
    science_questions,
    subset,
)

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
    judge: Judged | None = None
    upload: Upload | None = None
    server_if: str | None = None

    def load_questions(self, path: str, limit: int | None = None) -> list[Question]:
        """Returns the questions of a file, or about `limit` of them."""
        records = subset(self.read(path), limit)
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
        """Raises ValueError unless `answers` are those to all questions of the file, in order."""
        asked = [question.head for question in self.load_questions(path, limit)]
        given = [{key: a.get(key) for key in h} for a, h in zip(answers, asked, strict=False)]
        if given != asked or len(answers) != len(asked):
            raise ValueError(
                f"the answers do not belong to all {len(asked)} questions of {path}: "
                f"there are {len(answers)}, "
                f"{sum(g == a for g, a in zip(given, asked, strict=False))} of them in place"
            )

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


def _refcoco(dataset: str, split: str) -> Benchmark:
    name = dataset if split == "val" else f"{dataset}_{split}"
    return Benchmark(
        name,
        f"refcoco/llava_{dataset}_{split}.jsonl",
        "refcoco/images",
        "accuracy at IoU 0.5",
        local_scores.refcoco,
        eval_refcoco.report,
        (f"refcoco/{dataset}_{split}.jsonl",),
    )


def _mmbench(name: str, table: str, lang: str) -> Benchmark:
    return Benchmark(
        name,
        table,
        None,
        "accuracy",
        local_scores.mmbench,
        eval_mmbench.report,
        read=read_table,
        to_questions=partial(mmbench_questions, single_pred_prompt=True, lang=lang),
        upload=server_files.MMBENCH,
    )


def _qbench(name: str, questions: str, lang: str, public: bool) -> Benchmark:
    return Benchmark(
        name,
        f"qbench/{questions}",
        "qbench/images_llvisionqa",
        "accuracy",
        local_scores.qbench if public else None,
        eval_qbench.report,
        read=partial(read_json_list, fields=eval_qbench.FIELDS),
        to_questions=partial(qbench_questions, lang=lang),
    )


def _viscot(name: str, brief: bool) -> Benchmark:
    return Benchmark(
        f"viscot_{name}_brief" if brief else f"viscot_{name}",
        f"viscot/benchmark/{name}.json",
        "viscot",
        "judge's score",
        read=viscot.read,
        to_questions=partial(viscot.viscot_questions, brief=brief),
        judge=judged_scores.VISCOT,
    )


_TABLE = (
    Benchmark(
        "pope",
        "pope/llava_pope_test.jsonl",
        "pope/val2014",
        "F1",
        local_scores.pope,
        eval_pope.report,
        ("pope/coco",),
    ),
    Benchmark(
        "textvqa",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/train_images",
        "accuracy",
        local_scores.textvqa,
        eval_textvqa.report,
        ("textvqa/TextVQA_0.5.1_val.json",),
    ),
    Benchmark(
        "gqa",
        "gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/data/images",
        "accuracy",
        local_scores.gqa,
        eval_gqa.report,
        ("gqa/data/testdev_balanced_questions.json",),
    ),
    Benchmark(
        "vqav2",
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/test2015",
        "accuracy",
        local_scores.vqav2,
        eval_vqav2.report,
        ("vqav2/v2_mscoco_val2014_annotations.json",),
        upload=server_files.VQAV2,
        server_if=server_files.VQAV2_TEST,
    ),
    Benchmark(
        "vqav2_val",
        "vqav2/llava_vqav2_mscoco_val2014.jsonl",
        "vqav2/val2014",
        "accuracy",
        local_scores.vqav2,
        eval_vqav2.report,
        ("vqav2/v2_mscoco_val2014_annotations.json",),
    ),
    Benchmark(
        "vizwiz",
        "vizwiz/llava_test.jsonl",
        "vizwiz/test",
        "accuracy",
        upload=server_files.VIZWIZ,
    ),
    Benchmark(
        "vizwiz_val",
        "vizwiz/llava_val.jsonl",
        "vizwiz/val",
        "accuracy",
        local_scores.vizwiz,
        eval_vizwiz.report,
        ("vizwiz/val.json",),
    ),
    _mmbench("mmbench", "mmbench/mmbench_dev_20230712.tsv", "en"),
    _mmbench("mmbench_cn", "mmbench_cn/mmbench_dev_cn_20231003.tsv", "cn"),
    Benchmark(
        "mme",
        "MME/llava_mme.jsonl",
        "MME/MME_Benchmark_release_version",
        "perception",
        local_scores.mme,
        eval_mme.report,
        ("MME/MME_Benchmark_release_version",),
    ),
    Benchmark(
        "seed",
        "seed_bench/llava-seed-bench.jsonl",
        "seed_bench",
        "accuracy",
        local_scores.seed,
        local_scores.seed_report,
        ("seed_bench/SEED-Bench.json",),
        upload=server_files.SEED,
    ),
    Benchmark(
        "sqa",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/images/test",
        "accuracy on images",
        local_scores.science_qa,
        eval_science_qa.report,
        ("scienceqa/problems.json", "scienceqa/pid_splits.json"),
        read=partial(read_json_list, fields=("id", "conversations")),
        to_questions=partial(science_questions, single_pred_prompt=True),
    ),
    _qbench("qbench", "llvisionqa_dev.json", "en", public=True),
    _qbench("qbench_test", "llvisionqa_test.json", "en", public=False),
    _qbench("qbench_zh", "质衡-问答-验证集.json", "zh", public=True),
    _qbench("qbench_zh_test", "质衡-问答-测试集.json", "zh", public=False),
    *(
        _refcoco(name, split)
        for name in ("refcoco", "refcoco+")
        for split in ("val", "testA", "testB")
    ),
    *(_refcoco("refcocog", split) for split in ("val", "test")),
    Benchmark(
        "llavabench",
        "llava-bench-in-the-wild/questions.jsonl",
        "llava-bench-in-the-wild/images",
        "relative to GPT-4",
        truth=(
            "llava-bench-in-the-wild/context.jsonl",
            "llava-bench-in-the-wild/answers_gpt4.jsonl",
        ),
        judge=judged_scores.LLAVA_BENCH,
    ),
    Benchmark(
        "mmvet",
        "mm-vet/llava-mm-vet.jsonl",
        "mm-vet/images",
        "judge's grade",
        truth=("mm-vet/mm-vet.json",),
        judge=judged_scores.MMVET,
        upload=server_files.MMVET,
    ),
    *(_viscot(name, brief) for name in viscot.SETS for brief in (False, True)),
)

ALL = {benchmark.name: benchmark for benchmark in _TABLE}
#: those with a scorer of their own; the others need a judge or a server
BENCHMARKS = {name: benchmark for name, benchmark in ALL.items() if benchmark.evaluate}


def find_benchmark(name: str) -> Benchmark:
    """Returns a benchmark by name; the split it has without one may be said (`refcoco_val`).

    Raises ValueError listing the names.
    """
    short = name.removesuffix("_val").removesuffix("_dev")
    if found := ALL.get(name) or ALL.get(short):
        return found
    raise ValueError(f"unknown benchmark {name!r}, choose from {', '.join(ALL)}")
