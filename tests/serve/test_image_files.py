"""Small files that would keep a decoder busy: refused by worker and page, and quickly."""

from __future__ import annotations

import base64
import io
import random
import struct
import time
import zlib
from contextlib import suppress

import pytest
from PIL import Image

from llava.serve.errors import ServeError
from llava.serve.image_files import (
    BLOCKS,
    EXIF_ENTRIES,
    FORMATS,
    OTHER_CHUNKS,
    SCANS,
    SEGMENTS,
    Unbounded,
    check_work,
    open_image,
)
from llava.serve.images import decode_images, image_type
from llava.serve.web.uploads import Refused, check_image

SECONDS = 5.0  # these files took 3 s to minutes before; on a busy machine a refusal takes one


def saved(kind: str, size=(40, 30), **options) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def many_scans(number: int, side: int = 5000) -> bytes:
    """A progressive JPEG in grey whose scans all say: nothing more in any block."""
    blocks = ((side + 7) // 8) ** 2
    left, runs = blocks, ""
    while left >= 16384:
        run = min(left, 32767)
        runs, left = runs + "0" + format(run - 16384, "014b"), left - run
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + packed(runs + "10" * left)
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, bytes([0] + [1] * 64)),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0])),
            segment(0xC4, bytes([0, 1] + [0] * 15 + [0])),
            segment(0xC4, bytes([0x10, 1, 1] + [0] * 14 + [0xE0, 0])),
            segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + packed("0" * blocks),
            scan * number,
            b"\xff\xd9",
        ]
    )


def packed(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    return data.replace(b"\xff", b"\xff\0")


def compressed_bmp(width: int = 8192, height: int = 3050, kind: int = 1) -> bytes:
    rows = b"\1\0\0\0" * height + b"\0\1"  # of every line the first pixel, then its end
    at = 14 + 40 + 1024
    head = struct.pack("<IHHI", at + len(rows), 0, 0, at)
    head += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, kind, len(rows), 0, 0, 256, 256)
    return b"BM" + head + bytes(range(256)) * 4 + rows


def exif(entries: int, size: int) -> bytes:
    """A directory whose entries all claim the same bytes."""
    claims = (struct.pack("<HHII", number + 1, 7, size - 1, 1) for number in range(entries))
    head = b"II*\0" + struct.pack("<IH", 8, entries) + b"".join(claims)
    return head.ljust(size, b"\0")


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def with_chunks(*chunks: bytes) -> bytes:
    data = saved("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def raw_profile(content: bytes, kind: bytes = b"zTXt") -> bytes:
    text = b"\nexif\n%8d\n" % len(content) + content.hex().encode()
    head = {b"tEXt": b"", b"zTXt": b"\0", b"iTXt": b"\1\0en\0a\nb\nc\0"}[kind]
    text = text if kind == b"tEXt" else zlib.compress(text)
    return chunk(kind, b"Raw profile type exif\0" + head + text)


def in_front(kind: str, content: bytes) -> bytes:
    """An image with `content` where its metadata belongs."""
    data = saved(kind)
    at = 2 if kind == "JPEG" else 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + content + data[at:]


BOMBS = {
    "scans": many_scans(2000),
    "segments": in_front("JPEG", segment(0xFE, b"") * 10**6),
    "fill bytes": in_front("JPEG", b"\xff" * 10**7),
    "compressed bmp": compressed_bmp(),
    "4-bit compressed bmp": compressed_bmp(kind=2),
    "chunks": with_chunks(chunk(b"abCd", b"") * 10**6),
    "profiles": with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(999_000))) * 5000),
    "gif comment": in_front("GIF", b"!\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0"),
    "gif comments": in_front("GIF", (b"!\xfe\1x\0") * 10**6),
    "gif without a comment": in_front("GIF", b"!\1\0" + b"\1," * 10**6 + b"\0"),
    "gif repetition": in_front("GIF", b"!\xff\x0bNETSCAPE2.0\0" + b"\1," * 10**6 + b"\0"),
    "exif of a webp": saved("WEBP", exif=exif(2000, 10**6)),
    "exif of a webp, short": saved("WEBP", exif=exif(5000, 65_000)),
    "exif of a jpeg": in_front(
        "JPEG", segment(0xE1, b"Exif\0\0" + exif(3000, 60_000)) + segment(0xE1, b"Exif\0\0") * 2
    ),
    "exif of a jpeg in parts": in_front(
        "JPEG", b"".join(segment(0xE1, b"Exif\0\0" + part) for part in [exif(9, 60_000)] * 2)
    ),
    "pictures of a jpeg": in_front("JPEG", segment(0xE2, b"MPF\0" + exif(3000, 60_000))),
    "exif of a png": with_chunks(chunk(b"eXIf", exif(2000, 10**6))),
    "exif in the text of a png": with_chunks(raw_profile(exif(3000, 60_000))),
    "exif in plain text of a png": with_chunks(raw_profile(exif(3000, 60_000), b"tEXt")),
    "exif in other text of a png": with_chunks(raw_profile(exif(3000, 60_000), b"iTXt")),
    "long exif in the text of a png": with_chunks(raw_profile(exif(3000, 400_000))),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_file_that_keeps_a_decoder_busy_is_refused_by_worker_and_page(data):
    began = time.monotonic()
    with pytest.raises(ServeError, match="^Image 1 .*; save it again as a PNG") as at_worker:
        decode_images([base64.b64encode(data).decode()])
    with pytest.raises(Refused, match="^The image .*; save it again as a PNG") as at_page:
        check_image(data)
    assert at_worker.value.status == 400 and at_page.value.status == 415
    assert time.monotonic() - began < SECONDS


