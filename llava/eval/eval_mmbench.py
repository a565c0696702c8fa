"""MMBench: accuracy on a table that has an answer column (the development split).

python -m llava.eval.eval_mmbench --annotation-file mmbench_dev.tsv --result-file A.jsonl

A question asked in several rounds with rotated options (`--all-rounds`) counts only when every
round is right. The official server reads long answers with a language model; here an answer
must name the letter or repeat the option.
"""

import argparse
from collections import defaultdict

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import as_int, option_letter, read_jsonl, read_table


def evaluate(rows: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n, "categories": {name: accuracy}}`."""
    rows = {as_int(row["index"]): row for row in rows}
    right = defaultdict(list)
    for answer in answers:
        if answer["question_id"] not in rows:
            raise ValueError(f"the table has no row {answer['question_id']!r}")
        right[answer["question_id"]].append(_is_right(answer, rows[answer["question_id"]]))
    categories = defaultdict(list)
    for key, rounds in right.items():
        categories[rows[key].get("category")].append(all(rounds))
    return {
        "score": _percent([all(rounds) for rounds in right.values()]),
        "count": len(right),
        "categories": {str(name): _percent(v) for name, v in sorted(categories.items(), key=str)},
    }


def _is_right(answer: dict, row: dict) -> bool:
    shown = option_letter(answer["text"], answer["options"])
    if shown is None:
        return False
    return answer["option_char"][ord(shown) - ord("A")] == row["answer"]


def _percent(right: list[bool]) -> float:
    return 100 * sum(right) / len(right) if right else 0.0


def report(result: dict) -> str:
    lines = [f"  {name}: {score:.2f}%" for name, score in result["categories"].items()]
    head = f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%"
    return "\n".join([head, "Accuracy / category:", *lines]) + "\n"


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True)
    parser.add_argument("--result-file", required=True)
    args = parser.parse_args()
    rows = read_table(args.annotation_file, ("index", "answer"))
    answers = read_jsonl(args.result_file, ("question_id", "text", "options", "option_char"))
    print(report(evaluate(rows, answers)), end="")


if __name__ == "__main__":
    main()
