"""MME: yes/no questions in pairs per image; perception (max 2000) and cognition (max 800).

python -m llava.eval.benchmarks.mme --data-dir MME --result-file A.jsonl \
    --output-dir eval_tool/answers/X
python -m llava.eval.benchmarks.mme --results-dir eval_tool/answers/X
"""

import os
import sys
from collections import defaultdict
from collections.abc import Iterable

from llava.errors import errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import source, unique
from llava.eval.files.records import Records, complete, read_text
from llava.eval.scoring.units import Unit, Units
from llava.program_parser import ProgramParser

TASKS = {
    "Perception": (
        "existence count position color posters celebrity scene landmark artwork OCR"
    ).split(),
    "Cognition": (
        "commonsense_reasoning numerical_calculation text_translation code_reasoning"
    ).split(),
}
GROUND_TRUTH_DIR = "MME_Benchmark_release_version"
TRUTH = f"MME/{GROUND_TRUTH_DIR}"
WORD_PROMPT = "Answer the question using a single word or phrase."
YES_NO_PROMPT = "Please answer yes or no."


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
    lines = read_text(path).splitlines()
    rows = [line.strip().split("\t") for line in lines if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{path}: every line must be a question, a tab and an answer")
    return [(question, answer.strip()) for question, answer in rows]


def convert(truth: dict, answers: list[dict]) -> dict[str, list[str]]:
    """Returns the official result lines per category, the answers about an image together.

    Raises ValueError when an answer belongs to no question, two to one question differ, or only one
    of the questions about an image was answered.
    """
    questions = {(*key[:2], _one_line(key[2])): key for key in truth}
    found: dict[tuple[str, str], list[tuple]] = {}
    for key, answer in unique(answers, _question_key).items():
        if key not in questions:
            raise ValueError(
                f"{source(answers)}: no ground truth for {answer['question_id']}: {key[2]!r}"
            )
        found.setdefault(key[:2], []).append((questions[key], _one_line(answer["text"])))
    _check_pairs(truth, found, source(answers))
    lines = defaultdict(list)
    for (category, name), pairs in found.items():
        rows = ((name, key[2], truth[key], text) for key, text in pairs)
        lines[category] += ["\t".join(row) for row in rows]
    return dict(lines)


def _question_key(answer: dict) -> tuple[str, str, str]:
    """Category, file name and question, its spaces made single, as in the index of `convert`."""
    category, _, image = str(answer["question_id"]).rpartition("/")
    category = category.split("/")[0]
    question = answer["prompt"].replace(WORD_PROMPT, "").strip()
    if YES_NO_PROMPT not in question:
        question = f"{question} {YES_NO_PROMPT}"
    return category, os.path.splitext(image)[0] + ".txt", _one_line(question)


def _one_line(text: str) -> str:
    """A text with single spaces only: result files keep a line per answer, with tabs in between."""
    return " ".join(text.split())


def _check_pairs(truth: dict, found: dict, where: str) -> None:
    for key in truth:
        if key[:2] in found and key not in {asked for asked, _ in found[key[:2]]}:
            raise ValueError(
                f"{where}: no answer to {key[2]!r} about {key[0]}/{key[1]}, whose other question "
                "was answered: MME scores both together"
            )


def parse_yes_no(text: str) -> str:
    """Returns `yes`, `no` or `other`, reading the first four characters."""
    text = text.strip().lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def image_units(task: str, lines: list[str], images: dict | None = None) -> list[Unit]:
    """Returns the two answers about each image as one unit, images in the order of the lines: it
    counts half for being right and half for both being right; counts of right answers and of such
    pairs.

    images: names of the images by task and file
    Raises ValueError when an image has one answer only, or two that differ to one question.
    """
    said: dict[str, dict[tuple[str, str], str]] = {}
    for line in lines:
        name, question, truth, answer = line.split("\t", 3)
        first = said.setdefault(name, {}).setdefault((question, truth), answer)
        if first != answer:
            raise ValueError(
                f"{task}: {question!r} about {name} has two answers, {first!r} and {answer!r}"
            )
    found = []
    for name, answers in said.items():
        if len(answers) != 2:
            raise ValueError(f"{task}: {name} has {len(answers)} of its 2 answers")
        answers = dict(sorted(answers.items()))
        right = sum(parse_yes_no(text) == truth.lower() for (_, truth), text in answers.items())
        both, texts = right == 2, tuple(answers.values())
        image = (images or {}).get((task, name)) or f"{task}/{name}"
        counts = right, both
        found.append(Unit((task, name), (right / 2 + both) / 2, texts, image, (task,), 2, counts))
    return found


def task_score(units: Units) -> float:
    """Returns accuracy plus the share of images with both answers right, in percent each."""
    _, asked, right, both = units.sums
    return right / asked * 100 + both / (asked / 2) * 100


def units(lines: dict[str, list[str]], images: dict | None = None) -> Units:
    """Returns the pairs of answers of all categories present.

    The score is that of perception; where there are tasks of cognition only, it is theirs and
    `metric` says so. The details hold the scores of both, task by task.
    """
    known = sum(TASKS.values(), [])
    if strange := [task for task in lines if task not in known]:
        raise ValueError(f"MME has no task {strange[0]!r}, only {', '.join(known)}")
    found = {task: image_units(task, lines[task], images) for task in known if lines.get(task)}
    groups = {
        group: {task: task_score(Units(found[task])) for task in tasks if task in found}
        for group, tasks in TASKS.items()
    }
    group = "Perception" if groups["Perception"] else "Cognition"
    scored = sum((found[task] for task in groups[group]), [])
    return Units(
        scored,
        macro=True,
        details={
            "score": sum(groups[group].values()),
            "metric": group.lower(),
            "count": 2 * sum(map(len, found.values())),
            "groups": groups,
        },
    )


def report(units: Units) -> str:
    text = ""
    for group, scores in units.details["groups"].items():
        text += f"=========== {group} ===========\ntotal score: {sum(scores.values())} \n\n"
        text += "".join(f"\t {task}  score: {score}\n" for task, score in scores.items()) + "\n\n"
    return text


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    lines = convert(read_ground_truth(os.path.join(data_dir, "MME")), answers)
    records = complete(asked, ("question_id",))
    return units(lines, {_file_of(r["question_id"]): r.get("image") for r in records})


def _file_of(question_id: str) -> tuple[str, str]:
    """The task of a question, and how its result lines call the image."""
    task, *_, image = str(question_id).split("/")
    return task, f"{os.path.splitext(image)[0]}.txt"


BENCHMARKS = (
    Benchmark(
        "mme",
        "MME/llava_mme.jsonl",
        TRUTH,
        "perception",
        {
            "MME/llava_": BUNDLE,
            "MME/": (
                "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/"
                "Evaluation (the authors send the images)"
            ),
        },
        read_units,
        report,
        truth=(TRUTH,),
        joint=lambda line: line["question_id"],
        unit_of=lambda line: _question_key(line)[:2],
    ),
)


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
            lines[task] = _records(read_text(path).split("\n"), path)
    return lines


def _records(lines: Iterable[str], path: str) -> list[str]:
    """Result lines; one that is no `file, question, truth, answer` goes on with the last answer."""
    records = []
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\n").split("\t")
        if len(cells) > 3 and cells[2].strip().lower() in ("yes", "no"):
            records.append(line.rstrip("\n"))
        elif records:
            records[-1] += " " + line.rstrip("\n")
        elif line.strip():
            raise ValueError(f"{path}, line {number}: no file, question, Yes or No, and answer")
    return records


def _say_missing(truth: dict, lines: dict[str, list[str]], path: str) -> None:
    answered = {(task, row.split("\t")[0]) for task, rows in lines.items() for row in rows}
    images = {key[:2] for key in truth}
    if missing := sorted(images - answered):
        print(
            f"note: {path}: {len(missing)} of {len(images)} images have no answer, such as "
            f"{'/'.join(missing[0])}: the scores are those of the others",
            file=sys.stderr,
        )


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--data-dir", default=".", help=f"folder that holds {GROUND_TRUTH_DIR}/")
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
        truth = read_ground_truth(args.data_dir)
        lines = convert(truth, answers)
        _say_missing(truth, lines, args.result_file)
    if missing := [task for task in sum(TASKS.values(), []) if not lines.get(task)]:
        print(f"note: the totals are without {', '.join(missing)}: no answers", file=sys.stderr)
    if args.output_dir:
        write_results(lines, args.output_dir)
    print(report(units(lines)), end="")


if __name__ == "__main__":
    main()
