"""MM-Vet: a judge grades open answers between 0 and 1; mean per capability, in percent.

python -m llava.eval.benchmarks.mmvet --mm-vet mm-vet/mm-vet.json --result-file A.jsonl \
    -o GRADES.jsonl

The judge is any OpenAI-compatible endpoint (`--help`). The published numbers come from the
benchmark's own few-shot prompt and gpt-4-0613: its text is given with `--prompt-file`; without it
our own wording is used, whose numbers compare with each other only.
"""

import json
import os
import re

from llava.errors import errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark, Judged, JudgedRun, Upload
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import question_id, say_missing, source, unique
from llava.eval.files.records import Records, as_int, read_json, read_text
from llava.eval.files.writing import write_json, write_jsonl
from llava.eval.scoring.judge import Judge, Prompt, add_judge_args, judge_from_args
from llava.eval.scoring.units import Unit, Units
from llava.program_parser import ProgramParser

ENTRIES = "mm-vet/mm-vet.json"
MODEL = "gpt-4-0613"
OWN_PROMPT = (
    "You grade answers to questions about images. Compare the answer with the ground truth, which "
    "may combine parts: <AND> between parts means that all of them must be there for the full "
    "grade, <OR> that any one of them will do. The grade is the share of the ground truth that the "
    "answer gets right, from 0.0 (nothing, or a contradiction) to 1.0 (all of it), in steps of "
    "0.1. Wording and additional true details do not matter. Reply with the number only."
)
NOT_ASKED = "the grade is that of the others"
ROW = "Question | Ground truth | Prediction | Correctness"
NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d]|\.\d)")


def judge_prompt(entry: dict, prediction: str, instruction: str | None) -> Prompt:
    """What the judge is asked; with a text of the benchmark as `instruction`, a row below it whose
    last cell the judge fills in."""
    truth = entry["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    cells = [entry["question"], truth, prediction]
    if instruction is not None:
        row = [*(cell.replace("\n", " ") for cell in cells), ""]
        return "", instruction.rstrip("\n") + "\n" + " | ".join(row)
    names = ("Question", "Ground truth", "Answer")
    return OWN_PROMPT, "\n\n".join(f"{n}: {c}" for n, c in zip(names, cells, strict=True))


def parse_grade(reply: str) -> float | None:
    """Returns the first number from 0 to 1 in a reply, or None."""
    found = NUMBER.search(reply)
    return float(found[0]) if found else None


def units(
    judge: Judge,
    entries: dict[str, dict],
    answers: list[dict],
    path: str,
    instruction: str | None = None,
) -> Units:
    """Asks the judge about every answer and writes its grades to `path`; returns those that can be
    read, by capability.

    entries: content of mm-vet.json
    Raises ValueError when an answer belongs to no entry, or two to one question differ.
    """
    given = unique(answers, lambda answer: entry_name(answer["question_id"]))
    if unknown := [key for key in given if key not in entries]:
        raise ValueError(f"{source(answers)}: mm-vet.json has no {unknown[0]!r}")
    prompts = [judge_prompt(entries[key], a["text"], instruction) for key, a in given.items()]
    lines, found = [], []
    for (key, answer), reply in zip(given.items(), judge.ask_all(prompts), strict=True):
        grade, capabilities = parse_grade(reply), entries[key]["capability"]
        head = {"question_id": answer["question_id"], "text": answer["text"]}
        lines.append({**head, "capability": capabilities, "content": reply, "grade": grade})
        if grade is not None:
            said, groups = answer["text"], tuple(capabilities)
            found.append(Unit(question_id(answer), grade, said, groups=groups))
    write_jsonl(lines, path)
    if not found:
        raise ValueError(f"{path}: no reply of the judge holds a grade")
    return Units(found, details={"count": len(lines), "unreadable": len(lines) - len(found)})


def report(units: Units) -> str:
    lines = [f"  {name}: {part.percent:.1f}\n" for name, part in units.by_group().items()]
    count, unreadable = units.details["count"], units.details["unreadable"]
    head = f"Samples: {count}, verdicts without a grade: {unreadable}\n"
    return f"{head}Total: {units.percent:.1f}\n" + "".join(lines)


def score(judge: Judge, run: JudgedRun) -> Units:
    entries = read_json(os.path.join(run.data_dir, ENTRIES))
    instruction = read_text(run.wording) if run.wording else None
    return units(judge, entries, run.answers, run.output, instruction)


def upload(answers: list[dict]) -> dict[str, str]:
    """Returns `{"v1_<question_id>": answer}`, what the MM-Vet judge reads."""
    given = unique(answers, lambda answer: entry_name(answer["question_id"]))
    return {name: answer["text"] for name, answer in given.items()}


def entry_name(key: int | str) -> str:
    """`v1_7` for question 7; the benchmark's own files have it with the `v1_`."""
    return f"v1_{str(key).strip().removeprefix('v1_')}"


def write_upload(data_dir: str, asked: Records, answers: list[dict], path: str) -> None:
    write_json(upload(answers), path, indent=2)


BENCHMARKS = (
    Benchmark(
        "mmvet",
        "mm-vet/llava-mm-vet.jsonl",
        "mm-vet/images",
        "judge's grade",
        {
            "mm-vet/llava": BUNDLE,
            "mm-vet/": "https://github.com/yuweihao/MM-Vet/releases (mm-vet.zip)",
        },
        truth=(ENTRIES,),
        program=("model_vqa",),
        judge=Judged(MODEL, 16, 0.0, "mm-vet/prompt.txt", score, report),
        upload=Upload(
            ".json",
            write_upload,
            "https://huggingface.co/spaces/whyu/MM-Vet_Evaluator",
            "results",
        ),
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--mm-vet", required=True, help="mm-vet.json of the benchmark")
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument("-o", "--output", required=True, help="file of the graded answers")
    parser.add_argument(
        "--prompt-file", help=f"the benchmark's few-shot prompt, which ends in rows `{ROW}`"
    )
    add_judge_args(parser, MODEL, max_tokens=16, temperature=0.0)
    args = parser.parse_args()
    answers = read_answers(args.result_file)
    entries = read_json(args.mm_vet)
    say_missing(answers, [as_int(key.removeprefix("v1_")) for key in entries], NOT_ASKED)
    instruction = read_text(args.prompt_file) if args.prompt_file else None
    judge = judge_from_args(args, args.output)
    found = units(judge, entries, answers, args.output, instruction)
    print(report(found), end="")
    print(json.dumps({key: found.result()[key] for key in ("score", "count")}))


if __name__ == "__main__":
    main()
