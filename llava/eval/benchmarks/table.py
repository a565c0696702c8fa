"""The table of benchmarks: where the files lie, how questions are read and answers scored.

Paths are relative to a data folder: that of the published bundle (`playground/data/eval`) or one of
the playground's own, which have the same layout but one folder of images.
"""

from functools import partial

from llava.eval.benchmarks import gqa as eval_gqa
from llava.eval.benchmarks import judged_scores, local_scores, server_files
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks import mme as eval_mme
from llava.eval.benchmarks import pope as eval_pope
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import refcoco as eval_refcoco
from llava.eval.benchmarks import sqa as eval_science_qa
from llava.eval.benchmarks import textvqa as eval_textvqa
from llava.eval.benchmarks import viscot_questions as viscot
from llava.eval.benchmarks import vizwiz as eval_vizwiz
from llava.eval.benchmarks import vqav2 as eval_vqav2
from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.benchmarks.mmbench import mmbench_question, mmbench_questions, read_mmbench
from llava.eval.benchmarks.qbench import qbench_questions
from llava.eval.benchmarks.sqa import science_questions
from llava.eval.files.records import read_json_list


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
        eval_mmbench.CIRCULAR,
        local_scores.mmbench,
        eval_mmbench.report,
        read=read_mmbench,
        to_questions=partial(mmbench_questions, single_pred_prompt=True, lang=lang),
        together=mmbench_question,
        upload=server_files.MMBENCH,
        joint=local_scores.base_index,
    )


def _qbench(name: str, questions: str, lang: str, public: bool) -> Benchmark:
    return Benchmark(
        name,
        f"qbench/{questions}",
        "qbench/images_llvisionqa",
        "accuracy",
        local_scores.qbench if public else None,
        eval_qbench.report,
        read=read_json_list,
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
        joint=lambda line: line["question_id"],
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
        read=read_json_list,
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
