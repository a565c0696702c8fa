"""Reading images from files, URLs and base64 text; needs Pillow only, no torch.

An image is read as a viewer shows it (`displayed`): upright, and with transparent parts on white.
The published preprocessing of benchmarks does neither; `as_stored` asks for that.
"""

import base64
import binascii
import io
import queue
import re
import threading
from pathlib import Path

import numpy as np
import requests
from PIL import ExifTags, Image, UnidentifiedImageError

DOWNLOAD_BYTES = 20 * 2**20  # largest file that is fetched
DOWNLOAD_PIXELS = 50_000_000  # largest width x height that is decoded from a download
DOWNLOAD_SECONDS = 20.0  # for the whole download, name look-up and redirects included
BAND_PIXELS = 2**20  # of the padded square that exist at the same time
WHITE = (255, 255, 255)

#: what turns a picture upright, by the value of its EXIF field "Orientation"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where that may stand

#: usual values of white in images of one channel with more than 8 bits
USUAL_WHITE = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255, 65535)}
DARK = 0.25  # share of white: where nothing is brighter, the values are stretched to their range

#: names in the head of a file that Pillow does not read without a plug-in
CONTAINERS = {
    b"hei": "a HEIC photo",
    b"hev": "a HEIC photo",
    b"mif1": "a HEIF photo",
    b"msf1": "a HEIF photo",
    b"avi": "an AVIF image",
}


def displayed(image: Image.Image) -> Image.Image:
    """`image` as a viewer shows it: upright, transparent parts on white, in RGB mode."""
    return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation asks; the result no longer asks for it."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata says nothing, and raises nearly anything
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ORIENTED:
        turned.info.pop(key, None)
    return turned


def to_rgb(image: Image.Image, background: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """`image` in RGB mode, 8 bits per channel.

    background: colour that transparent parts get; None drops transparency, as published
                preprocessing does, and shows whatever colour is stored below it

    16-bit grey is scaled so that 65535 is white. Values of 32-bit integers and of floats are
    scaled by the white they are usually stored with (255 or 65535; 1 for floats), or by their own
    range when none fits or all would be dark. Raises ValueError for values that are not finite, or
    all the same and of no known scale.
    """
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, background)
    if image.mode == "La":  # the only mode that Pillow turns into no other directly
        image = image.convert("LA")
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    return _on(background, image.convert("RGBA"))


def _on(background: tuple[int, int, int], image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image, background) -> Image.Image:
    """The RGB image of one channel of 16 or 32 bits."""
    kind = image.mode[:4]
    values = np.asarray(image)
    if not values.size:
        return image.convert("L").convert("RGB")
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds values that are infinite or not a number")
    low, high = low.item(), high.item()
    white = next((w for w in USUAL_WHITE[kind] if 0 <= low and high <= w), None)
    if white is not None and (low == high or high >= DARK * white):
        low, high = 0, white
    if low == high:
        raise ValueError(f"all its values are {low:g}, which is neither black nor white")
    wide = np.float64 if kind == "I" else np.float32
    levels = (np.subtract(values, low, dtype=wide) * wide(255 / (high - low))).round()
    grey = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    clear = image.info.get("transparency")
    if background is not None and isinstance(clear, int):  # PNG: this value is transparent
        grey.paste(background, mask=Image.fromarray(values == clear).convert("L"))
    return grey


