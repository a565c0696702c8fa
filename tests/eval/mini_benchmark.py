"""A data folder with two questions per benchmark, in the layout of the published bundle."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from llava.eval.compare.budget import Budget
from tests.paths import GOLDEN

IMAGES = GOLDEN / "images"
NAMES = ("img0_336x336.png", "img1_640x360.png")
SHORT = "\nAnswer the question using a single word or phrase."
TRUTH = ("Yes", "No")
NAMED = ("pope", "textvqa", "gqa", "vqav2", "mmbench", "mme", "refcoco", "sqa")


def suite_args(folder: Path, tokens: list[int], **options) -> SimpleNamespace:
    """What the command line of a suite on this benchmark says; the data lie below `folder`."""
    return SimpleNamespace(
        tokens=list(map(Budget, tokens)),
        data_dir=str(build(folder / "data")),
        out=str(folder / "out"),
        limit=None,
        overwrite=False,
        model_name="m",
        model_path="m",
        batch_size=2,
        reuse=True,
        conv_mode="vicuna_v1",
        **options,
    )


def build(folder: Path) -> Path:
    """Writes all benchmarks below `folder` and returns it."""
    (folder / "images").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(IMAGES / name, folder / "images" / name)
    _pope(folder)
    _textvqa(folder)
    _gqa(folder)
    _vqav2(folder)
    _mmbench(folder)
    _mme(folder)
    _refcoco(folder)
    _science_qa(folder)
    return folder


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or "coco_pope" in path.name
    text = "".join(json.dumps(r) + "\n" for r in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")


def _questions(ids, text=lambda number: f"Is thing {number} there?{SHORT}", category="default"):
    return [
        {"question_id": key, "image": name, "text": text(number), "category": category}
        for number, (key, name) in enumerate(zip(ids, NAMES, strict=True))
    ]


def _pope(folder):
    _write(folder / "pope/llava_pope_test.jsonl", _questions([1, 2], category="random"))
    labels = [
        {"question_id": 2 - n, "image": NAMES[n], "text": f"Is thing {n} there?", "label": label}
        for n, label in ((1, "no"), (0, "yes"))
    ]
    _write(folder / "pope/coco/coco_pope_random.json", labels)


def _textvqa(folder):
    text = lambda number: f"What says sign {number}?\nReference OCR token: {SHORT}"  # noqa: E731
    path = folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    _write(path, _questions(["a", "b"], text))
    data = [
        {"image_id": key, "question": f"What says sign {number}?", "answers": ["x"] * 10}
        for number, key in enumerate("ab")
    ]
    _write(folder / "textvqa/TextVQA_0.5.1_val.json", {"data": data})


def _gqa(folder):
    _write(folder / "gqa/llava_gqa_testdev_balanced.jsonl", _questions(["7", "8"]))
    question = {
        "question": "Is it?",
        "answer": "yes",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "obj"},
        "groups": {"global": None},
        "semantic": [{"operation": "select", "argument": "x"}],
    }
    _write(folder / "gqa/data/testdev_balanced_questions.json", {"7": question, "8": question})


def _vqav2(folder):
    _write(folder / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", _questions([1, 2]))
    answers = [{"answer": "yes"}] * 10
    annotations = [{"question_id": key, "answers": answers} for key in (1, 2)]
    _write(folder / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _mmbench(folder):
    columns = "index question hint A B C D answer category image source l2-category comment split"
    rows = [columns.split()]
    for number, name in enumerate(NAMES):
        picture = base64.b64encode((IMAGES / name).read_bytes()).decode()
        rows.append([str(number), "Which?", "", "red", "blue", "", "", "A", "c", picture])
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
    path = folder / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def _mme(folder):
    key = "existence/0001.png"
    questions = [
        {"question_id": key, "image": NAMES[0], "text": f"Is thing {number} there?{SHORT}"}
        for number in range(2)
    ]
    _write(folder / "MME/llava_mme.jsonl", questions)
    truth = folder / "MME/MME_Benchmark_release_version/existence/0001.txt"
    truth.parent.mkdir(parents=True)
    truth.write_text(
        "".join(
            f"Is thing {number} there? Please answer yes or no.\t{answer}\n"
            for number, answer in enumerate(TRUTH)
        )
    )


def _refcoco(folder):
    _write(folder / "refcoco/llava_refcoco_val.jsonl", _questions([1, 2]))
    boxes = [
        {"question_id": key, "bbox": [0, 0, 10, 10], "width": 336, "height": 336} for key in (1, 2)
    ]
    _write(folder / "refcoco/refcoco_val.jsonl", boxes)


def _science_qa(folder):
    value = "<image>\nWhich?\nA. red\nB. blue"
    talk = [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]
    questions = [
        {"id": str(number), "image": name, "conversations": talk}
        for number, name in enumerate(NAMES)
    ]
    _write(folder / "scienceqa/llava_test_CQM-A.json", questions)
    _write(folder / "scienceqa/pid_splits.json", {"test": ["0", "1"]})
    problem = {"choices": ["red", "blue"], "answer": 0}
    _write(folder / "scienceqa/problems.json", {"0": problem, "1": problem})
