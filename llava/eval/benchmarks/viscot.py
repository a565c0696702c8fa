"""Visual-CoT: a judge compares free-form answers with the right ones; mean score from 0 to 1.

python -m llava.eval.benchmarks.viscot --result-file A.jsonl [--score-func judge|precise_match]

The judge is any OpenAI-compatible endpoint (`--help`). The scored lines go to
`A_judge-0.7613.jsonl`, with the mean in its name. A run that was stopped goes on: what the judge
has said is kept beside it.

The emotions of `emotic` are answered and judged like the others, but are no part of the mean.

A file is a list of `{question_id, image: [path, "path###[x1, y1, x2, y2]"], conversations}`, the
conversation being question, box, `<image>` and answer.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from math import isfinite

from llava.answer_scores import JUDGE_MODEL, judge_question, judged_score, scores_in
from llava.errors import errors_as_messages
from llava.eval.answering.questions import Question, questions_of
from llava.eval.benchmarks.benchmark import Benchmark, Judged, JudgedRun
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, source, unique
from llava.eval.files.records import Record, Records, read_json_list
from llava.eval.files.side_files import SCORERS, scored_files
from llava.eval.files.writing import write_jsonl
from llava.eval.scoring.judge import Judge, Prompt, add_judge_args, judge_from_args
from llava.eval.scoring.units import Unit, Units
from llava.program_parser import ProgramParser

ASKS_FOR_BOX = (
    "Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
BRIEF = "\n\nAnswer the question using a single word or phrase."
#: the sets whose mean is the published number
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
#: comes with them, and is not evaluated in published tables
FURTHER_SETS = ("emotic",)
FIELDS = ("question_id", "prompt", "text", "answer")


def viscot_questions(record: dict, brief: bool = False) -> Iterator[Question]:
    """The question without its request for a box; the answer line carries the right answer."""
    turns = [turn["value"] for turn in record["conversations"]]
    text = turns[0].replace("<image>\n", "").replace(ASKS_FOR_BOX, "").strip()
    text += BRIEF if brief else ""
    head = {"question_id": record["question_id"], "prompt": text}
    boxes = boxes_of(record)
    boxes = None if boxes is None else [boxes]
    yield Question(head, text, [image_of(record)], tail={"answer": turns[-1]}, boxes=boxes)


def image_of(record: dict) -> str:
    """Path of the picture, relative to the image folder."""
    image = record["image"]
    return image if isinstance(image, str) else image[0]


def boxes_of(record: dict) -> list[list[float]] | None:
    """The box in pixels of the picture that helps to answer, in a list; None: the record has none.

    Corners may come in any order. Raises ValueError when what stands behind `###` is no box.
    """
    image = record["image"]
    text = image[1].partition("###")[2] if isinstance(image, list) and len(image) > 1 else ""
    if not text:
        return None
    try:
        box = json.loads(text)
    except ValueError:
        box = None
    numbers = isinstance(box, list) and all(type(edge) in (int, float) for edge in box)
    if not numbers or len(box) != 4 or not all(map(isfinite, box)):
        raise ValueError(f"its box {text!r:.60} is not [x1, y1, x2, y2]")
    (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
    return [[left, top, right, bottom]]


def read(path: str, folder: str | None = None) -> list[dict]:
    """Returns the records of a file.

    folder: where the pictures are; a picture that is not there but in `val/` below its set's
            folder (`cot/SET/val/...`, as in some downloads) is taken from there
    """
    records = read_json_list(path)
    return records if folder is None else located(records, folder)


def located(records: Records, folder: str) -> Records:
    """The records with their pictures where those are in an image folder, see `read`."""
    return Records(records.path, (_located(record, folder) for record in records))


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
    return judge_question(question, record["answer"], record["text"])


def precise_match(record: dict) -> float:
    """1 when the answer is the right one up to case, surrounding space and a final period."""
    ours, wanted = (record[key].strip().rstrip(".").lower() for key in ("text", "answer"))
    return float(ours == wanted)


def units(answers: Records, judge: Judge | None, images: dict | None = None) -> Units:
    """Scores answers; writes the scored lines beside their file, the mean in the name, in place of
    those of an earlier scoring.

    judge:  None compares the texts (`precise_match`) instead
    images: of the questions, by `asked`
    Raises ValueError when two answers to one question differ.
    """
    given = unique(answers, lambda answer: (*asked(answer), answer["answer"]))
    if judge:
        replies = judge.ask_all(map(judge_prompt, given.values()))
        verdicts = [{"score": judged_score(reply), "verdict": reply} for reply in replies]
    else:
        verdicts = [{"score": precise_match(answer)} for answer in given.values()]
    lines = [answer | verdict for answer, verdict in zip(given.values(), verdicts, strict=True)]
    found = [
        Unit(key, line["score"], line["text"], (images or {}).get(key[:2]))
        for key, line in zip(given, lines, strict=True)
    ]
    unreadable = sum(len(scores_in(line["verdict"])) != 1 for line in lines if judge)
    scorer = SCORERS[0] if judge else SCORERS[1]
    mean = sum(line["score"] for line in lines) / max(len(lines), 1)
    path = f"{os.path.splitext(source(answers))[0]}_{scorer}-{mean:.4f}.jsonl"
    write_jsonl(lines, path)
    for earlier in scored_files(source(answers), scorer):
        if earlier != path:
            os.remove(earlier)
    return Units(found, details={"unreadable": unreadable, "file": path})


def asked(answer: dict) -> tuple:
    """What identifies the question of an answer, whether a brief answer was asked for or not."""
    return question_id(answer), answer["prompt"].removesuffix(BRIEF)


def report(units: Units) -> str:
    return (
        f"Samples: {units.count}, verdicts without a score: {units.details['unreadable']}\n"
        f"Mean score: {units.percent / 100:.4f}\n"
    )


def score(judge: Judge, run: JudgedRun) -> Units:
    questions = questions_of(run.asked, viscot_questions, skip_bad=True)
    images = {asked(q.head): q.images[0] for q in questions if not q.error}
    return units(run.answers, judge, images)


JUDGED = Judged(JUDGE_MODEL, 512, 0.0, None, score, report)
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
        located=located,
        to_questions=partial(viscot_questions, brief=bool(label)),
        program=("model_vqa_viscot", *(["--brief"] if label else [])),
        label=label,
        judge=JUDGED,
    )
    for name in (*SETS, *FURTHER_SETS)
    for label in ("", "_brief")
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--result-file", required=True, help="answers of model_vqa_viscot")
    parser.add_argument(
        "--score-func", default="judge", choices=SCORERS, help="who scores the answers"
    )
    add_judge_args(parser, JUDGE_MODEL, max_tokens=512, temperature=0.0)
    args = parser.parse_args()
    judge = judge_from_args(args, args.result_file) if args.score_func == "judge" else None
    found = units(read_answers(args.result_file, FIELDS), judge)
    print(report(found), end="")
    print(json.dumps({key: found.result()[key] for key in ("score", "count", "file")}))


if __name__ == "__main__":
    main()
