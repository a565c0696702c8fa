"""Write the playground's benchmark, or pictures and conversations to train on.

    python -m playground.make_data benchmark                     # playground/benchmark
    python -m playground.make_data train --pictures 4000         # playground/data/train

The benchmark's files have the names, layout and fields of the real ones, and ask about held-out
scenes only.
"""

import argparse
import base64
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from llava.progress import progress
from playground import questions, scenes
from playground.questions import Question

ROOT = Path(__file__).parent
PICTURES = 240
PER_TASK = 300
TABLE_PICTURES = 100  # MMBench repeats a picture in every row, so it asks about fewer
YES_NO = " Please answer yes or no."


def picture_name(index: int) -> str:
    """File name of a benchmark picture."""
    return f"scene_{index:04d}.webp"


def held_out(index: int) -> scenes.Scene:
    """The scene of a benchmark picture."""
    return scenes.make_scene(scenes.HELD_OUT_SEEDS + index)


def write_pictures(folder: Path, count: int = PICTURES) -> None:
    """All benchmark pictures as WebP."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = Image.fromarray(scenes.render(held_out(index)))
        image.save(folder / picture_name(index), quality=82, method=6)


def spread(task: Callable, name: str, count: int, pictures: int = PICTURES) -> list[tuple]:
    """count different (picture index, Question) of a task, spread evenly over the pictures."""
    rng = np.random.default_rng((scenes.HELD_OUT_SEEDS, zlib.crc32(name.encode())))
    found, seen, index = [], set(), 0
    while len(found) < count:
        question = task(held_out(index % pictures), rng)
        key = (index % pictures, question and question.text)
        if question is not None and key not in seen:
            seen.add(key)
            found.append((index % pictures, question))
        index += 1
    return sorted(found, key=lambda item: item[0])


def write_pope(folder: Path) -> None:
    """Existence in the three categories; absent names are random, frequent or near ones."""
    lines = []
    for offset, category in ((10_000_001, "random"), (20_000_001, "popular"), (1, "adversarial")):
        rows = list(_existence(category))
        labels = [
            {"question_id": number, "image": image, "text": question.bare, "label": answer}
            for number, (image, question, answer) in enumerate(rows, start=1)
        ]
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
        lines += [
            line(offset + i, image, question, category)
            for i, (image, question, _) in enumerate(rows)
        ]
    write_lines(folder / "llava_pope_test.jsonl", lines)


def _existence(category: str):
    """(image, question, yes or no): on every second picture one pair of questions."""
    rng = np.random.default_rng((scenes.HELD_OUT_SEEDS, len(category)))
    frequent = Counter(t.name for i in range(PICTURES) for t in held_out(i).things).most_common()
    for index in range(0, PICTURES, 2):
        scene = held_out(index + (category == "popular"))
        image = picture_name(index + (category == "popular"))
        yes = questions.existence(scene, rng, yes=True)
        present = {thing.name for thing in scene.things}
        if category == "popular":
            names = [name for name, _ in frequent if name not in present][:20]
        else:
            names = questions.absent(scene, near=category == "adversarial")
        name = names[int(rng.integers(len(names)))]
        no = Question("existence", f"Is there a {name} in the image?{questions.SHORT}", "No")
        for question in (yes, no):
            yield image, question, question.answer.lower()


def write_textvqa(folder: Path) -> None:
    """Reading, with ten equal human answers and an empty OCR line."""
    lines, records = [], []
    for index, question in spread(questions.reading, "reading", PER_TASK):
        name = picture_name(index).split(".")[0]
        lines.append(line(name, picture_name(index), question))
        records.append(
            {
                "question_id": len(records),
                "image_id": name,
                "question": question.bare,
                "answers": [question.answer] * 10,
            }
        )
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": records})


def write_gqa(folder: Path) -> None:
    """Attributes and relations, with what the official scorer reads."""
    lines, records = [], {}
    tasks = ((questions.attribute, "attribute"), (questions.relation, "relation"))
    for task, name in tasks:
        for index, question in spread(task, name, PER_TASK):
            key = f"{len(lines):06d}"
            lines.append(line(key, picture_name(index), question))
            records[key] = _gqa_record(index, question)
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    write_json(folder / "data" / "testdev_balanced_questions.json", records)


def _gqa_record(index: int, question: Question) -> dict:
    structural = question.kind if question.task == "relation" else "query"
    semantic = "rel" if question.task == "relation" else "attr"
    return {
        "question": question.bare,
        "answer": question.answer.lower(),
        "imageId": picture_name(index).split(".")[0],
        "isBalanced": True,
        "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
        "groups": {"global": question.kind, "local": question.kind},
        "semantic": [{"operation": "select", "argument": "", "dependencies": []}] * 2,
        "entailed": [],
        "equivalent": [],
    }


def write_vqav2(folder: Path) -> None:
    """Counting, with ten equal human answers."""
    lines, records = [], []
    for index, question in spread(questions.counting, "counting", PER_TASK):
        number = 1000 * index + len(lines)
        lines.append(line(number, picture_name(index), question))
        answers = [{"answer": question.answer, "answer_id": i} for i in range(1, 11)]
        records.append(
            {
                "question_id": number,
                "image_id": index,
                "question_type": "how many",
                "answer_type": "number",
                "multiple_choice_answer": question.answer,
                "answers": answers,
            }
        )
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines)
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": records})


def write_mmbench(folder: Path) -> None:
    """Options, as the tab-separated table with pictures inside (small, so WebP 20)."""
    columns = "index question hint A B C D answer category image source l2-category comment split"
    rows = ["\t".join(columns.split())]
    pictures: dict[int, str] = {}
    for number, (index, question) in enumerate(
        spread(questions.options, "options", PER_TASK, TABLE_PICTURES)
    ):
        if index not in pictures:
            buffer = io.BytesIO()
            image = Image.fromarray(scenes.render(held_out(index)))
            image.save(buffer, "WEBP", quality=20, method=6)
            pictures[index] = base64.b64encode(buffer.getvalue()).decode()
        category = "attribute_recognition" if question.kind == "color" else "object_localization"
        cells = [str(number), question.bare, "", *question.options, *[""] * 4][: 3 + 4]
        cells += [question.answer, category, pictures[index], "playground", category, "", "dev"]
        rows.append("\t".join(cells))
    path = folder / "mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_mme(folder: Path) -> None:
    """Pairs of one yes and one no question per picture and category."""
    lines = []
    rng = np.random.default_rng((scenes.HELD_OUT_SEEDS, 5))
    for category in questions.STATEMENTS:
        for index, pair in _pairs(category, rng, PER_TASK // 10):
            name = picture_name(index)
            truth = "".join(f"{q.bare}{YES_NO}\t{q.answer}\n" for q in pair)
            path = folder / "MME_Benchmark_release_version" / category / f"{name.split('.')[0]}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(truth, encoding="utf-8")
            lines += [line(f"{category}/{name}", name, q, category) for q in pair]
    write_lines(folder / "llava_mme.jsonl", lines)


def _pairs(category: str, rng: np.random.Generator, count: int):
    found = 0
    for index in rng.permutation(PICTURES):
        pair = [
            questions.statement(held_out(int(index)), rng, category, yes) for yes in (True, False)
        ]
        if all(pair) and found < count:
            found += 1
            yield int(index), pair


def write_refcoco(folder: Path) -> None:
    """Boxes, in pixels as in the annotation files."""
    lines, records = [], []
    for index, question in spread(questions.box, "box", PER_TASK):
        number = len(lines)
        lines.append(line(number, picture_name(index), question))
        size = scenes.IMAGE_SIZE
        pixels = [round(share * size) for share in question.box]
        records.append({"question_id": number, "bbox": pixels, "width": size, "height": size})
    write_lines(folder / "llava_refcoco_val.jsonl", lines)
    write_lines(folder / "refcoco_val.jsonl", records)


def write_descriptions(folder: Path) -> None:
    """Full sentences, for measuring longer answers; no benchmark of that name exists."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(60):
        question = questions.description(held_out(index), rng)
        record = line(index, picture_name(index), question)
        lines.append(record | {"reference": question.answer})
    write_lines(folder / "questions.jsonl", lines)


