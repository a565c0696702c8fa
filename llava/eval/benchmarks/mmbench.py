"""MMBench: circular and plain accuracy on a table that has an answer column (development split).

python -m llava.eval.benchmarks.mmbench --annotation-file mmbench_dev.tsv --result-file A.jsonl

The table asks every question with each rotation of its options: row `index + k * 10**6` is the k-th
rotation of row `index`. *Circular accuracy*, the published number, counts a question when all its
rotations are right; *plain accuracy* counts answers. A table without rotations gets them by
`--all-rounds` of the answering program; without them there is no circular accuracy. The official
server reads long answers with a language model; here an answer must name a letter or an option.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava.eval.answering.questions import Question
from llava.eval.files.matching import and_others, question_id, source, unique
from llava.eval.files.records import Records, as_int, read_table
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.options import LETTER_ONLY, option_letter

CIRCULAR, PLAIN = "circular accuracy", "plain accuracy"
OPTIONS = "ABCD"
# Row `index + k * 10**6` asks question `index` with its options rotated k times.
ROTATION = 10**6
LETTER_PROMPT = {
    "en": LETTER_ONLY,
    "cn": "请直接回答选项字母。",
}


def read_mmbench(path: str) -> Records:
    """Returns the rows of an MMBench table; where a rotation names the row that has its picture
    (`image` is an index), it gets that picture."""
    rows = read_table(path)
    pictures = {row["index"]: row["image"] for row in rows}
    for row in rows:
        if row["image"] in pictures:
            row["image"] = pictures[row["image"]]
    return rows


def mmbench_questions(
    row: dict, all_rounds: bool = False, single_pred_prompt: bool = False, lang: str = "en"
) -> Iterator[Question]:
    """MMBench: one question per row, or one per rotation of its options (circular evaluation)."""
    letters = list(_present_options(row))
    options = [row[letter] for letter in letters]
    question = "\n".join(part for part in (row.get("hint"), row["question"] or "") if part)
    suffix = "\n" + LETTER_PROMPT[lang] if single_pred_prompt else ""
    for round_id in range(len(options) if all_rounds else 1):
        shown = _rotated(options, round_id)
        lines = [f"{letter}. {text}" for letter, text in zip(letters, shown, strict=True)]
        prompt = "\n".join([question, *lines])
        head = {"question_id": as_int(row["index"]), "round_id": round_id, "prompt": prompt}
        tail = {"options": shown, "option_char": _rotated(letters, round_id)}
        yield Question(head, prompt + suffix, [row["image"]], tail, base64=True)


def _rotated(items: list, by: int) -> list:
    return items[by:] + items[:by]


def _present_options(row: dict) -> Iterator[str]:
    for letter in OPTIONS:
        if row.get(letter) is None:
            return
        yield letter


def mmbench_question(row: dict) -> int | str:
    """What a row of MMBench's table asks, whichever way its options are rotated."""
    index = as_int(row["index"])
    return index % ROTATION if isinstance(index, int) else index


@dataclass
class Circle:
    """One question with the answers to its rotations.

    num_rows:    rows of the table that ask it
    num_options: of each row; where there is one row only, it must be asked with all rotations
    rows:        those rows that were answered
    right:       whether each answer is right
    """

    category: str | None
    num_rows: int
    num_options: int
    rows: set[int | str] = field(default_factory=set)
    right: list[bool] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        needed = self.num_rows if self.num_rows > 1 else self.num_options
        return len(self.rows) == self.num_rows and len(self.right) >= needed


def read_rows(path: str) -> list[dict]:
    rows = read_table(path, ("index", "answer"))
    if hidden := [row["index"] for row in rows if row["answer"] is None]:
        raise ValueError(
            f"{path}: row {hidden[0]}{and_others(len(hidden))} has no right answer: only the "
            "development split can be scored here"
        )
    return rows


def circles(rows: list[dict], answers: list[dict]) -> dict[int | str, Circle]:
    """Returns the answered questions by the index of their first row.

    Raises ValueError when an answer belongs to no row, or two to the same rotation differ.
    """
    rows_by_index = {as_int(row["index"]): row for row in rows}
    num_rows = Counter(mmbench_question(row) for row in rows)
    found: dict[int | str, Circle] = {}
    for (index, _), answer in unique(answers, _rotation).items():
        if len(answer["options"]) != len(answer["option_char"]):
            raise ValueError(
                f"{source(answers)}: question {answer['question_id']!r} was shown "
                f"{len(answer['options'])} options with {len(answer['option_char'])} letters"
            )
        if index not in rows_by_index:
            raise ValueError(
                f"{source(answers)}: question {answer['question_id']!r} is not in {source(rows)}"
            )
        row = rows_by_index[index]
        key = mmbench_question(row)
        new = Circle(row.get("category"), num_rows[key], len(answer["options"]))
        circle = found.setdefault(key, new)
        circle.rows.add(index)
        circle.right.append(_is_right(answer, row))
    return found


def _rotation(answer: dict) -> tuple:
    """The row that an answer belongs to, and in which order it saw the options of that row."""
    return question_id(answer), tuple(answer["option_char"])


def _is_right(answer: dict, row: dict) -> bool:
    shown = option_letter(answer["text"], answer["options"])
    if shown is None:
        return False
    return answer["option_char"][ord(shown) - ord("A")] == row["answer"].strip().upper()


def is_circular(found: dict[int | str, Circle]) -> bool:
    """True when every question was asked with all its rotations."""
    return bool(found) and all(circle.complete for circle in found.values())


def evaluate(rows: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score", "metric", "circular", "plain", "count", "rows", "categories"}`.

    score:    circular accuracy in percent, or the plain one where `circular` is None; `metric`
              says which
    count:    questions; `rows`: answers to them, with all rotations
    open:     a question that was not asked with every rotation, if there is one
    """
    found = circles(rows, answers)
    circular = is_circular(found)
    counted = defaultdict(list)
    for circle in found.values():
        points = [all(circle.right)] if circular else circle.right
        counted[circle.category] += points
    plain = _percent([right for circle in found.values() for right in circle.right])
    whole = _percent([all(circle.right) for circle in found.values()]) if circular else None
    return {
        "score": whole if circular else plain,
        "metric": CIRCULAR if circular else PLAIN,
        "circular": whole,
        "plain": plain,
        "count": len(found),
        "rows": sum(len(circle.right) for circle in found.values()),
        "open": next((key for key, circle in found.items() if not circle.complete), None),
        "categories": {str(name): _percent(v) for name, v in sorted(counted.items(), key=str)},
    }


def _percent(right: list[bool]) -> float:
    return 100 * sum(right) / len(right) if right else 0.0


def report(result: dict) -> str:
    circular = "not known: there are no answers"
    if result["open"] is not None:
        circular = f"not known: question {result['open']} was not asked with all rotations"
    if result["circular"] is not None:
        circular = f"{result['circular']:.2f}%"
    lines = [f"  {name}: {score:.2f}%" for name, score in result["categories"].items()]
    return "\n".join(
        [
            f"Samples: {result['count']} questions, {result['rows']} answers",
            f"Circular accuracy: {circular}",
            f"Plain accuracy: {result['plain']:.2f}%",
            f"{result['metric'].capitalize()} / category:",
            *lines,
            "",
        ]
    )


def ids(rows: list[dict]) -> list[int | str]:
    return [as_int(row["index"]) for row in rows]


def main():
    fields = ("question_id", "text", "options", "option_char")
    run_scorer(__doc__, read_rows, evaluate, report, ids, fields)


if __name__ == "__main__":
    main()
