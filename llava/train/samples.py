"""Training data as files: reading them, and finding their mistakes before the first step.

No image is opened and hardly any text tokenised: 665,000 conversations take seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.progress import progress

logger = logging.getLogger(__name__)

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
#: keys of other data formats that bring pictures along, which would be ignored without a word
OTHER_IMAGE_KEYS = frozenset(
    "images image_path image_paths image_file img imgs picture video videos".split()
)
#: so many mistakes are written out
SHOWN = 5
#: from so many files on, a folder is listed instead of asked for each of them
LISTED = 100


def read_rows(path: str) -> list:
    """The entries of a JSON list, or of JSON lines; a byte order mark is skipped.

    Raises ValueError, with the line where there is one, for anything else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a JSON list of samples, or one per line")
    first, _, rest = text.strip().partition("\n")
    try:
        lines = path.endswith(".jsonl") or (rest and isinstance(json.loads(first), dict))
    except (ValueError, RecursionError):
        lines = False
    try:
        if lines and not text.lstrip().startswith("["):
            return read_lines(text, path)
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or a number of 5000 digits
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, expected a list of samples")
    if not rows:
        raise ValueError(f"{path} holds an empty list: expected samples")
    return rows


def read_lines(text: str, path: str) -> list:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


class Findings:
    """Mistakes and oddities in the samples of one file, each with number and id."""

    def __init__(self, path: str):
        self.path = path
        self.mistakes: list[tuple[int, str]] = []  # (number of the sample, sentence)
        self.notes: dict[str, list] = {}  # what -> [samples, the first one]

    def mistake(self, number: int, sample, what: str) -> None:
        self.mistakes.append((number, f"{name(number, sample)}: {what}"))

    def note(self, number: int, sample, what: str) -> None:
        self.notes.setdefault(what, [0, name(number, sample)])[0] += 1

    def report(self, total: int, go_on: bool = False) -> None:
        """Warns of what is odd (the first process does) and raises ValueError for mistakes, which
        are warned of as well if the caller can `go_on` without those samples."""
        first_process = os.environ.get("RANK", "0") == "0"
        for what, (count, first) in self.notes.items():
            if first_process:
                logger.warning("%s: %s: %d of %d, first %s", self.path, what, count, total, first)
        if not self.mistakes:
            return
        count = len({number for number, _ in self.mistakes})
        shown = [f"\n  {text}" for _, text in self.mistakes[:SHOWN]]
        more = len(self.mistakes) - SHOWN
        shown += [f"\n  and {more} more"] if more > 0 else []
        text = f"{self.path}: {count} of {total} samples cannot be used:{''.join(shown)}"
        if not go_on:
            raise ValueError(text)
        if count == total:
            raise ValueError(f"{text}\nnone is left")
        if first_process:
            logger.warning("%s\nthey are left out", text)


def name(number: int, sample) -> str:
    known = isinstance(sample, dict) and "id" in sample
    return f"sample {number} (id {sample['id']!r})" if known else f"sample {number}"


def check_conversations(
    samples: list,
    numbers: list[int],
    conv: Conversation,
    findings: Findings,
    several: bool = False,
    reserved: Sequence[str] = (),
) -> None:
    """Notes what is wrong with LLaVA conversations, and brings them into one form, in place.

    numbers: place of each sample in its file; several: whether a sample may have several images;
    reserved: what stands for images behind the tokenizer, and may not be written in a text.
    One form: roles "human", "gpt" and (a first turn) "system", texts for values, no key `image`, or
    the path of one, or a list of several.
    """
    alternate = conv.sep_style != SeparatorStyle.SINGLE
    plain = conv.sep_style == SeparatorStyle.PLAIN
    asks = conv.sep_style == SeparatorStyle.LLAMA_2
    for number, sample in zip(numbers, progress(samples, "conversations", "samples"), strict=True):
        problem = settle_image(sample, several) or settle_messages(sample)
        if problem is None:
            problem = check_marks(sample, number, findings, plain, several)
        if problem is None and reserved:
            problem = check_texts(sample["conversations"], reserved)
        if problem is None:
            messages = sample["conversations"]
            problem = check_turns(messages, alternate, plain, asks)
            for message in messages:
                if message["from"] == "gpt" and not message["value"].strip():
                    findings.note(number, sample, "samples with an empty answer")
                    break
            if messages[0]["from"] == "gpt":
                findings.note(number, sample, "samples begin with an answer, which is dropped")
            elif messages[0]["from"] == "system":
                findings.note(
                    number, sample, "samples begin with a system turn, used as the system prompt"
                )
        if problem is not None:
            findings.mistake(number, sample, problem)


def settle_image(sample, several: bool = False) -> str | None:
    """Makes `image` one path, a list of several, or no key at all; says what is wrong."""
    if not isinstance(sample, dict):
        return f"is a {type(sample).__name__}, expected an object"
    if other := OTHER_IMAGE_KEYS & sample.keys():
        return f"key {sorted(other)[0]!r} is not known, the picture's path belongs into 'image'"
    if "image" not in sample:
        return None
    image = sample["image"]
    if isinstance(image, list) and len(image) == 1:
        image = sample["image"] = image[0]
    if image is None or image == []:
        del sample["image"]
    elif isinstance(image, list) and several:
        if odd := [path for path in image if not isinstance(path, str) or not path]:
            return f"image holds {odd[0]!r}, expected paths"
    elif isinstance(image, list):
        return f"has {len(image)} images, but training takes one per sample for this model"
    elif not isinstance(image, str) or not image:
        return f"image is {image!r}, expected a path"
    return None


