"""Write playground/samples: questions in the format of each benchmark playground/benchmark lacks.

A few only, so that each script can be tried without data:

    python -m playground.make_samples

They ask about the pictures of playground/benchmark, and only what the playground's model has
learnt; the Chinese ones show the format, as the model reads no Chinese.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from playground import questions, scenes
from playground.glimpse_data import needed
from playground.make_data import held_out, picture_name, write_json, write_lines
from playground.questions import LETTER, SHORT, Question

ROOT = Path(__file__).parent
PICTURES = 12
PER_PICTURE = 2
SIZE = scenes.IMAGE_SIZE
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
ASKS_FOR_BOX = (
    " Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
COLORS_ZH = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "cyan": "青色",
    "black": "黑色",
    "white": "白色",
}
VISCOT_SETS = ("gqa", "textvqa")


def asked(task, seed: int) -> list[tuple[int, str, Question]]:
    """(number, picture, question) of PER_PICTURE different questions of a task on every picture."""
    rng = np.random.default_rng((scenes.HELD_OUT_SEEDS, 77, seed))
    found, seen = [], set()
    for index in range(PICTURES):
        for _ in range(8 * PER_PICTURE):
            question = task(held_out(index), rng)
            of_picture = sum(name == picture_name(index) for _, name, _ in found)
            if question and of_picture < PER_PICTURE and (index, question.text) not in seen:
                seen.add((index, question.text))
                found.append((len(found), picture_name(index), question))
    return found


def line(number, image: str, text: str, category: str = "default") -> dict:
    """One line of a question file."""
    return {"question_id": number, "image": image, "text": text, "category": category}


def write_vizwiz(folder: Path) -> None:
    """The test split without answers, and the validation split with ten equal ones."""
    for split, seed in (("test", 1), ("val", 2)):
        rows = asked(questions.attribute, seed)
        rows = list({image: row for row in rows for image in row[1:2]}.values())  # one per image
        text = UNANSWERABLE + SHORT
        lines = [line(n, image, q.bare + text) for n, (_, image, q) in enumerate(rows)]
        write_lines(folder / f"llava_{split}.jsonl", lines)
        answers = [{"answer": "", "answer_confidence": "yes"}] * 10
        records = [
            {
                "image": image,
                "question": q.bare,
                "answers": [{**a, "answer": q.answer.lower()} for a in answers],
                "answer_type": "other",
                "answerable": 1,
            }
            for _, image, q in rows
        ]
        if split == "val":
            write_json(folder / "val.json", records)


def write_vqav2(folder: Path) -> None:
    """Counting, as questions of the validation split."""
    rows = asked(questions.counting, 9)
    lines = [line(number, image, q.text) for number, image, q in rows]
    records = [
        {"question_id": number, "answers": [{"answer": q.answer}] * 10} for number, _, q in rows
    ]
    write_lines(folder / "llava_vqav2_mscoco_val2014.jsonl", lines)
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": records})


def write_science(folder: Path) -> None:
    """Options as ScienceQA asks them; every fourth question has no image in its file."""
    records, problems = [], {}
    for number, image, question in asked(questions.options, 3):
        key, picture = str(number), number % 4 != 3
        value = ("<image>\n" if picture else "") + lettered(question)
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": question.answer}]
        record = {"id": key, "conversations": turns}
        records.append(record | {"image": image} if picture else record)
        problems[key] = {
            "question": question.bare,
            "choices": list(question.options),
            "answer": "ABCD".index(question.answer),
            "hint": "",
            "image": "image.png" if picture else None,
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    write_json(folder / "llava_test_CQM-A.json", records)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})


def lettered(question: Question) -> str:
    """The question and its options, one per line."""
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=False)]
    return "\n".join([question.bare, *lines])


def write_seed(folder: Path) -> None:
    """Options of two types; the last picture's stand for questions on a video."""
    lines, records = [], []
    for number, image, question in asked(questions.options, 4):
        video = image == picture_name(PICTURES - 1)
        key = f"v{number}" if video else str(number)
        lines.append(line(key, image, lettered(question) + LETTER))
        records.append(
            {
                "question_id": key,
                "question_type_id": 10 if video else 1 + number % 2,
                "data_type": "video" if video else "image",
                "question": question.bare,
                "answer": question.answer,
                "data_id": image,
            }
            | {f"choice_{k}": text for k, text in zip("abcd", question.options, strict=False)}
        )
    types = {"Instance Attributes": 1, "Instance Location": 2, "Action Recognition": 10}
    write_lines(folder / "llava-seed-bench.jsonl", lines)
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": records})


def write_mmvet(folder: Path) -> None:
    """Open questions, with the capabilities each needs."""
    rows = [(q, image, "rec") for _, image, q in asked(questions.attribute, 5)[:8]]
    rows += [(q, image, "ocr") for _, image, q in asked(questions.reading, 6)[:8]]
    rows += [(q, image, "spat") for _, image, q in asked(questions.relation, 7)[:8]]
    lines = [line(n, image, q.bare, "conv") for n, (q, image, _) in enumerate(rows)]
    entries = {
        f"v1_{n}": {
            "imagename": image,
            "question": q.bare,
            "answer": q.answer,
            "imagesource": "playground",
            "capability": ["rec"] if skill == "rec" else ["rec", skill],
        }
        for n, (q, image, skill) in enumerate(rows)
    }
    write_lines(folder / "llava-mm-vet.jsonl", lines)
    write_json(folder / "mm-vet.json", entries)


