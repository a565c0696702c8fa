"""Where the data of the benchmarks comes from; finds it, or says what is missing.

python -m llava.eval.benchmarks.data_files pope [--data-dir DIR]

Prints shell assignments for the scripts: SOURCE (data folder), QUESTIONS and IMAGES. With
--data-dir, everything must be there. Without it, a benchmark that `playground/data/eval` does not
hold is replaced by the playground's questions of that kind, which is said.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from llava.errors import errors_as_messages
from llava.eval.benchmarks.table import ALL, Benchmark, find_benchmark

DEFAULT_DIR = "playground/data/eval"
#: played with when there is no real data: a benchmark, and samples of the other formats
PLAYGROUND_DIRS = ("playground/benchmark", "playground/samples")

#: names with an underscore that are no split of another benchmark
OWN_SCRIPTS = tuple(name for name in ALL if "_" not in name) + ("mmbench_cn",)

BUNDLE = (
    "the evaluation bundle of LLaVA (eval.zip, linked in docs/Evaluation.md of "
    "https://github.com/haotian-liu/LLaVA), unpacked into the data folder"
)
COCO = "http://images.cocodataset.org/zips"
SEED = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa"
LLAVA_BENCH = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
MMVET = "https://github.com/yuweihao/MM-Vet/releases (mm-vet.zip)"
QBENCH = "https://github.com/Q-Future/Q-Bench (LLVisionQA)"
VISCOT = "https://huggingface.co/datasets/deepcs233/Visual-CoT"
REFCOCO = (
    "https://github.com/lichengunc/refer, then python scripts/convert_refcoco_to_llava.py --help"
)

#: file or folder, or the beginning of several -> where to get it; the longest match counts
SOURCES = {
    "vqav2/llava_": BUNDLE,
    "vqav2/llava_vqav2_mscoco_val2014": (
        "python scripts/convert_vqav2_to_llava.py, out of the official questions"
    ),
    "vqav2/test2015": f"{COCO}/test2015.zip",
    "vqav2/val2014": f"{COCO}/val2014.zip",
    "vqav2/v2_mscoco_val2014": "https://visualqa.org/download.html (annotations 2017 v2.0)",
    "gqa/llava_": BUNDLE,
    "gqa/data": "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions, images)",
    "vizwiz/llava_test": BUNDLE,
    "vizwiz/llava_val": "python scripts/convert_vizwiz_to_llava.py, out of vizwiz/val.json",
    "vizwiz/": VIZWIZ,
    "scienceqa/llava_": BUNDLE,
    "scienceqa/": "https://github.com/lupantech/ScienceQA (data/scienceqa and the test images)",
    "textvqa/llava_": BUNDLE,
    "textvqa/TextVQA": "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
    "textvqa/train_images": ("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    "pope/llava_": BUNDLE,
    "pope/coco": "https://github.com/AoiDragon/POPE (output/coco)",
    "pope/val2014": f"{COCO}/val2014.zip",
    "MME/llava_": BUNDLE,
    "MME/": (
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation "
        "(the authors send the images)"
    ),
    "mmbench/": (
        "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
    ),
    "mmbench_cn/": (
        "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
        "mmbench_dev_cn_20231003.tsv"
    ),
    "seed_bench/llava": BUNDLE,
    "seed_bench": f"{SEED} (images; middle frames of the videos)",
    "seed_bench/SEED-Bench.json": SEED,
    "llava-bench-in-the-wild/": LLAVA_BENCH,
    "mm-vet/llava": BUNDLE,
    "mm-vet/": MMVET,
    "qbench/": QBENCH,
    "refcoco/llava": REFCOCO,
    "refcoco/refcoco": REFCOCO,
    "refcoco/images": f"{COCO}/train2014.zip",
    "viscot": f"{VISCOT} (folder cot)",
    "viscot/benchmark": f"{VISCOT} (folder benchmark of its code)",
}


def source_of(name: str) -> str:
    """Where a file or folder of a data folder comes from."""
    return SOURCES[max((start for start in SOURCES if name.startswith(start)), key=len)]


def needed(benchmark: Benchmark, data_dir: str) -> list[str]:
    """Returns the files and folders a run needs below the data folder, questions first."""
    names = [benchmark.questions]
    if benchmark.images and not os.path.isdir(os.path.join(data_dir, "images")):
        names.append(benchmark.images)
    return names if benchmark.server_scored(data_dir) else [*names, *benchmark.truth]


def check(benchmark: Benchmark, data_dir: str) -> None:
    """Raises FileNotFoundError that names everything that is missing, and where to get it."""
    names = needed(benchmark, data_dir)
    missing = [name for name in names if not os.path.exists(os.path.join(data_dir, name))]
    if missing:
        lines = [f"  {os.path.join(data_dir, n)}\n    from {source_of(n)}" for n in missing]
        raise FileNotFoundError(
            f"{benchmark.name} lacks:\n" + "\n".join(lines) + "\nAll folders: playground/data/"
            "eval/README.md. Without DATA_DIR, the playground's questions are asked."
        )


def find(benchmark: Benchmark, data_dir: str | None = None) -> tuple[str, str]:
    """Returns (data folder, image folder) for a run.

    data_dir: None looks in `playground/data/eval`, then among the playground's own. Raises
    FileNotFoundError when something is missing.
    """
    if data_dir or os.path.exists(os.path.join(DEFAULT_DIR, benchmark.questions)):
        folder = data_dir or DEFAULT_DIR
        check(benchmark, folder)
        return folder, benchmark.image_folder(folder)
    for folder in PLAYGROUND_DIRS:
        if os.path.exists(os.path.join(folder, benchmark.questions)):
            images = os.path.join(PLAYGROUND_DIRS[0], "images")
            print(
                f"{DEFAULT_DIR}/{benchmark.questions} is not there: using the playground's "
                f"questions ({Path(folder, benchmark.questions)})",
                file=sys.stderr,
            )
            return folder, images
    check(benchmark, DEFAULT_DIR)
    raise AssertionError("unreachable: the check has failed")


def present(data_dir: str | None = None) -> list[str]:
    """Names of the benchmarks with questions in a data folder, or in those `find` looks in."""
    folders = [data_dir] if data_dir else [DEFAULT_DIR, *PLAYGROUND_DIRS]
    if not data_dir and any(_has(DEFAULT_DIR, b) for b in ALL.values()):
        folders = [DEFAULT_DIR]
    names = [name for name, b in ALL.items() if any(_has(folder, b) for folder in folders)]
    return [name for name in names if not name.endswith("_brief")]  # the same in other words


def scripts(names: list[str]) -> list[str]:
    """Returns `SCRIPT SPLIT` for every benchmark, as scripts/v1_5/eval/SCRIPT.sh runs it."""
    found = []
    for name in names:
        script, split = (name, "") if name in OWN_SCRIPTS else name.split("_", 1)
        script = "viscot" if name.startswith("viscot_") else script.replace("+", "plus")
        found.append(script if script == "viscot" else f"{script} {split}".strip())
    return list(dict.fromkeys(found))


def _has(folder: str, benchmark: Benchmark) -> bool:
    return os.path.exists(os.path.join(folder, benchmark.questions))


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", help="its name, or list: what there is data for")
    parser.add_argument("--data-dir", help=f"default: {DEFAULT_DIR}, else the playground's")
    parser.add_argument("--scripts", action="store_true", help="with list: as scripts and splits")
    parser.add_argument("--sets", help="with list: the parts of this benchmark only")
    args = parser.parse_args()
    if args.benchmark == "list":
        names = present(args.data_dir)
        if args.sets:
            names = [n.removeprefix(f"{args.sets}_") for n in names if n.startswith(args.sets)]
        print(*(scripts(names) if args.scripts else names), sep="\n")
        return
    benchmark = find_benchmark(args.benchmark)
    folder, images = find(benchmark, args.data_dir)
    for name, value in (
        ("SOURCE", folder),
        ("QUESTIONS", os.path.join(folder, benchmark.questions)),
        ("IMAGES", images),
    ):
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