def settle_messages(sample: dict) -> str | None:
    """Makes every message {"from": one of our roles, "value": text}; says what is wrong.

    A key `system` beside the conversation becomes a system turn in front of it.
    """
    messages = sample.get("conversations")
    if messages is None:
        return f"has no conversations, only {', '.join(map(str, sample)) or 'nothing'}"
    if not isinstance(messages, list) or not messages:
        return f"conversations is {messages!r}, expected a list of messages"
    if system := sample.get("system"):
        messages.insert(0, {"from": "system", "value": system})
        del sample["system"]
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {i} is {message!r}, expected an object"
        if "from" not in message and "role" in message:
            message["from"] = message.pop("role")
        if "value" not in message and "content" in message:
            message["value"] = message.pop("content")
        if "from" not in message or "value" not in message:
            return f"message {i} needs the keys 'from' and 'value', it has {sorted(message)}"
        role, value = message["from"], message["value"]
        if role not in ("human", "gpt"):
            if not isinstance(role, str) or role not in ROLES:
                return f"message {i} is from {role!r}, expected human or gpt (user, assistant)"
            message["from"] = ROLES[role]
        if not isinstance(value, str):
            if not is_number(value):
                return f"message {i} has the value {value!r}, expected text"
            message["value"] = str(value)
        elif not is_unicode(value):
            return f"message {i} holds half of a character (a lone surrogate): {value[:60]!a}"
    return None


def is_number(value) -> bool:
    """Whether this is a finite number, and no larger than a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may escape half of a pair of surrogates."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def check_marks(
    sample: dict, number: int, findings: Findings, plain: bool, several: bool = False
) -> str | None:
    """Whether images and `<image>` go together."""
    marked = [m["from"] for m in sample["conversations"] if DEFAULT_IMAGE_TOKEN in m["value"]]
    if "image" not in sample:
        if plain:
            return "has no image, which the plain template needs"
        if marked:
            findings.note(
                number, sample, f"samples without an image hold {DEFAULT_IMAGE_TOKEN}, read as text"
            )
        return None
    if not marked:
        return f"has an image, but no message holds {DEFAULT_IMAGE_TOKEN}"
    if len(marked) > 1 and not several:
        return f"{len(marked)} messages hold {DEFAULT_IMAGE_TOKEN}, but a sample has one image"
    if set(marked) != {"human"} and (several or marked == ["gpt"]):
        return f"{DEFAULT_IMAGE_TOKEN} stands in an answer: it belongs into the question"
    if several:
        count = sum(m["value"].count(DEFAULT_IMAGE_TOKEN) for m in sample["conversations"])
        images = len(paths_of(sample))
        if count != images:
            return (
                f"has {images} image{'s' * (images > 1)}, but its messages hold "
                f"{DEFAULT_IMAGE_TOKEN} {count} times: write it once for each"
            )
    return None


def paths_of(sample: dict) -> list[str]:
    """The images of a sample, as it names them."""
    image = sample.get("image", [])
    return [image] if isinstance(image, str) else image


def check_texts(messages: list[dict], reserved: Sequence[str]) -> str | None:
    """Whether no text holds what the tokenizer takes for a part of an image."""
    for i, message in enumerate(messages):
        if odd := [mark for mark in reserved if mark in message["value"]]:
            return f"message {i} holds {odd[0]}: write {DEFAULT_IMAGE_TOKEN} where an image goes"
    return None


def check_turns(
    messages: list[dict], alternate: bool, plain: bool, asks: bool = False
) -> str | None:
    """Whether the turns come in an order that the template can hold; asks: it begins with a
    question that is not empty."""
    roles = [message["from"] for message in messages]
    if "gpt" not in roles:
        return "has no answer"
    if "system" in roles[1:]:
        return f"message {roles.index('system', 1)} is from 'system', which only the first may be"
    if plain and (len(roles) != 2 or DEFAULT_IMAGE_TOKEN not in messages[0]["value"]):
        return (
            f"the plain template needs two messages, the first with {DEFAULT_IMAGE_TOKEN}; "
            f"it has {len(roles)}, the first {messages[0]['value'][:60]!r}"
        )
    start = int(roles[0] != "human")
    for i in range(start, len(roles) if alternate else 0):
        expected = ("human", "gpt")[(i - start) % 2]
        if roles[i] != expected:
            return (
                f"message {i} is from {roles[i]!r}, expected {expected!r}: "
                "human and gpt must alternate"
            )
    if "gpt" not in roles[start:]:
        return "has no answer behind a question"
    if not any(message["value"].strip() for message in messages):
        return "holds no words"
    if asks and not messages[start]["value"]:
        return "begins with an empty question, for which this template has no place"
    return None


def missing_files(paths: Iterable[str]) -> set[str]:
    """Those of `paths` that are no files. Folders with many of them are listed once."""
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        folder, file = os.path.split(path)
        folders[folder][file] = path
    missing = set()
    for folder, files in folders.items():
        names = files.keys()
        if len(files) >= LISTED and os.path.isdir(folder or "."):
            names = names - {
                entry.name for entry in os.scandir(folder or ".") if not entry.is_dir()
            }
        missing.update(files[name] for name in names if not os.path.isfile(files[name]))
    return missing
