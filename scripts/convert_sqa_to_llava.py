"""Turns ScienceQA problems into training data.

python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir DIR --split train
python scripts/convert_sqa_to_llava.py convert_to_jsonl --base-dir DIR --split train

A prompt format names what the model reads and what it writes, `QCM-LEA`: question, context and
multiple options; lecture, explanation and answer.
"""

import json
import os

from llava.errors import errors_as_messages
from llava.eval.files.records import read_json
from llava.program_parser import ProgramParser

LETTERS = "ABCDE"
# Parts of the input by format; "because" stands for the explanation given as a hint.
INPUTS = {
    "CQM": "context question options",
    "QCM": "question context options",
    "QCML": "question context options because",
    "QCME": "question context options because",
    "QCMLE": "question context options because",
    "QCLM": "question context because options",
    "QCEM": "question context because options",
    "QCLEM": "question context because options",
}
# The reference swaps lecture and solution in the formats AL and AE; models were trained that way.
OUTPUTS = {
    "A": "Answer: {answer}",
    "AL": "Answer: {answer} BECAUSE: {solution}",
    "AE": "Answer: {answer} BECAUSE: {lecture}",
    "ALE": "Answer: {answer} BECAUSE: {lecture} {solution}",
    "AEL": "Answer: {answer} BECAUSE: {solution} {lecture}",
    "LA": "Answer: {lecture} {answer}",
    "EA": "Answer: {solution} {answer}",
    "LEA": "Answer: {lecture} {solution} {answer}",
    "ELA": "Answer: {solution} {lecture} {answer}",
}


def build_input(problem: dict, name: str) -> str:
    """Returns what the model reads, in one of the formats `INPUTS`."""
    if name not in INPUTS:
        raise ValueError(f"unknown input format {name!r}, choose from {', '.join(INPUTS)}")
    hints = {"L": problem["lecture"], "E": problem["solution"]}
    context = " ".join(part for part in (problem["hint"],) if part).strip() or "N/A"
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)
    )
    parts = {
        "question": f"Question: {problem['question']}\n",
        "context": f"Context: {context}\n",
        "options": f"Options: {options}\n",
        "because": f"BECAUSE: {' '.join(hints[k] for k in 'LE' if k in name)}\n",
    }
    text = tidy("".join(parts[part] for part in INPUTS[name].split()))
    return text.replace("Question: ", "") if text.startswith("Question: ") else text


def build_output(problem: dict, name: str) -> str:
    """Returns what the model should write, in one of the formats `OUTPUTS` or `LEPA`."""
    letter = LETTERS[problem["answer"]]
    lecture, solution = problem["lecture"], problem["solution"]
    if name == "LEPA":
        lines = [f"LECTURE: {lecture}"] * bool(lecture) + [f"SOLUTION: {solution}"] * bool(solution)
        return tidy("\n".join([*lines, "###", f"ANSWER: {letter}."]))
    if name not in OUTPUTS:
        raise ValueError(f"unknown output format {name!r}, choose from {', '.join(OUTPUTS)}, LEPA")
    answer = f"The answer is {letter}."
    text = tidy(OUTPUTS[name].format(answer=answer, lecture=lecture, solution=solution))
    return text.replace("Answer: ", "") if text.startswith("Answer: ") else text


def tidy(text: str) -> str:
    """One pass from double to single spaces; an explanation that stayed empty is cut off."""
    return text.replace("  ", " ").strip().removesuffix("BECAUSE:").strip()


def read_problems(base_dir: str, split: str) -> dict[str, dict]:
    """Returns the problems of a split by id."""
    problems = read_json(os.path.join(base_dir, "problems.json"))
    splits = read_json(os.path.join(base_dir, "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"no split {split!r}, choose from {', '.join(splits)}")
    return {key: problems[key] for key in splits[split]}


def samples(problems: dict[str, dict], prompt_format: str):
    """Yields (id, image or None, input, output); the image mark closes the input."""
    reads, _, writes = prompt_format.partition("-")
    for key, problem in problems.items():
        text, output = build_input(problem, reads), build_output(problem, writes)
        image = os.path.join(key, problem["image"]) if problem["image"] else None
        yield key, image, text + "\n<image>" if image else text, output


def convert_to_llava(base_dir: str, split: str, prompt_format: str) -> None:
    """Writes `llava_<split>_<format>.json`: a list of conversations."""
    records = []
    for key, image, text, output in samples(read_problems(base_dir, split), prompt_format):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": output}]
        records.append({"id": key} | _optional_image(image) | {"conversations": turns})
    print(f"Number of samples: {len(records)}")
    path = os.path.join(base_dir, f"llava_{split}_{prompt_format}.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(records, file, indent=2)


def convert_to_jsonl(base_dir: str, split: str, prompt_format: str) -> None:
    """Writes `scienceqa_<split>_<format>.jsonl`: one instruction and output per line."""
    path = os.path.join(base_dir, f"scienceqa_{split}_{prompt_format}.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for key, image, text, output in samples(read_problems(base_dir, split), prompt_format):
            record = {"id": key} | _optional_image(image) | {"instruction": text, "output": output}
            file.write(json.dumps(record) + "\n")


def _optional_image(image: str | None) -> dict:
    return {"image": image} if image else {}


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, help="what to write")
    for command, default in ((convert_to_llava, "QCM-LEA"), (convert_to_jsonl, "QCM-LEPA")):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.add_argument("--base-dir", required=True, help="holds problems.json, pid_splits.json")
        sub.add_argument("--split", required=True, help="part of ScienceQA to convert")
        sub.add_argument(
            "--prompt-format", default=default, help="what question and answer are made of"
        )
        sub.set_defaults(run=command)
    args = parser.parse_args()
    args.run(args.base_dir, args.split, args.prompt_format)


if __name__ == "__main__":
    main()
