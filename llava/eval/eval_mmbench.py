"""MMBench: accuracy on a table that has an answer column (the development split).

python -m llava.eval.eval_mmbench --annotation-file mmbench_dev.tsv --result-file A.jsonl

A question asked in several rounds with rotated options (`--all-rounds`) counts only when every
round is right. The official server reads long answers with a language model; here an answer
must name the letter or repeat the option.
"""

from collections import defaultdict

from llava.eval.scorer_cli import run_scorer
from llava.eval.tasks import as_int, option_letter, read_table


def read_rows(path: str) -> list[dict]:
    return read_table(path, ("index", "answer"))


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


def main():
    fields = ("question_id", "text", "options", "option_char")
    run_scorer(__doc__, read_rows, evaluate, report, fields)


if __name__ == "__main__":
    main()
