"""Reading images from files, URLs and base64 text; needs Pillow only, no torch."""

import base64
import binascii
import io
import queue
import threading
from pathlib import Path

import numpy as np
import requests
from PIL import Image

DOWNLOAD_BYTES = 20 * 2**20  # largest file that is fetched
DOWNLOAD_PIXELS = 50_000_000  # largest width x height that is decoded from a download
DOWNLOAD_SECONDS = 20.0  # for the whole download, name look-up and redirects included


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB mode; transparency is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255 and turn nearly everything white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def expand2square(pil_img: Image.Image, background_color) -> Image.Image:
    """`pil_img` centred on a square of its longer side; a square image comes back as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def decode_image(data: bytes, source: str, max_pixels: int | None = None) -> Image.Image:
    """Decodes a whole image file.

    source:     name of the image in error messages
    max_pixels: largest width x height that is decoded; None leaves it to Pillow's own limit

    Raises ValueError when `data` is not a complete image or holds too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data))
        num_pixels = image.width * image.height
        if max_pixels is None or num_pixels <= max_pixels:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {source} is too large: {error}") from error
    except Exception as error:  # a broken file can raise nearly anything, depending on its format
        raise ValueError(f"cannot read image {source}: {error}") from error
    raise ValueError(f"image {source} has {num_pixels} pixels, the limit is {max_pixels}")


def load_image_from_base64(image: str) -> Image.Image:
    """The PIL image behind base64 text, in the mode it was stored in (not converted to RGB)."""
    try:
        data = base64.b64decode(image)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image is not valid base64 text: {error}") from error
    return decode_image(data, "from base64 text")


def load_image(
    path_or_url: str | Path,
    max_bytes: int = DOWNLOAD_BYTES,
    max_pixels: int = DOWNLOAD_PIXELS,
    timeout: float = DOWNLOAD_SECONDS,
) -> Image.Image:
    """Reads one image from a file, or from the web when the name starts with http:// or https://.

    The three limits (bytes, pixels, seconds) apply to downloads. Returns an RGB image. Raises
    FileNotFoundError for a missing file and ValueError for anything that is not an image within
    the limits; both name the path.
    """
    source = str(path_or_url)
    if source.lower().startswith(("http://", "https://")):
        data = download(source, max_bytes, timeout)
        return to_rgb(decode_image(data, source, max_pixels))
    if not Path(source).is_file():
        raise FileNotFoundError(f"image file not found: {source}")
    return to_rgb(decode_image(Path(source).read_bytes(), source))


def download(url: str, max_bytes: int, timeout: float) -> bytes:
    """The body behind `url`; ValueError when it takes longer or is larger than allowed."""
    outcome = queue.SimpleQueue()

    def attempt():
        try:
            outcome.put(_read_body(url, max_bytes, timeout))
        except (requests.RequestException, ValueError) as error:
            outcome.put(ValueError(f"cannot download {url}: {error}"))

    # A socket time-out restarts with every byte that arrives; only a thread bounds the total.
    threading.Thread(target=attempt, daemon=True).start()
    try:
        body = outcome.get(timeout=timeout)
    except queue.Empty:
        raise ValueError(f"cannot download {url}: no answer within {timeout:g} s") from None
    if isinstance(body, Exception):
        raise body
    return body


def _read_body(url: str, max_bytes: int, timeout: float) -> bytes:
    with requests.get(url, stream=True, timeout=timeout) as response:
        response.raise_for_status()
        body = bytearray()
        for piece in response.iter_content(chunk_size=2**16):
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"larger than the limit of {max_bytes} bytes")
    return bytes(body)
