"""Answers meet their questions by key: every answer counts once, and what does not fit is named.

Positions in files say nothing: files are sorted, shuffled, cut and concatenated on their way.
"""

import sys
from collections.abc import Callable, Collection, Hashable, Mapping

from llava.eval.files.records import as_int


def question_id(record: dict) -> int | str:
    """The identifier of a record; 7 and "7" are the same one."""
    return as_int(record["question_id"])


def by_id(records: list[dict]) -> dict[int | str, dict]:
    """Returns questions or annotations by identifier; ValueError when two have the same."""
    found = {}
    for record in records:
        if found.setdefault(question_id(record), record) is not record:
            raise ValueError(
                f"{source(records)}: there are two questions {record['question_id']!r}"
            )
    return found


def source(records: list[dict]) -> str:
    """The file that records were read from, for messages."""
    return getattr(records, "path", "the answers")


def unique(
    answers: list[dict], key: Callable[[dict], Hashable] = question_id
) -> dict[Hashable, dict]:
    """Returns the answers by key; one that stands there twice counts once.

    key: what identifies a question in its answer
    Raises ValueError when two answers to one question differ, or one has no key.
    """
    found = {}
    for answer in answers:
        try:
            name = key(answer)
        except KeyError as error:
            where = f"the answer to question {answer.get('question_id')!r}"
            raise ValueError(f"{source(answers)}: {where} has no field {error}") from error
        except ValueError as error:
            where = f"the answer to question {answer.get('question_id')!r}"
            raise ValueError(f"{source(answers)}: {where}: {error}") from error
        first = found.setdefault(name, answer)
        if first["text"] != answer["text"]:
            raise ValueError(
                f"{source(answers)}: question {answer.get('question_id', name)!r} has two answers, "
                f"{first['text']!r} and {answer['text']!r}"
            )
    return found


def texts_by_id(answers: list[dict]) -> dict[int | str, str]:
    """Returns the answers' texts by question id; ValueError when two to one question differ."""
    return {key: answer["text"] for key, answer in unique(answers).items()}


def texts_to(questions: list[dict], texts: Mapping) -> list[str | None]:
    """Returns the texts in the order of the questions, None for one that has no answer.

    texts: by question id
    Raises ValueError when an answer belongs to none.
    """
    texts = keyed(texts)
    if strays := texts.keys() - set(map(question_id, questions)):
        raise ValueError(
            f"{len(strays)} answers belong to no question of {source(questions)}, such as that to "
            f"question {min(strays, key=str)!r}"
        )
    return [texts.get(question_id(question)) for question in questions]


def keyed(mapping: Mapping) -> dict:
    """Returns a mapping from identifiers with both kinds of them made one.

    Raises ValueError when two entries become the same.
    """
    found = {as_int(key): value for key, value in mapping.items()}
    if len(found) < len(mapping):
        raise ValueError(f"{len(mapping)} entries have only {len(found)} different identifiers")
    return found


def check_known(answers: list[dict], known: Collection, where: str) -> None:
    """Raises ValueError unless every answer belongs to a question; where: what holds those."""
    if strays := [a["question_id"] for a in answers if question_id(a) not in known]:
        raise ValueError(
            f"{source(answers)}: question {strays[0]!r}{and_others(len(strays))} is not in {where}"
        )


def check_asked(heads: list[dict], answers: list[dict], where: str) -> None:
    """Raises ValueError unless there is an answer to every question, and to no other; in any order.
    A question may have been asked in other words as well (with its options rotated).

    heads: fields that identify the line of an answer, per question, `question_id` first
    where: the file of the questions
    """
    names = names_of(heads)
    asked, given = {_head(h, names) for h in heads}, {_head(a, names) for a in answers}
    missing = sorted(asked - given, key=str)
    ids = {key[0] for key in asked}
    strays = sorted((key for key in given if key[0] not in ids), key=str)
    if not missing and not strays:
        return
    reasons = [f"no answer to question {missing[0][0]!r}"] if missing else []
    reasons += [f"an answer to question {strays[0][0]!r}, which is not asked"] if strays else []
    in_place = len(asked & given)
    raise ValueError(
        f"{source(answers)}: the answers do not belong to all {len(heads)} questions of {where}: "
        f"there are {len(answers)}, {in_place} of them in place; {', and '.join(reasons)}"
    )


def names_of(heads: list[dict]) -> list[str]:
    """Names of the fields that identify the line of an answer, from those of every question; of one
    that could not be read the id alone is known."""
    return list(max(heads, key=len, default={"question_id": None}))


def _head(record: dict, names: list[str]) -> tuple:
    values = (record.get(name) for name in names)
    return tuple(
        as_int(value) if name == "question_id" else value
        for name, value in zip(names, values, strict=True)
    )


def and_others(count: int) -> str:
    """`, one of 3,` where one of several is named; nothing where it is the only one."""
    return f", one of {count}," if count > 1 else ""


def say_missing(answers: list[dict], asked: Collection, consequence: str) -> None:
    """Prints a line on stderr when questions lack an answer.

    asked:       keys of the questions, as `question_id` gives them
    consequence: what becomes of them, as in "they count as wrong"
    """
    given = {question_id(answer) for answer in answers}
    if missing := [key for key in asked if key not in given]:
        print(
            f"note: {source(answers)}: {len(missing)} of {len(asked)} questions have no answer, "
            f"such as {missing[0]!r}: {consequence}",
            file=sys.stderr,
        )
