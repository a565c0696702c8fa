"""Photos, transparent and deep images: seen alike by every program, as a viewer shows them."""

import base64
import io
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import CLIPImageProcessor

from llava.conversation import conv_templates
from llava.eval import run_llava
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.questions import Question
from llava.eval.files.answer_lines import Answer
from llava.eval.plugins.model import ask
from llava.front_end import FrontEnd
from llava.image_io import TURNS, load_image, load_image_from_base64, to_rgb
from llava.image_settings import ImageSettings
from llava.mm_utils import process_images
from llava.serve.images import decode_images
from llava.train.sample_images import SampleImages

SIZE = (40, 20)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    )


def file_of(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(orientation: int) -> bytes:
    """A JPEG that is bright on the left and has that orientation."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pixels[:, :10] = 250
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return file_of(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)


def transparent(mode: str) -> Image.Image:
    """A black square on transparent black; the square is the middle half."""
    alpha = np.zeros((20, 20), dtype=np.uint8)
    alpha[5:15, 5:15] = 255
    image = Image.fromarray(np.dstack([np.zeros((20, 20, 3), dtype=np.uint8), alpha]))
    if mode == "P":
        image = image.quantize(4)
        assert image.mode == "P"
        return image
    return image.convert(mode)


# --- orientation ------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, *TURNS])
def test_a_photo_is_turned_upright(tmp_path, orientation):
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(orientation))
    image = load_image(path)
    assert image.size == (SIZE if orientation < 5 else SIZE[::-1])
    bright = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom"}
    half = {
        "left": (0, 0, 8, 20),
        "right": (32, 0, 40, 20),
        "top": (0, 0, 20, 8),
        "bottom": (0, 32, 20, 40),
    }[bright.get(orientation, "bottom")]
    assert np.asarray(image.crop(half)).mean() > 200
    # The result no longer says that it lies on its side: nobody turns it a second time.
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_every_program_for_photos_sees_them_upright(tmp_path):
    path, text = tmp_path / "photo.jpg", base64.b64encode(photo(6)).decode()
    path.write_bytes(photo(6))
    upright = SIZE[::-1]
    assert run_llava.load_images([str(path)])[0].size == upright
    assert load_image_from_base64(text).size == upright
    assert decode_images([text])[0].size == upright
    page = conv_templates["vicuna_v1"].copy()
    assert page.process_image(Image.open(path), "Default", return_pil=True).size == upright


def test_damaged_metadata_leaves_the_image_as_it_is(tmp_path):
    data = bytearray(photo(6))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 20] = b"\xff" * 20
    (tmp_path / "photo.jpg").write_bytes(data)
    assert load_image(tmp_path / "photo.jpg").size == SIZE


def test_benchmarks_read_images_as_published_unless_asked(tmp_path, processor):
    (tmp_path / "photo.jpg").write_bytes(photo(6))
    transparent("RGBA").save(tmp_path / "logo.png")
    model = SimpleNamespace(image_settings=ImageSettings("pad"), pruner=None)
    for switch, size, corner in ((False, SIZE, -2), (True, SIZE[::-1], 1)):
        loop = AnswerLoop(FrontEnd(None, model, processor, "vicuna_v1"), upright_images=switch)
        question = Question({"question_id": 1}, "?", [])
        assert loop.prepare(question, "photo.jpg", str(tmp_path)).size == size
        pixels = loop.prepare(question, "logo.png", str(tmp_path)).pixels
        assert (pixels[0, 0, 0] > 1) == switch, corner
        table = Question({"question_id": 1}, "?", [], base64=True)
        text = base64.b64encode(photo(6)).decode()
        assert loop.prepare(table, text, "").size == size


# --- transparency -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    path = tmp_path / "logo.png"
    transparent(mode).save(path)
    for image in (load_image(path), to_rgb(Image.open(path)), decode_images([b64(path)])[0]):
        pixels = np.asarray(image)
        assert (pixels[0, 0] == 255).all() and (pixels[10, 10] == 0).all()
    stored = np.asarray(load_image(path, as_stored=True))
    assert stored.max() == 0  # published preprocessing sees black on black


def b64(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("kind", ["transparent", "deep"])
def test_the_page_gets_uploads_as_they_were_stored(tmp_path, kind):
    gr = pytest.importorskip("gradio")
    from llava.serve.web import asking
    from llava.serve.web.controls import Controls
    from llava.serve.web.pictures import data_uri

    path = tmp_path / "a.png"
    image = transparent("RGBA")
    if kind == "deep":
        image = Image.fromarray(np.full((20, 20), 30000, dtype=np.uint16))
    image.save(path)
    with gr.Blocks():
        box = Controls([]).image
    uploaded = box.preprocess(gr.data_classes.ImageData(path=str(path), orig_name="a.png"))
    conversation = conv_templates["vicuna_v1"].copy()
    asking.add_question(conversation, "?", uploaded)
    (sent,) = conversation.get_images()
    shown = load_image_from_base64(data_uri(uploaded))
    for picture in (decode_images([sent])[0], shown):
        level = 255 if kind == "transparent" else 30000 // 257
        assert picture.getpixel((0, 0))[0] == pytest.approx(level, abs=2)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_by_their_transparency_are_read(mode):
    image = transparent("LA" if mode == "La" else "RGBA").convert(mode)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(image, background=None).getpixel((0, 0)) == (0, 0, 0)


def test_half_transparent_parts_are_blended(tmp_path):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(to_rgb(image).getpixel((0, 0))[0] - 127) <= 1


@pytest.mark.parametrize("mode, clear", [("L", 7), ("I;16", 7), ("1", 0), ("RGB", (7, 7, 7))])
def test_a_transparent_colour_is_white(tmp_path, mode, clear):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 7, dtype=np.uint16))
    else:
        image = Image.new(mode, (4, 4), clear)
    path = tmp_path / "a.png"
    image.save(path, transparency=clear)
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = tmp_path / f"a.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(path).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_keep_their_brightness(mode):
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (4, 1))
    image = Image.fromarray(np.dstack([ramp] * 3)).convert(mode)
    values = np.asarray(to_rgb(image), dtype=int)[..., 0]
    assert values[0, 0] < 40 and values[0, -1] > 215


# --- depth ------------------------------------------------------------------------------------


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEEP = {
    "16-bit PNG": ("a.png", (RAMP * 65535).astype(np.uint16)),
    "16-bit TIFF": ("a.tif", (RAMP * 65535).astype(np.uint16)),
    "12 bits in 16": ("a.png", (RAMP * 4095).astype(np.uint16)),
    "32-bit TIFF": ("a.tif", (RAMP * 70000 - 20000).astype(np.int32)),
    "32-bit TIFF of 8 bits": ("a.tif", (RAMP * 255).astype(np.int32)),
    "float TIFF, 0 to 1": ("a.tif", RAMP.astype(np.float32)),
    "float TIFF, 0 to 255": ("a.tif", (RAMP * 255).astype(np.float32)),
    "float TIFF of any range": ("a.tif", (RAMP * 3e6 - 5).astype(np.float32)),
}


@pytest.mark.parametrize("name, values", DEEP.values(), ids=DEEP)
def test_deep_images_look_alike_in_training_and_inference(tmp_path, processor, name, values):
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(load_image(tmp_path / name), dtype=int)[..., 0]
    np.testing.assert_allclose(seen, RAMP * 255, atol=1)

    config = SimpleNamespace(image_aspect_ratio="pad")
    (wanted,) = process_images([load_image(tmp_path / name)], processor, config)
    args = SimpleNamespace(image_processor=processor, image_aspect_ratio="pad")
    pixels = SampleImages(args).item([str(tmp_path / name)])["image"]
    assert torch.equal(pixels, wanted)
    assert torch.equal(process_images([Image.open(tmp_path / name)], processor, config)[0], wanted)


def test_harnesses_of_others_get_deep_images_scaled(processor):
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    seen = []
    model = SimpleNamespace(image_settings=ImageSettings("pad"))
    loop = SimpleNamespace(front=FrontEnd(None, model, processor, "vicuna_v1"))
    loop.generate = lambda batch: seen.extend(batch[0][1]) or [Answer("")]
    ask(loop, [("?", [deep])], 1)
    mean, deviation = processor.image_mean[0], processor.image_std[0]
    assert (seen[0].pixels[0].mean() * deviation + mean).item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("value", [0, 300, 40000, 65535])
def test_a_16_bit_image_of_one_value_has_the_brightness_of_that_value(value):
    grey = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    assert to_rgb(grey).getpixel((0, 0))[0] == round(value / 257)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.full((2, 2), np.nan, np.float32), "infinite or not a number"),
        (np.array([[0, np.inf]], np.float32), "infinite or not a number"),
        (np.full((2, 2), -5, np.int32), "all its values are -5"),
    ],
)
def test_values_without_a_brightness_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"cannot use image .*a.tif: .*{message}"):
        load_image(tmp_path / "a.tif")


# --- files that are none ----------------------------------------------------------------------


def heic() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(200)


BROKEN = {
    "an empty file": (b"", "the file is empty"),
    "a HEIC photo": (heic(), "HEIC photo, .*JPEG or PNG"),
    "an SVG drawing": (b"<?xml version='1.0'?>\n<svg width='9'/>", "SVG drawing"),
    "text": (b"hello", "damaged or in a format that is not known"),
    "a header without pixels": (b"\x89PNG\r\n\x1a\n", "damaged|broken|truncated|cannot"),
    "a huge header": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1)
        + b"\x08\x02\0\0\0" + struct.pack(">I", 0),
        "too large|damaged|broken",
    ),
}  # fmt: skip


@pytest.mark.parametrize("data, message", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_image_gets_a_sentence_without_addresses(tmp_path, data, message):
    (tmp_path / "photo").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_image(tmp_path / "photo")
    assert "0x" not in str(error.value) and "photo" in str(error.value)
    if data:
        with pytest.raises(ValueError) as error:
            load_image_from_base64(base64.b64encode(data).decode())
        assert "0x" not in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_truncated_file_is_an_error(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    (tmp_path / "a").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="cannot read image .*a: ") as error:
        load_image(tmp_path / "a")
    assert "0x" not in str(error.value)


# --- base64 -----------------------------------------------------------------------------------


def spellings(data: bytes) -> dict[str, str]:
    plain = base64.b64encode(data).decode()
    return {
        "plain": plain,
        "wrapped": base64.encodebytes(data).decode(),
        "wrapped for mail": "\r\n".join(plain[i : i + 64] for i in range(0, len(plain), 64)),
        "data URL": f"data:image/jpeg;base64,{plain}",
        "data URL with a parameter": f"DATA:image/jpeg;charset=utf-8;base64,{plain}",
        "data URL, wrapped": f" data:image/jpeg;base64,\n{base64.encodebytes(data).decode()}",
    }


@pytest.mark.parametrize("text", spellings(photo(1)).values(), ids=spellings(b""))
def test_base64_text_may_be_wrapped_and_a_data_url(text):
    assert load_image_from_base64(text).size == SIZE
    assert decode_images([text])[0].size == SIZE


@pytest.mark.parametrize("text", ["data:image/png,%89PNG", "data:", "a b!", "=", "\0"])
def test_other_text_is_refused(text):
    # Python 3.10 reads nothing from "=", later ones refuse it.
    with pytest.raises(ValueError, match="image (is|from) .*(base64|data URL)"):
        load_image_from_base64(text)
