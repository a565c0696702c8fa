"""Image files of strangers: refused by their bytes where decoding would take without an end.

The number of pixels does not bound the work. A JPEG may draw all of them thousands of times. Pillow
unfolds compressed BMPs and reads metadata in Python, some of it in time that grows with the square
of the file's size. So the parts of a file are counted before Pillow sees it. Worker and page share
this.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from contextlib import suppress

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SCANS = 32  # of a JPEG; ordinary progressive ones have about ten
SEGMENTS = 1000  # of a JPEG
CHUNKS = 10_000  # of a PNG or WebP that carry pixels
OTHER_CHUNKS = 256
BLOCKS = 4096  # of a GIF in front of its first picture
EXIF_BYTES = 2**16  # no JPEG segment is larger
EXIF_ENTRIES = 512  # each may claim all of those bytes
MPF_ENTRIES = 32  # of the list of pictures in one JPEG
GIF_COMMENT = b"\xfe"
BMP_PLAIN = (0, 3)  # kinds of BMP that are not compressed: BI_RGB, BI_BITFIELDS
#: a JPEG marker behind which a segment begins, or that begins or ends an image
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
SOI, EOI, SOS, APP1, APP2 = 0xD8, 0xD9, 0xDA, 0xE1, 0xE2
PIXEL_CHUNKS = (b"IDAT", b"fdAT", b"fcTL", b"ANMF")
EXIF_TEXT = b"Raw profile type exif"
SAVE_AGAIN = "save it again as a PNG, or as a JPEG without metadata"


class Unbounded(ValueError):
    """A file that would take too much work. Its text goes on after "The image"."""


class TooManyPixels(ValueError):
    """A file that unfolds to more than Pillow decodes."""


def open_image(data: bytes) -> Image.Image:
    """The image in a file, its header read and nothing decoded; its size is the caller's to check.

    Raises Unbounded, TooManyPixels, or a ValueError without text where it is no such image.
    """
    check_work(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason to write to the log
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooManyPixels from error
    except Exception as error:  # a broken file can raise nearly anything, depending on its format
        raise ValueError from error


def check_work(data: bytes) -> None:
    """Raises Unbounded where a file has more parts than any camera or program writes."""
    for start, check in CHECKS.items():
        if data.startswith(start):
            check(data)


def _check_jpeg(data: bytes) -> None:
    """Finds the segments that libjpeg finds: behind any bytes that are no marker of one."""
    scans = segments = skipped = 0
    exif, place = b"", 2
    while found := MARKER.search(data, place):
        skipped += 0 if scans else found.start() - place
        kind, place = data[found.end() - 1], found.end()
        segments += 1
        scans += kind == SOS
        if segments > SEGMENTS or skipped > SEGMENTS:
            raise Unbounded("has more segments than a JPEG needs")
        if scans > SCANS:
            raise Unbounded(f"is a JPEG of more than {SCANS} scans")
        if kind == EOI:
            break
        if kind == SOI:
            continue
        length = int.from_bytes(data[place : place + 2], "big")  # these two bytes included
        content = data[place + 2 : place + length]
        if kind == APP1 and content.startswith(b"Exif\0\0"):
            exif += content[6:]  # Pillow joins them
            _check_exif(exif)
        elif kind == APP2 and content.startswith(b"MPF\0"):
            _check_exif(content[4:], MPF_ENTRIES)
        place += max(2, length)


def _check_png(data: bytes) -> None:
    for kind, content in _chunks(data, 8, lambda head: struct.unpack(">I4s", head)[::-1], 4):
        if kind == b"eXIf":
            _check_exif(content)
        elif content.startswith(EXIF_TEXT):
            _check_exif(_exif_in_text(kind, content))


def _exif_in_text(kind: bytes, content: bytes) -> bytes:
    """What ImageMagick wrote before PNG had a chunk for it: lines of hexadecimal digits."""
    text = content.partition(b"\0")[2]
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] != b"\0")
    if kind == b"zTXt":
        text = text[1:]  # behind the kind of compression
    elif kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # behind language and translated name, too
    if packed:
        with suppress(zlib.error):  # as it is, then
            text = zlib.decompressobj().decompress(text, 4 * EXIF_BYTES)
    if len(text) >= 4 * EXIF_BYTES:
        raise Unbounded("holds too much metadata")
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:  # Pillow, too, makes nothing of it
        return b""


def _check_webp(data: bytes) -> None:
    end = 8 + int.from_bytes(data[4:8], "little")
    for kind, content in _chunks(data[:end], 12, lambda head: struct.unpack("<4sI", head), 0):
        if kind == b"EXIF":
            _check_exif(content)


def _chunks(data: bytes, start: int, read_head, tail: int):
    """(kind, content) of every chunk. Raises Unbounded where they are too many.

    read_head: (kind, length of the content) of eight bytes; tail: bytes behind the content, 0:
               none, but chunks begin at even places
    """
    pixels = others = 0
    kind = b""
    while start + 8 <= len(data) and kind != b"IEND":
        kind, length = read_head(data[start : start + 8])
        pixels += kind in PIXEL_CHUNKS
        others += kind not in PIXEL_CHUNKS
        if pixels > CHUNKS or others > OTHER_CHUNKS:
            raise Unbounded("has more chunks than an image needs")
        yield kind, data[start + 8 : start + 8 + length]
        start += 8 + length + (tail or length % 2)


def _check_gif(data: bytes) -> None:
    """Counts what stands before the first picture, read as Pillow does, which joins it slowly."""
    colors = data[10] if len(data) > 10 else 0
    file = io.BytesIO(data)
    file.seek(13 + (3 << (colors & 7) + 1 if colors & 128 else 0))
    blocks = 0

    def block() -> bytes:
        nonlocal blocks
        blocks += 1
        if blocks > BLOCKS:
            raise Unbounded("holds too much metadata")
        size = file.read(1)
        return file.read(size[0]) if size else b""

    while (mark := file.read(1)) not in (b"", b";", b","):
        if mark != b"!":
            blocks += 1
            continue
        kind, first = file.read(1), block()
        if first.startswith(b"NETSCAPE2.0"):
            block()
        while (first or kind != GIF_COMMENT) and block():
            pass


def _check_bmp(data: bytes) -> None:
    (header,) = struct.unpack_from("<I", data.ljust(18, b"\0"), 14)
    if header != 12:  # the oldest kind says nothing about compression, it has none
        (compression,) = struct.unpack_from("<I", data.ljust(34, b"\0"), 30)
        if compression not in BMP_PLAIN:
            raise Unbounded("is a compressed BMP")


def _check_exif(data: bytes, most_entries: int = EXIF_ENTRIES) -> None:
    """Raises Unbounded unless what Pillow copies out of a TIFF directory is little."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return  # Pillow does not read it
    try:
        (first,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, first)
    except struct.error:
        entries = 0
    if len(data) > EXIF_BYTES or entries > most_entries:
        raise Unbounded("holds too much metadata")


CHECKS = {
    b"\xff\xd8": _check_jpeg,
    b"\x89PNG": _check_png,
    b"RIFF": _check_webp,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
}
