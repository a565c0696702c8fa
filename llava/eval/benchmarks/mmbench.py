"""MMBench: circular and plain accuracy on a table that has an answer column (development split).

python -m llava.eval.benchmarks.mmbench --annotation-file mmbench_dev.tsv --result-file A.jsonl

The table asks every question with each rotation of its options: row `index + k * 10**6` is the k-th
rotation of row `index`. *Circular accuracy*, the published number, counts a question when all its
rotations are right; *plain accuracy* counts answers. A table without rotations gets them by
`--all-rounds` of the answering program; without them there is no circular accuracy. The official
server reads long answers with a language model; here an answer must name a letter or an option.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from llava.eval.answering.questions import Question
from llava.eval.benchmarks.benchmark import Benchmark, Upload
from llava.eval.files.matching import and_others, check_known, question_id, source, unique
from llava.eval.files.records import Records, as_int, read_table
from llava.eval.files.writing import write_xlsx
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.options import LETTER_ONLY, option_letter
from llava.eval.scoring.units import COUNTS, Unit, Units

CIRCULAR, PLAIN = "circular accuracy", "plain accuracy"
OPTIONS = "ABCD"
#: of the upload, whose `prediction` comes behind the options
COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "split")
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6
# Row `index + k * 10**6` asks question `index` with its options rotated k times.
ROTATION = 10**6
LETTER_PROMPT = {
    "en": LETTER_ONLY,
    "cn": "请直接回答选项字母。",
}


def read_mmbench(path: str) -> Records:
    """Returns the rows of a table, each with its picture."""
    return _with_pictures(read_table(path))


def _with_pictures(rows: Records) -> Records:
    """Where a rotation names the row that has its picture (`image` is an index), it gets that."""
    pictures = {row["index"]: row.get("image") for row in rows}
    for row in rows:
        if row.get("image") in pictures:
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


def _question_of_line(line: dict) -> int | str:
    return mmbench_question({"index": line["question_id"]})


@dataclass
class Circle:
    """One question with the answers to its rotations.

    category:    what the table calls it
    num_rows:    rows of the table that ask it
    num_options: of each row; where there is one row only, it must be asked with all rotations
    answers:     (text, whether it is right) by row and order of the options
    """

    category: str | None
    num_rows: int
    num_options: int
    answers: dict[tuple, tuple[str, bool]] = field(default_factory=dict)

    @property
    def rows(self) -> set[int | str]:
        return {index for index, _ in self.answers}

    @property
    def right(self) -> list[bool]:
        return [right for _, right in self.answers.values()]

    @property
    def complete(self) -> bool:
        """Whether it was asked with all its rotations."""
        needed = self.num_rows if self.num_rows > 1 else self.num_options
        return len(self.rows) == self.num_rows and len(self.answers) >= needed


def read_rows(path: str) -> Records:
    """The rows of a table of which only the right answers are needed."""
    return with_answers(_with_pictures(read_table(path, ("index", "answer"))))


def with_answers(rows: Records) -> Records:
    """The rows themselves. Raises ValueError unless the table says what is right in each."""
    if hidden := [row["index"] for row in rows if row.get("answer") is None]:
        raise ValueError(
            f"{rows.path}: row {hidden[0]}{and_others(len(hidden))} has no right answer: only the "
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
    for rotation, answer in unique(answers, _rotation).items():
        index = rotation[0]
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
        circle.answers[rotation] = answer["text"], _is_right(answer, row)
    return found


def _rotation(answer: dict) -> tuple:
    """The row that an answer belongs to, and in which order it saw the options of that row."""
    return question_id(answer), tuple(answer["option_char"])


def _is_right(answer: dict, row: dict) -> bool:
    shown = option_letter(answer["text"], answer["options"])
    if shown is None:
        return False
    return answer["option_char"][ord(shown) - ord("A")] == row["answer"].strip().upper()


def units(rows: list[dict], answers: list[dict]) -> Units:
    """Returns whether every question was answered right, with counts of its right answers and of
    all of them: in all its rotations, if every question was asked with all of them; otherwise the
    plain share of right answers.

    Details: `metric` says which; `circular` and `plain` accuracy in percent, `count` of questions,
    `rows` answered, and `open`, a question that was not asked with every rotation, if there is one.
    Raises ValueError as `circles` does.
    """
    found = circles(rows, answers)
    pictures = {as_int(row["index"]): row.get("image") for row in rows}
    left_open = next((key for key, circle in found.items() if not circle.complete), None)
    circular, units = bool(found) and left_open is None, []
    for key, circle in found.items():
        right, asked = circle.right, len(circle.answers)
        value, weight = (all(right), 1) if circular else (sum(right) / asked, asked)
        said = tuple(circle.answers[rotation][0] for rotation in sorted(circle.answers, key=str))
        image, groups = pictures[next(iter(circle.answers))[0]], (str(circle.category),)
        units.append(Unit(key, value, said, image, groups, weight, (sum(right), asked)))
    scored = Units(units)
    right, num_answers = scored.sums[COUNTS:] if found else (0, 0)
    scored.details = {
        "metric": CIRCULAR if circular else PLAIN,
        "circular": scored.percent if circular else None,
        "plain": 100 * right / num_answers if num_answers else 0.0,
        "count": len(found),
        "rows": num_answers,
        "open": left_open,
    }
    return scored


def report(units: Units) -> str:
    details, circular = units.details, "not known: there are no answers"
    if details["open"] is not None:
        circular = f"not known: question {details['open']} was not asked with all rotations"
    if details["circular"] is not None:
        circular = f"{details['circular']:.2f}%"
    lines = [f"  {name}: {part.percent:.2f}%" for name, part in units.by_group().items()]
    return "\n".join(
        [
            f"Samples: {details['count']} questions, {details['rows']} answers",
            f"Circular accuracy: {circular}",
            f"Plain accuracy: {details['plain']:.2f}%",
            f"{details['metric'].capitalize()} / category:",
            *lines,
            "",
        ]
    )


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    return units(with_answers(asked), answers)


def upload(rows: list[dict], answers: list[dict]) -> list[list]:
    """Returns the header and one list of cells per row.

    The last answer to a row counts, of those to its options in the order of the table: the server
    knows no other rotation of a row. Raises ValueError when an answer belongs to no row.
    """
    check_known(answers, {as_int(row["index"]) for row in rows}, source(rows))
    predictions = {question_id(a): a["text"] for a in answers if _in_table_order(a)}
    names = [name for name in rows[0] if name not in DROPPED] if rows else COLUMNS
    names = [*names[:PREDICTION_COLUMN], "prediction", *names[PREDICTION_COLUMN:]]
    table = [names]
    for row in rows:
        index = as_int(row["index"])
        cells = row | {"index": index, "prediction": predictions.get(index)}
        table.append([cells[name] for name in names])
    return table


def _in_table_order(answer: dict) -> bool:
    letters = list(answer.get("option_char", ""))
    return letters == sorted(letters)


def write_upload(data_dir: str, asked: Records, answers: list[dict], path: str) -> None:
    write_xlsx(upload(asked, answers), path)


def _benchmark(name: str, table: str, lang: str) -> Benchmark:
    return Benchmark(
        name,
        f"{name}/{table}",
        None,
        CIRCULAR,
        {f"{name}/": f"https://download.openmmlab.com/mmclassification/datasets/mmbench/{table}"},
        read_units,
        report,
        read=read_mmbench,
        to_questions=partial(mmbench_questions, single_pred_prompt=True, lang=lang),
        program=("model_vqa_mmbench", "--single-pred-prompt", "--lang", lang),
        together=mmbench_question,
        joint=_question_of_line,
        unit_of=_question_of_line,
        upload=Upload(
            ".xlsx", write_upload, "https://mmbench.opencompass.org.cn/mmbench-submission"
        ),
    )


BENCHMARKS = (
    _benchmark("mmbench", "mmbench_dev_20230712.tsv", "en"),
    _benchmark("mmbench_cn", "mmbench_dev_cn_20231003.tsv", "cn"),
)


def ids(rows: list[dict]) -> list[int | str]:
    return [as_int(row["index"]) for row in rows]


def main():
    fields = ("question_id", "text", "options", "option_char")
    run_scorer(__doc__, read_rows, units, report, ids, fields)


if __name__ == "__main__":
    main()
