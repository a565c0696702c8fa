"""MME: yes/no questions in pairs per image; perception (max 2000) and cognition (max 800).

python -m llava.eval.eval_mme --data-dir MME --result-file A.jsonl --output-dir eval_tool/answers/X
python -m llava.eval.eval_mme --results-dir eval_tool/answers/X
"""

import argparse
import os
from collections import defaultdict

from llava.eval.answer_lines import read_answers
from llava.eval.errors import errors_as_messages

TASKS = {
    "Perception": (
        "existence count position color posters celebrity scene landmark artwork OCR"
    ).split(),
    "Cognition": (
        "commonsense_reasoning numerical_calculation text_translation code_reasoning"
    ).split(),
}
GROUND_TRUTH_DIR = "MME_Benchmark_release_version"
WORD_PROMPT = "Answer the question using a single word or phrase."
YES_NO_PROMPT = "Please answer yes or no."
MAX_TASK_SCORE = 200


def read_ground_truth(data_dir: str) -> dict[tuple[str, str, str], str]:
    """Returns the answer (Yes or No) by category, file name and question."""
    truth = {}
    root = os.path.join(data_dir, GROUND_TRUTH_DIR)
    for category in sorted(os.listdir(root)):
        folder = os.path.join(root, category)
        nested = os.path.join(folder, "questions_answers_YN")
        folder = nested if os.path.isdir(nested) else folder
        if os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if name.endswith(".txt"):
                    for question, answer in _read_pairs(os.path.join(folder, name)):
                        truth[category, name, question] = answer
    return truth


def _read_pairs(path: str) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{path}: every line must be a question, a tab and an answer")
    return [(question, answer) for question, answer in rows]


def convert(truth: dict, answers: list[dict]) -> dict[str, list[str]]:
    """Returns the official result lines per category, in answer order."""
    lines = defaultdict(list)
    for answer in answers:
        category, *_, image = answer["question_id"].split("/")
        name = image.split(".")[0] + ".txt"
        question = answer["prompt"].replace(WORD_PROMPT, "").strip()
        if YES_NO_PROMPT not in question:
            question = f"{question} {YES_NO_PROMPT}"
        if (category, name, question) not in truth:
            question = question.replace(f" {YES_NO_PROMPT}", f"  {YES_NO_PROMPT}")
        if (category, name, question) not in truth:
            raise ValueError(f"no ground truth for {answer['question_id']}: {question!r}")
        row = (name, question, truth[category, name, question], answer["text"])
        lines[category].append("\t".join(row))
    return dict(lines)


def parse_yes_no(text: str) -> str:
    """Returns `yes`, `no` or `other`, reading the first four characters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def right_pairs(lines: list[str]) -> list[tuple[bool, bool]]:
    """Whether the two answers about each image are right."""
    rows = [line.split("\t") for line in lines]
    right = [parse_yes_no(answer) == truth.lower() for _, _, truth, answer in rows]
    return list(zip(right[::2], right[1::2], strict=True))


def task_score(lines: list[str]) -> float:
    """Returns accuracy plus the share of images with both answers right, in percent each."""
    pairs = right_pairs(lines)
    right = [answer for pair in pairs for answer in pair]
    accuracy = sum(right) / len(right)
    accuracy_plus = sum(first and second for first, second in pairs) / len(pairs)
    return accuracy * 100 + accuracy_plus * 100


def evaluate(lines: dict[str, list[str]]) -> dict:
    """Returns the scores of all categories present, their totals, and the share of the maximum."""
    groups = {
        group: {task: task_score(lines[task]) for task in tasks if lines.get(task)}
        for group, tasks in TASKS.items()
    }
    perception = groups["Perception"] or groups["Cognition"]
    return {
        "score": sum(perception.values()),
        "percent": 100 * sum(perception.values()) / (MAX_TASK_SCORE * max(len(perception), 1)),
        "count": sum(len(rows) for rows in lines.values()),
        "groups": groups,
    }


def report(result: dict) -> str:
    text = ""
    for group, scores in result["groups"].items():
        text += f"=========== {group} ===========\ntotal score: {sum(scores.values())} \n\n"
        text += "".join(f"\t {task}  score: {score}\n" for task, score in scores.items()) + "\n\n"
    return text


def write_results(lines: dict[str, list[str]], folder: str) -> None:
    """Writes one `<category>.txt` per category, the input of the official calculation."""
    os.makedirs(folder, exist_ok=True)
    for category, rows in lines.items():
        with open(os.path.join(folder, f"{category}.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{row}\n" for row in rows)


def read_results(folder: str) -> dict[str, list[str]]:
    """Returns the result lines of every category that has a file in `folder`."""
    lines = {}
    for task in sum(TASKS.values(), []):
        path = os.path.join(folder, f"{task}.txt")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines[task] = file.read().splitlines()
    return lines


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=".", help=f"holds {GROUND_TRUTH_DIR}/")
    parser.add_argument("--result-file", help="answers of the model")
    parser.add_argument("--output-dir", help="where the official result files go")
    parser.add_argument("--results-dir", help="score official result files instead of answers")
    args = parser.parse_args()
    if bool(args.results_dir) == bool(args.result_file):
        parser.error("give either --result-file or --results-dir")
    if args.results_dir:
        lines = read_results(args.results_dir)
    else:
        answers = read_answers(args.result_file, ("question_id", "prompt", "text"))
        lines = convert(read_ground_truth(args.data_dir), answers)
    if args.output_dir:
        write_results(lines, args.output_dir)
    print(report(evaluate(lines)), end="")


if __name__ == "__main__":
    main()