def write_llavabench(folder: Path) -> None:
    """Descriptions and short questions; the context is the full description of the picture."""
    rng = np.random.default_rng(0)
    lines, contexts, reference = [], [], []
    for index in range(PICTURES):
        image, scene = picture_name(index), held_out(index)
        described = questions.description(scene, rng)
        contexts.append({"id": index, "image": image, "caption": described.answer})
        short = questions.attribute(scene, rng)
        for question, category in ((described, "detail"), (short, "conv")):
            if question:
                number = len(lines)
                lines.append(line(number, image, question.bare, category))
                reference.append(
                    {
                        "question_id": number,
                        "prompt": question.bare,
                        "text": question.answer,
                        "answer_id": f"reference-{number}",
                        "category": category,
                    }
                )
    write_lines(folder / "questions.jsonl", lines)
    write_lines(folder / "context.jsonl", contexts)
    write_lines(folder / "answers_gpt4.jsonl", reference)


def write_qbench(folder: Path) -> None:
    """Options in the format of LLVisionQA, in English and, as far as words go, in Chinese."""
    records = [
        {
            "type": 1,
            "concern": 1,
            "question": question.bare,
            "img_path": image,
            "candidates": list(question.options),
            "correct_ans": question.options["ABCD".index(question.answer)],
        }
        for _, image, question in asked(questions.options, 8)
    ]
    write_json(folder / "llvisionqa_dev.json", records)
    hidden = [{k: v for k, v in record.items() if k != "correct_ans"} for record in records]
    write_json(folder / "llvisionqa_test.json", hidden)
    chinese = [in_chinese(record) for record in records if _is_color(record["candidates"])]
    write_json(folder / "质衡-问答-验证集.json", chinese)


def _is_color(words) -> bool:
    return all(word.lower() in COLORS_ZH for word in words)


def in_chinese(record: dict) -> dict:
    """A question on a colour in Chinese; the thing keeps its English name."""
    thing = record["question"].removesuffix("?").split(" the ")[-1]
    zh = lambda word: COLORS_ZH[word.lower()]  # noqa: E731
    return record | {
        "question": f"图中的 {thing} 是什么颜色？",
        "candidates": [zh(word) for word in record["candidates"]],
        "correct_ans": zh(record["correct_ans"]),
    }


def write_mmbench_cn(folder: Path, english: Path) -> None:
    """Rows on colours from the English table, with its pictures."""
    header, *rows = english.read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    table = [header]
    for row in rows:
        cells = dict(zip(names, row.split("\t"), strict=True))
        options = [cells[letter] for letter in "ABCD" if cells[letter]]
        if _is_color(options) and len(table) <= PICTURES:
            record = {"question": cells["question"], "candidates": options}
            translated = in_chinese(record | {"correct_ans": options[0]})
            cells["question"] = translated["question"]
            cells |= dict(zip("ABCD", translated["candidates"], strict=False))
            table.append("\t".join(cells.values()))
    path = folder / "mmbench_dev_cn_20231003.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(table) + "\n", encoding="utf-8")


def write_refcoco(folder: Path) -> None:
    """Boxes for the splits that playground/benchmark lacks."""
    splits = {"refcoco": ("testA", "testB"), "refcoco+": ("val", "testA", "testB")}
    splits["refcocog"] = ("val", "test")
    names = [f"{dataset}_{split}" for dataset, own in splits.items() for split in own]
    for seed, name in enumerate(names, start=20):
        lines, boxes = [], []
        for number, image, question in asked(questions.box, seed):
            lines.append(line(number, image, question.text))
            pixels = [round(share * SIZE) for share in question.box]
            boxes.append({"question_id": number, "bbox": pixels, "width": SIZE, "height": SIZE})
        write_lines(folder / f"llava_{name}.jsonl", lines)
        write_lines(folder / f"{name}.jsonl", boxes)


def around(boxes: list[tuple[int, int, int, int]]) -> list[int]:
    """The smallest box that holds all of them."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return [min(left), min(top), max(right), max(bottom)]


def write_viscot(folder: Path) -> None:
    """Free-form questions; the box holds the things and signs that have to be seen."""
    tasks = {"gqa": questions.attribute, "textvqa": questions.reading}
    scene_of = {picture_name(index): held_out(index) for index in range(PICTURES)}
    for seed, name in enumerate(VISCOT_SETS, start=40):
        records = []
        for number, image, question in asked(tasks[name], seed):
            box = around(needed(scene_of[image], question))
            turns = (
                ("human", f"<image>\n{question.bare}{ASKS_FOR_BOX}"),
                ("gpt", str([round(edge / SIZE, 3) for edge in box])),
                ("human", "<image>"),
                ("gpt", question.answer),
            )
            records.append(
                {
                    "dataset": name,
                    "split": "val",
                    "question_id": number,
                    "image": [image, f"{image}###{json.dumps(box)}"],
                    "conversations": [{"from": who, "value": text} for who, text in turns],
                }
            )
        write_json(folder / "benchmark" / f"{name}.json", records)


def write_samples(folder: Path) -> None:
    """All of them."""
    write_vizwiz(folder / "vizwiz")
    write_vqav2(folder / "vqav2")
    write_science(folder / "scienceqa")
    write_seed(folder / "seed_bench")
    write_mmvet(folder / "mm-vet")
    write_llavabench(folder / "llava-bench-in-the-wild")
    write_qbench(folder / "qbench")
    write_mmbench_cn(
        folder / "mmbench_cn", ROOT / "benchmark" / "mmbench" / "mmbench_dev_20230712.tsv"
    )
    write_refcoco(folder / "refcoco")
    write_viscot(folder / "viscot")


def main() -> None:
    """Write the samples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "samples")
    write_samples(parser.parse_args().output)


if __name__ == "__main__":
    main()