def line(number, image: str, question: Question, category: str = "default") -> dict:
    """One line of a question file."""
    text = {"question_id": number, "image": image, "text": question.text}
    return text | {"category": category}


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def write_json(path: Path, value) -> None:
    """One JSON value, compact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


def write_benchmark(folder: Path) -> None:
    """The whole benchmark."""
    write_pictures(folder / "images")
    write_pope(folder / "pope")
    write_textvqa(folder / "textvqa")
    write_gqa(folder / "gqa")
    write_vqav2(folder / "vqav2")
    write_mmbench(folder / "mmbench")
    write_mme(folder / "MME")
    write_refcoco(folder / "refcoco")
    write_descriptions(folder / "describe")


def conversation(seed: int, image: str, longest: int | None = None) -> dict:
    """One training record: every question of the mix as one turn about the same picture, or one to
    `longest` of them."""
    rng = np.random.default_rng((seed, 3))
    asked = questions.ask(scenes.make_scene(seed), rng)
    if longest is not None:
        asked = asked[: int(rng.integers(1, longest + 1))]
    turns = []
    for number, question in enumerate(asked):
        head = "<image>\n" if number == 0 else ""
        turns.append({"from": "human", "value": head + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": str(seed), "image": image, "conversations": turns}


def write_training(folder: Path, first: int, count: int, longest: int | None = None) -> None:
    """Pictures (PNG without compression effort), and conversations.json of training scenes last, so
    that a folder with it is complete."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    seeds = range(scenes.TRAIN_SEEDS + first, scenes.TRAIN_SEEDS + first + count)
    for seed in progress(seeds, "scenes", "pictures"):
        name = f"{seed:08d}.png"
        image = Image.fromarray(scenes.render(scenes.make_scene(seed)))
        image.save(folder / "images" / name, compress_level=1)
        records.append(conversation(seed, name, longest))
    write_json(folder / "conversations.json", records)


def main() -> None:
    """Write the benchmark or training data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("benchmark", "train"))
    parser.add_argument("--output", type=Path, help="default: playground/benchmark or data/train")
    parser.add_argument("--first", type=int, default=0, help="first training scene")
    parser.add_argument("--pictures", type=int, default=4000, help="number of training scenes")
    parser.add_argument("--turns", type=int, help="most turns of a conversation (default: all)")
    args = parser.parse_args()
    if args.what == "benchmark":
        write_benchmark(args.output or ROOT / "benchmark")
    else:
        folder = args.output or ROOT / "data" / "train"
        write_training(folder, args.first, args.pictures, args.turns)


if __name__ == "__main__":
    main()
