"""Visual-CoT: a judge compares free-form answers with the right ones; mean score from 0 to 1.

python -m llava.eval.benchmarks.viscot --result-file A.jsonl [--score-func judge|precise_match]

The judge is any OpenAI-compatible endpoint (`--help`). Scored lines grow in
`A_judge-tmp.jsonl`, where a stopped run goes on; when all are there, the file is renamed to
`A_judge-0.7613.jsonl`, with the mean in its name.

A file is a list of `{question_id, image: [path, "path###[x1, y1, x2, y2]"], conversations}`, the
conversation being question, box, `<image>` and answer.
"""

import argparse
import glob
import json
import os
import re
from collections.abc import Iterator
from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.answers_file import AnswersFile
from llava.eval.answering.questions import Question
from llava.eval.benchmarks.benchmark import Benchmark, Judged, JudgedRun
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, unique
from llava.eval.files.records import Record, Records, read_json_list, read_jsonl
from llava.eval.scoring.judge import Judge, Prompt, add_judge_args, judge_from_args

ASKS_FOR_BOX = (
    "Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
BRIEF = "\n\nAnswer the question using a single word or phrase."
#: the sets whose mean is the published number (a thirteenth, emotic, is not evaluated)
SETS = (
    "flickr30k",
    "visual7w",
    "gqa",
    "openimages",
    "vsr",
    "cub",
    "docvqa",
    "textcap",
    "textvqa",
    "dude",
    "sroie",
    "infographicsvqa",
)
SYSTEM = (
    "\nYou are responsible for proofreading the answers, you need to give a score to the model's "
    "answer by referring to the standard answer, based on the given question. The full score is 1 "
    "point and the minimum score is 0 points. Please output the score in the form "
    '"score: <score>". The evaluation criteria require that the closer the model\'s answer is to '
    "the standard answer, the higher the score.\n"
)
USER = "\nquestion: {question}\nstandard answer: {answer}\nmodel's answer: {text}\n"
SCORE = re.compile(r"score: ([\d\.]+)")
FIELDS = ("question_id", "prompt", "text", "answer")
MODEL = "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8"


def viscot_questions(record: dict, brief: bool = False) -> Iterator[Question]:
    """The question without its request for a box; the answer line carries the right answer."""
    turns = [turn["value"] for turn in record["conversations"]]
    text = turns[0].replace("<image>\n", "").replace(ASKS_FOR_BOX, "").strip()
    text += BRIEF if brief else ""
    head = {"question_id": record["question_id"], "prompt": text}
    yield Question(head, text, [image_of(record)], tail={"answer": turns[-1]})


def image_of(record: dict) -> str:
    """Path of the picture, relative to the image folder."""
    image = record["image"]
    return image if isinstance(image, str) else image[0]


def read(path: str, folder: str | None = None) -> list[dict]:
    """Returns the records of a file.

    folder: where the pictures are; a picture that is not there but in `val/` below its set's
            folder (`cot/SET/val/...`, as in some downloads) is taken from there
    """
    records = read_json_list(path)
    if folder is None:
        return records
    return Records(path, (_located(record, folder) for record in records))


def _located(record: Record, folder: str) -> Record:
    """The record with its picture where that is; a broken one as it is, its reader names it."""
    try:
        image = [_present(image_of(record), folder), *record["image"][1:]]
    except (ValueError, TypeError, AttributeError, IndexError, KeyError):
        return record
    return Record({**record, "image": image}, record.where)


def _present(image: str, folder: str) -> str:
    if os.path.exists(os.path.join(folder, image)):
        return image
    top, name, *rest = image.split("/")
    elsewhere = "/".join([top, name, "val", *rest])
    return elsewhere if os.path.exists(os.path.join(folder, elsewhere)) else image


def judge_prompt(record: dict) -> Prompt:
    """What the judge is asked about one answer line."""
    question = record["prompt"].removesuffix(BRIEF)
    user = USER.format(question=question, answer=record["answer"], text=record["text"])
    return SYSTEM, user


def parse_score(reply: str) -> float:
    """Returns the score in a reply, within 0 and 1; 0 when it does not name exactly one."""
    found = SCORE.findall(reply.lower())
    try:
        return min(max(float(found[0]), 0.0), 1.0) if len(found) == 1 else 0.0
    except ValueError:  # such as "1.0."
        return 0.0


def precise_match(record: dict) -> float:
    """1 when the answer is the right one up to case, surrounding space and a final period."""
    ours, wanted = (record[key].strip().rstrip(".").lower() for key in ("text", "answer"))
    return float(ours == wanted)


def score_file(result_file: str, judge: Judge | None, overwrite: bool = False) -> dict:
    """Scores an answers file; returns `{"score": percent, "count", "unreadable", "file"}`.

    judge: None compares the texts (`precise_match`) instead
    """
    records = list(unique(read_answers(result_file, FIELDS), _question_key).values())
    stem = f"{os.path.splitext(result_file)[0]}_{'judge' if judge else 'precise_match'}"
    path = f"{stem}-tmp.jsonl"
    settings = judge.settings if judge else {"judge": None}
    heads = [{key: record[key] for key in ("question_id", "text")} for record in records]
    with AnswersFile(path, heads, settings, overwrite, ("text", "score")) as file:
        rest = file.missing
        if judge:
            replies = judge.ask_all([judge_prompt(records[n]) for n in rest])
            lines = ({"score": parse_score(r), "verdict": r} for r in replies)
        else:
            lines = ({"score": precise_match(records[n])} for n in rest)
        for number, line in zip(rest, lines, strict=True):
            file.put(number, {**records[number], **line})
        file.finish()
    return _finish(path, stem)


def _question_key(record: dict) -> tuple:
    return question_id(record), record["prompt"], record["answer"]


def _finish(path: str, stem: str) -> dict:
    """Renames the complete file after its mean, in place of an earlier one."""
    scored = read_jsonl(path, ("score",))
    mean = sum(record["score"] for record in scored) / max(len(scored), 1)
    for earlier in glob.glob(f"{glob.escape(stem)}-[01].*.jsonl"):
        os.remove(earlier)
    final = f"{stem}-{mean:.4f}.jsonl"
    os.replace(path, final)
    os.remove(f"{stem}-tmp.settings.json")
    unreadable = sum(
        "verdict" in r and len(SCORE.findall(r["verdict"].lower())) != 1 for r in scored
    )
    return {"score": 100 * mean, "count": len(scored), "unreadable": unreadable, "file": final}


def report(result: dict) -> str:
    return (
        f"Samples: {result['count']}, verdicts without a score: {result['unreadable']}\n"
        f"Mean score: {result['score'] / 100:.4f}\n"
    )


def score(judge: Judge, run: JudgedRun) -> dict:
    return score_file(run.answers_file, judge, overwrite=True)


JUDGED = Judged(MODEL, 512, 0.0, None, score, report)
CODE = "https://huggingface.co/datasets/deepcs233/Visual-CoT"
SOURCES = {
    "viscot": f"{CODE} (folder cot)",
    "viscot/benchmark": f"{CODE} (folder benchmark of its code)",
}
BENCHMARKS = tuple(
    Benchmark(
        f"viscot_{name}{label}",
        f"viscot/benchmark/{name}.json",
        "viscot",
        "judge's score",
        SOURCES,
        read=read,
        to_questions=partial(viscot_questions, brief=bool(label)),
        program=("model_vqa_viscot", *(["--brief"] if label else [])),
        label=label,
        judge=JUDGED,
    )
    for name in SETS
    for label in ("", "_brief")
)


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result-file", required=True, help="answers of model_vqa_viscot")
    parser.add_argument("--score-func", default="judge", choices=("judge", "precise_match"))
    parser.add_argument("--overwrite", action="store_true", help="discard unfinished scoring")
    add_judge_args(parser, MODEL, max_tokens=512, temperature=0.0)
    args = parser.parse_args()
    judge = judge_from_args(args, args.result_file) if args.score_func == "judge" else None
    result = score_file(args.result_file, judge, args.overwrite)
    print(report(result), end="")
    print(json.dumps({key: result[key] for key in ("score", "count", "file")}))


if __name__ == "__main__":
    main()
