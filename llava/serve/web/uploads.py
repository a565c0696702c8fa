"""Checks of uploaded files, on the bytes of the request: nothing is stored before they passed."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import suppress
from pathlib import Path

import httpx
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header

from ..image_files import FORMATS, SAVE_AGAIN, TooManyPixels, Unbounded, open_image
from ..limits import LIMITS

SUFFIXES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
STORED_BYTES = 2**30  # uploaded images of all visitors together; they are deleted after hours
NAME_CHARACTERS = 255
ONE_IMAGE = "One image at a time, please."


class Refused(Exception):
    """A request that is answered with `status` (4xx) and a sentence, and goes no further."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def checked_upload(content_type: str, body: bytes, folder: str | None = None) -> tuple[str, bytes]:
    """(suffix, content) of the one image in a multipart form. Raises Refused where there is none
    within the limits. Text before the first boundary and behind the last is none of the form's.

    folder: where uploads are stored; it may grow up to `STORED_BYTES`
    """
    name, data = _only_file(content_type, body)
    suffix = _checked_suffix(name)
    check_image(data)
    if folder is not None and stored_bytes(folder) + len(data) > STORED_BYTES:
        raise Refused(507, "The page has no room for more images right now; try again later.")
    return suffix, data


def _only_file(content_type: str, body: bytes) -> tuple[str, bytes]:
    """(name, content) of the file that is all a form holds. Raises Refused."""
    kind, options = parse_options_header(content_type)
    kind = kind.lower()  # python-multipart before 0.0.34, the newest for Python 3.10, leaves it
    if kind != b"multipart/form-data":
        raise Refused(400, "An upload must be a multipart form.")
    boundary = options.get(b"boundary", b"")
    _, mark, rest = body.partition(b"--" + boundary)
    if not boundary or not mark:
        raise Refused(400, "The upload does not say what separates its parts.")
    files, ended = [], []

    def keep(part) -> None:
        files.append(part)
        if len(files) > 1 or not isinstance(part, File):  # nothing behind it is read
            raise Refused(400, ONE_IMAGE)

    options = {"boundary": boundary, "config": {"MAX_MEMORY_FILE_SIZE": math.inf}}
    try:
        parser = FormParser(kind.decode(), keep, keep, lambda: ended.append(True), **options)
        parser.write(mark + rest.lstrip(b" \t"))
    except FormParserError as error:
        raise Refused(400, "The upload is no form, or its file name is too long.") from error
    if not files or not ended:
        raise Refused(400, ONE_IMAGE)
    return files[0].file_name.decode("utf-8", "replace"), files[0].file_object.getvalue()


def as_form(suffix: str, data: bytes) -> tuple[str, bytes]:
    """(content type, body) of a plain form with one image, which every parser reads alike."""
    files = {"files": (f"image{suffix}", data, SUFFIXES[suffix])}
    form = httpx.Request("POST", "http://page", files=files)
    return form.headers["content-type"], form.read()


def stored_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # deleted in the meantime
            total += path.stat().st_size
    return total


def _checked_suffix(name: str) -> str:
    """The suffix of the file's name, which is all of it that is kept."""
    if not 0 < len(name) <= NAME_CHARACTERS:
        raise Refused(400, f"A file name must have 1 to {NAME_CHARACTERS} characters.")
    if re.search(r"[/\\\0]", name):
        raise Refused(400, "A file name must not hold a folder.")
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused(415, f"Only images can be uploaded ({', '.join(SUFFIXES)}).")
    return suffix


def check_image(data: bytes) -> None:
    """Raises Refused unless the file is a whole image of an accepted format and size. Its parts are
    counted and its header is looked at first, so that a bomb never unfolds."""
    image = _opened(data)
    width, height = image.size
    if width * height > LIMITS.image_pixels or max(width, height) > LIMITS.image_side:
        raise Refused(413, _too_large())
    if max(width, height) > LIMITS.image_aspect * min(width, height):
        raise Refused(413, f"The image is more than {LIMITS.image_aspect} times as long as wide.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason to write to the log
            image.load()
    except Exception as error:  # a broken file can raise nearly anything
        raise Refused(415, "This image is not complete, or damaged; try another file.") from error


def _opened(data: bytes):
    """The image, its header read and nothing decoded."""
    try:
        return open_image(data)
    except Unbounded as error:
        raise Refused(415, f"The image {error}; {SAVE_AGAIN}.") from error
    except TooManyPixels as error:
        raise Refused(413, _too_large()) from error
    except ValueError as error:
        raise Refused(415, f"This file is not an image ({', '.join(FORMATS)}).") from error


def _too_large() -> str:
    return (
        f"The image has more than {LIMITS.image_pixels / 1e6:g} million pixels, or a side of more "
        f"than {LIMITS.image_side} pixels."
    )