def test_scans_hidden_behind_markers_that_decoders_skip_are_counted():
    data = many_scans(SCANS, side=64)
    last = data.rindex(b"\xff\xda")
    for skipped in (b"\xff\xd0", b"\xff\x01", b"\xff\x02\xff\xff", b"\xff\xff", b"abc", b"\xff\0"):
        with pytest.raises(ServeError, match=f"more than {SCANS} scans"):
            decode_images([base64.b64encode(data[:last] + skipped + data[last:]).decode()])


def whole(data: bytes) -> Image.Image:
    check_image(data)
    (image,) = decode_images([base64.b64encode(data).decode()])
    return image


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (40, 30), (900, 700)])
def test_ordinary_files_are_images(kind, size):
    assert whole(saved(kind, size)).size == size


def test_files_up_to_the_limits_are_images():
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (
        saved("JPEG", progressive=True, subsampling=0),
        many_scans(SCANS - 1, side=64),
        in_front("JPEG", segment(0xE0, b"x" * 60_000) * 150),
        in_front("JPEG", segment(0xFE, b"") * (SEGMENTS - 50)),
        saved("JPEG") + b"\xff\xda" * 1000,  # a video behind the picture, as phones write it
        in_front("GIF", b"!\xfe" + b"\1x" * (BLOCKS - 10) + b"\0"),
        saved("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 3, loop=0),
        with_chunks(chunk(b"tEXt", b"a\0b") * (OTHER_CHUNKS - 10)),
        saved("PNG") + bytes(10_000),
        saved("WEBP", exif=exif(EXIF_ENTRIES, 60_000)),
        saved("WEBP", lossless=True),
    ):
        assert whole(data).size in ((40, 30), (64, 64))
    for kind in ("JPEG", "PNG", "WEBP"):
        assert whole(saved(kind, exif=turned)).size == (30, 40), "upright"
    for kind in (b"tEXt", b"zTXt", b"iTXt"):
        assert whole(with_chunks(raw_profile(turned.tobytes(), kind))).size == (30, 40)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_no_error_of_ours(kind):
    data = saved(kind, exif=exif(4, 100)) if kind in ("JPEG", "PNG", "WEBP") else saved(kind)
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data[: chance.randrange(1, len(data))])
        for place in (chance.randrange(min(200, len(damaged))) for _ in range(3)):
            damaged[place] = chance.randrange(256)
        with suppress(Unbounded):
            check_work(bytes(damaged))


def test_a_jpeg_with_further_pictures_behind_it_is_sent_on_as_a_jpeg():
    file = io.BytesIO()
    others = [Image.new("RGB", (40, 30), "blue")]
    Image.new("RGB", (40, 30)).save(file, "MPO", save_all=True, append_images=others)
    assert open_image(file.getvalue()).format == "MPO"
    assert image_type(base64.b64encode(file.getvalue()).decode()) == "image/jpeg"
