"""Checks of the JSON bodies that the page's own script sends. Only what was checked goes on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from urllib.parse import parse_qs

from .uploads import Refused

DEPTH = 32  # of lists and objects inside of each other
LARGEST_INTEGER = 2**53
NAME = re.compile(r"[\w-]{1,64}", re.ASCII)  # of sessions, events and uploads: made up by scripts
#: last part of the path -> what is handed on of a body
FIELDS = {
    "join": ("data", "event_data", "fn_index", "trigger_id", "session_hash"),
    "cancel": ("session_hash", "fn_index", "event_id"),
    "reset": ("event_id",),
}


def checked_event(
    path: str, body: bytes, functions: dict[int, int], uploads: str | None = None
) -> bytes:
    """The body to hand on, with nothing in it but the fields that are known. Raises Refused.

    functions: number of an event's function -> how many values it takes
    uploads:   folder that a file of an event must lie in
    """
    event = read_json(body)
    _check_values(event, uploads)
    fields = FIELDS[path.rstrip("/").rpartition("/")[2]]
    if "data" in fields:
        _check_join(event, functions)
    for name in ("session_hash", "event_id"):
        if name in fields and not is_name(event.get(name)):
            raise Refused(400, "The session or event has no valid name.")
    if "fn_index" in fields and not _is_number(event.get("fn_index"), functions):
        raise Refused(400, "The page has no event like this.")
    return json.dumps({name: event[name] for name in fields if name in event}).encode()


def query_name(query: bytes, field: str) -> str | None:
    """The name that a query string gives for `field`; None unless it gives one, once."""
    found = parse_qs(query.decode("latin-1")).get(field, [])
    return found[0] if len(found) == 1 and is_name(found[0]) else None


def is_name(value) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def read_json(body: bytes) -> dict:
    try:
        data = json.loads(body or b"{}", parse_constant=_no_constant)
        json.dumps(data, ensure_ascii=False).encode()  # half characters cannot be sent back
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not valid JSON.") from error
    if not isinstance(data, dict):
        raise Refused(400, "The request is not a JSON object.")
    return data


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _is_number(number, functions: dict[int, int]) -> bool:
    return type(number) is int and number in functions


def _check_join(event: dict, functions: dict[int, int]) -> None:
    number, data = event.get("fn_index"), event.get("data")
    known = _is_number(number, functions) and isinstance(data, list)
    if not known or len(data) != functions[number]:
        raise Refused(400, "The page has no event like this.")
    trigger = event.get("trigger_id")
    if trigger is not None and type(trigger) is not int:
        raise Refused(400, "The page has no event like this.")


def _check_values(event: dict, uploads: str | None) -> None:
    """Refuses numbers that are none, deep nesting, and files that are no uploads: gradio would
    fetch them by URL, or decode them out of the request."""
    waiting = [(event, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(400, "A number of the request is too large.")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise Refused(400, "A number of the request is too large.")
        if isinstance(value, (list, dict)):
            if depth > DEPTH:
                raise Refused(400, "The request is nested too deeply.")
            inner = value if isinstance(value, list) else value.values()
            waiting += [(one, depth + 1) for one in inner]
        if isinstance(value, dict):
            _check_file(value.get("path"), value.get("url"), uploads)


def _check_file(path, url, uploads: str | None) -> None:
    if isinstance(path, str) and re.match(r"\s*[a-zA-Z][\w+.-]*:", path):
        raise Refused(400, "Files are uploaded, not fetched from an address.")
    if isinstance(path, str) and uploads is not None and not _is_inside(path, uploads):
        raise Refused(400, "The page has no file like this.")
    if isinstance(url, str) and url.strip().lower().startswith("data:"):
        raise Refused(400, "Files are uploaded, not sent inside of a request.")


def _is_inside(path: str, folder: str) -> bool:
    """Whether `path` is a file below `folder`."""
    try:
        real = Path(path).resolve()
        return real.is_file() and real.is_relative_to(Path(folder).resolve())
    except (OSError, ValueError):  # too long, or with a null byte
        return False