def expand2square(pil_img: Image.Image, background_color) -> Image.Image:
    """`pil_img` centred on a square of its longer side; a square image comes back as it is."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def resized_square(
    image: Image.Image, background_color, side: int, resample: int = Image.Resampling.BICUBIC
) -> Image.Image:
    """`expand2square(image, ...).resize((side, side), resample)`, pixel by pixel the same.

    Resizing squeezes rows first and columns after that, and rows know nothing of each other. So the
    rows are padded and squeezed a band at a time, and the large square never exists.
    """
    width, height = image.size
    full = max(width, height)
    left, top = (full - width) // 2, (full - height) // 2
    narrow = Image.new(image.mode, (side, full), background_color)
    rows = max(1, BAND_PIXELS // full)
    for start in range(0, height, rows):
        band = image.crop((0, start, width, min(start + rows, height)))
        if width < full:
            padded = Image.new(image.mode, (full, band.height), background_color)
            padded.paste(band, (left, 0))
            band = padded
        narrow.paste(band.resize((side, band.height), resample), (0, top + start))
    return narrow.resize((side, side), resample)


def decode_image(data: bytes, source: str, max_pixels: int | None = None) -> Image.Image:
    """Decodes a whole image file.

    source:     name of the image in error messages
    max_pixels: largest width x height that is decoded; None leaves it to Pillow's own limit

    Raises ValueError when `data` is not a complete image or holds too many pixels.
    """
    if not data:
        raise ValueError(f"cannot read image {source}: the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        num_pixels = image.width * image.height
        if max_pixels is None or num_pixels <= max_pixels:
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {source} is too large: {error}") from error
    except UnidentifiedImageError as error:  # its text is the address of an object
        raise ValueError(f"cannot read image {source}: it is {_kind_of(data)}") from error
    except Exception as error:  # a broken file can raise nearly anything, depending on its format
        raise ValueError(f"cannot read image {source}: {_reason(error)}") from error
    raise ValueError(f"image {source} has {num_pixels} pixels, the limit is {max_pixels}")


def image_size(path: str) -> tuple[int, int]:
    """(width, height) of an image file, as stored, from its head alone.

    Raises ValueError for anything that is no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        if not isinstance(error, UnidentifiedImageError):
            raise
        with open(path, "rb") as file:
            kind = _kind_of(file.read(2048))
        raise ValueError(f"cannot read image {path}: it is {kind}") from error
    except Exception as error:  # as in `decode_image`
        raise ValueError(f"cannot read image {path}: {_reason(error)}") from error


def _kind_of(data: bytes) -> str:
    """What a file is that Pillow does not know."""
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        for start, name in CONTAINERS.items():
            if brand.startswith(start):
                return f"{name}, which this installation cannot read; convert it to JPEG or PNG"
    if re.match(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", data[:2048], re.DOTALL):
        return "an SVG drawing, which has no pixels; convert it to PNG"
    return "damaged or in a format that is not known; JPEG, PNG and WebP always work"


def _reason(error: Exception) -> str:
    """What an exception says, without addresses of objects."""
    return re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "file", str(error)) or type(error).__name__


def decode_base64(text: str | bytes) -> bytes:
    """The bytes behind base64 text, which may be a `data:` URL and may have line breaks.

    Raises ValueError for anything else.
    """
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    head = text[:256].lstrip()
    if head[:5].lower() == "data:":
        kind, comma, _ = head.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise ValueError("a data URL of an image must begin with data:image/...;base64,")
        text = text[text.index(",") + 1 :]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # not ASCII: a plain ValueError
        raise ValueError(f"not valid base64 text: {error}") from error


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The PIL image behind base64 text or a base64 data URL, upright, in the mode it was stored in
    (not converted to RGB). Raises ValueError for anything else."""
    return upright(image_from_base64(image))


def image_from_base64(image: str | bytes) -> Image.Image:
    """As `load_image_from_base64`, but not turned."""
    try:
        data = decode_base64(image)
    except ValueError as error:
        raise ValueError(f"image is {error}") from error
    return decode_image(data, "from base64 text")


def load_image(
    path_or_url: str | Path,
    max_bytes: int = DOWNLOAD_BYTES,
    max_pixels: int = DOWNLOAD_PIXELS,
    timeout: float = DOWNLOAD_SECONDS,
    as_stored: bool = False,
) -> Image.Image:
    """Reads one image from a file, or from the web when the name starts with http:// or https://.

    The three limits (bytes, pixels, seconds) apply to downloads.
    as_stored: neither turned upright nor put on white, as in the published preprocessing

    Returns an RGB image. Raises FileNotFoundError for a missing file and ValueError for anything
    that is not an image within the limits; both name the path.
    """
    source = str(path_or_url)
    if source.lower().startswith(("http://", "https://")):
        image = decode_image(download(source, max_bytes, timeout), source, max_pixels)
    elif Path(source).is_file():
        image = decode_image(Path(source).read_bytes(), source)
    else:
        raise FileNotFoundError(f"image file not found: {source}")
    try:
        return to_rgb(image, background=None) if as_stored else displayed(image)
    except ValueError as error:
        raise ValueError(f"cannot use image {source}: {error}") from error


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
