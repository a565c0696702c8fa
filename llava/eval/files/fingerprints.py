"""Digests of weight files: they change when the weights do, and cost next to nothing."""

from __future__ import annotations

import functools
import hashlib
import os

WEIGHTS = (".safetensors", ".bin", ".pt")
#: files up to this many bytes are read whole
WHOLE_BYTES = 2**24
#: of larger ones a block every so many bytes, and the end: less than a matrix lies between two
STRIDE, BLOCK, END = 2**23, 2**14, 2**20


def fingerprint(folder: str, endings: tuple[str, ...] = WEIGHTS) -> str:
    """Returns a digest of the files in a folder that have one of the endings, or of the file that
    is named; a name that is neither, such as one on the hub, is its own."""
    if os.path.isfile(folder):
        return hashlib.sha256(file_digest(folder)).hexdigest()[:16]
    if not os.path.isdir(folder):
        return folder
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name.endswith(endings):
            path = os.path.join(folder, name)
            digest.update(f"{name} {os.path.getsize(path)} ".encode() + file_digest(path))
    return digest.hexdigest()[:16]


def file_digest(path: str) -> bytes:
    """Digest of one file; that of a large one is kept while its size and time stay."""
    stat = os.stat(path)
    if stat.st_size <= WHOLE_BYTES:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    return _sampled(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sampled(path: str, size: int, _: int) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, size, STRIDE):
            file.seek(start)
            digest.update(file.read(BLOCK))
        file.seek(max(size - END, 0))
        digest.update(file.read())  # of a zip file, as torch writes: the checksums of all parts
    return digest.digest()
