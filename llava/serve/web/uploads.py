"""Checks of uploaded files, on the bytes of the request: nothing is stored before they passed."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from email.message import Message
from pathlib import Path

from PIL import Image

from ..limits import LIMITS

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
PART_HEADER_BYTES = 2048
STORED_BYTES = 2**30  # uploaded images of all visitors together; they are deleted after hours
NAME_CHARACTERS = 255


class Refused(Exception):
    """A request that is answered with `status` (4xx) and a sentence, and goes no further."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def check_upload(content_type: str, body: bytes, folder: str | None = None) -> None:
    """Raises Refused unless `body` is a multipart form with one image within the limits.

    folder: where uploads are stored; it may grow up to `STORED_BYTES`
    """
    boundary = re.fullmatch(
        r"multipart/form-data;\s*boundary=\"?([\w'()+,./:=?-]{1,70})\"?", content_type.strip()
    )
    if boundary is None:
        raise Refused(400, "An upload must be a multipart form.")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode())
    if len(parts) != 3 or not parts[2].startswith(b"--"):
        raise Refused(400, "One image at a time, please.")
    head, blank, data = parts[1].partition(b"\r\n\r\n")
    if not blank or len(head) > PART_HEADER_BYTES:
        raise Refused(400, "The file name is too long.")
    _check_name(head)
    check_image(data)
    if folder is not None and stored_bytes(folder) + len(data) > STORED_BYTES:
        raise Refused(507, "The page has no room for more images right now; try again later.")


def stored_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):  # deleted in the meantime
            total += path.stat().st_size
    return total


def _check_name(head: bytes) -> None:
    lines = head.decode("utf-8", "replace").strip().split("\r\n")
    found = [line for line in lines if line.lower().startswith("content-disposition:")]
    message = Message()
    message["content-disposition"] = found[0].partition(":")[2].strip() if len(found) == 1 else ""
    name = message.get_filename() or ""
    if not 0 < len(name) <= NAME_CHARACTERS:
        raise Refused(400, f"A file name must have 1 to {NAME_CHARACTERS} characters.")
    if re.search(r"[/\\\0]", name):
        raise Refused(400, "A file name must not hold a folder.")
    if not name.lower().endswith(SUFFIXES):
        raise Refused(415, f"Only images can be uploaded ({', '.join(SUFFIXES)}).")


def check_image(data: bytes) -> None:
    """Raises Refused unless the file is a whole image of an accepted format and size. Its header is
    looked at first, so that a bomb never unfolds."""
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


def _opened(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(413, _too_large()) from error
    except Exception as error:  # a broken file can raise nearly anything
        raise Refused(415, f"This file is not an image ({', '.join(FORMATS)}).") from error


def _too_large() -> str:
    return (
        f"The image has more than {LIMITS.image_pixels / 1e6:g} million pixels, or a side of more "
        f"than {LIMITS.image_side} pixels."
    )
