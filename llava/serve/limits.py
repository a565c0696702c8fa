"""How large anything that comes from outside may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on one request.

    body_bytes:     of the JSON text, images included
    body_seconds:   until the body has arrived
    images:         per request
    image_pixels:   width x height, summed over the images
    image_side:     pixels of the longer side: preparing an image pads it to a square
    image_aspect:   longer / shorter side: preparing an image enlarges the shorter one
    prompt_chars:   characters of the prompt
    new_tokens:     what `max_new_tokens` is cut to
    stall_seconds:  a client that reads nothing for so long loses its answer
    """

    body_bytes: int = 16 * 2**20
    body_seconds: float = 30.0
    images: int = 8
    image_pixels: int = 25_000_000
    image_side: int = 8192
    image_aspect: int = 50
    prompt_chars: int = 65_536
    new_tokens: int = 1024
    stall_seconds: float = 60.0


LIMITS = Limits()

MODEL_CHARS = 256
ADDRESS_CHARS = 256
STOP_CHARS = 64
OPTION_CHARS = 64
OPTIONS = 32
LIST_ITEMS = 64
MODELS_PER_WORKER = 64
WORKERS = 256
STATUS_BYTES = 2**20  # what a worker may say about itself
CHUNK_BYTES = 2**23  # one chunk of an answer; the last one carries the pruning report
