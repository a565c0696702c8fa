"""Images of a request: from base64 text to pixels, with every limit checked before the work."""

from __future__ import annotations

import base64
import warnings

from PIL import Image

from ..image_io import decode_base64, displayed
from .errors import ServeError
from .image_files import FORMATS, SAVE_AGAIN, TooManyPixels, Unbounded, open_image
from .limits import LIMITS, Limits


def decode_images(texts: list[str], limits: Limits = LIMITS) -> list[Image.Image]:
    """RGB images, upright and on white, from base64 text or `data:` URLs.

    Raises ServeError, which counts images from 1.
    """
    images, left = [], limits.image_pixels
    for number, text in enumerate(texts, start=1):
        image = _open(text, number)
        _check_size(image.size, left, number, limits)
        left -= image.width * image.height
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata is no reason to write to the log
                images.append(displayed(image))
        except Exception:  # a broken file can raise nearly anything, depending on its format
            raise _unreadable(number) from None
    return images


def image_type(text: str) -> str:
    """The media type of base64 text that `decode_images` accepted."""
    kind = _open(text, 1).format.lower()
    return "image/jpeg" if kind == "mpo" else f"image/{kind}"  # a JPEG with others behind it


def plain_base64(text: str) -> str:
    """Base64 text without line breaks and without the head of a `data:` URL."""
    return base64.b64encode(decode_base64(text)).decode()


def _open(text: str, number: int) -> Image.Image:
    """The image, its header read and nothing decoded."""
    try:
        data = decode_base64(text)
    except ValueError:
        raise ServeError("bad_image", f"Image {number} is not valid base64 text.") from None
    try:
        return open_image(data)
    except Unbounded as error:
        raise ServeError("bad_image", f"Image {number} {error}; {SAVE_AGAIN}.") from None
    except TooManyPixels:
        raise ServeError("too_large", f"Image {number} has too many pixels.") from None
    except ValueError:
        raise _unreadable(number) from None


def _check_size(size: tuple[int, int], left: int, number: int, limits: Limits) -> None:
    longer, shorter = max(size), min(size)
    if size[0] * size[1] > left:
        raise ServeError(
            "too_large",
            f"The images have more than {limits.image_pixels:,} pixels; make them smaller.",
        )
    if longer > limits.image_side or shorter < 1 or longer > limits.image_aspect * shorter:
        raise ServeError(
            "too_large",
            f"Image {number} is too long: at most {limits.image_side} pixels, and "
            f"{limits.image_aspect} times the shorter side.",
        )


def _unreadable(number: int) -> ServeError:
    return ServeError(
        "bad_image", f"Image {number} cannot be read; send a complete {', '.join(FORMATS)} file."
    )
