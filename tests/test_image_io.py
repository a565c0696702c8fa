"""Images from files, base64 text and a small web server on this machine."""

import base64
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from llava.image_io import load_image, load_image_from_base64, to_rgb


def png_bytes(size=(6, 4), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return buffer.getvalue()


class Answers(BaseHTTPRequestHandler):
    """One path per way a download can go."""

    def do_GET(self):
        bodies = {"/ok": png_bytes(), "/page": b"<html>", "/large": png_bytes() + bytes(2**18)}
        self.send_response(200 if self.path in bodies or self.path == "/slow" else 404)
        self.end_headers()
        if self.path == "/slow":
            self.drip()
        self.wfile.write(bodies.get(self.path, b""))

    def drip(self):
        """One byte at a time, which no socket time-out notices."""
        try:
            for _ in range(30):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:  # the reader has given up
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_file_is_read_as_rgb(tmp_path):
    (tmp_path / "a.png").write_bytes(png_bytes(mode="RGBA"))
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        image = load_image(path)
        assert (image.size, image.mode) == ((6, 4), "RGB")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="image file not found: .*nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="not found"):
        load_image(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not an image", png_bytes((90, 90))[:60]])
def test_a_corrupt_file_is_named(tmp_path, data):
    (tmp_path / "broken.png").write_bytes(data)
    with pytest.raises(ValueError, match="cannot read image .*broken.png"):
        load_image(tmp_path / "broken.png")


def test_an_image_is_downloaded(server):
    assert load_image(f"{server}/ok").size == (6, 4)


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("/none", {}, "cannot download .*/none: 404"),
        ("/page", {}, "cannot read image .*/page"),
        ("/large", {"max_bytes": 2**17}, "larger than the limit of 131072 bytes"),
        ("/ok", {"max_pixels": 20}, "has 24 pixels, the limit is 20"),
        ("/slow", {"timeout": 0.3}, "no answer within 0.3 s"),
    ],
)
def test_a_failed_download_says_why(server, path, limits, message):
    with pytest.raises(ValueError, match=message):
        load_image(server + path, **limits)


def test_an_unreachable_server_is_named():
    with pytest.raises(ValueError, match="cannot download http://127.0.0.1:9/x.png"):
        load_image("http://127.0.0.1:9/x.png")


def test_base64_text_keeps_its_color_mode():
    text = base64.b64encode(png_bytes(mode="RGBA")).decode()
    assert load_image_from_base64(text).mode == "RGBA"


@pytest.mark.parametrize("text", ["!", "é", base64.b64encode(b"nothing").decode()])
def test_bad_base64_text_is_an_error(text):
    with pytest.raises(ValueError, match="base64 text"):
        load_image_from_base64(text)


def test_16_bit_grey_keeps_its_brightness():
    grey = Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16))
    assert to_rgb(grey).getpixel((0, 0)) == (156, 156, 156)
