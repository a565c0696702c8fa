"""Which frames are taken of a video, from folders, animations, files and lists."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from llava.video_io import at_times, load_video, num_taken, spread


def frames(count: int, size=(8, 6)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * n, 0, 0)) for n in range(count)]


def numbers(clip) -> list[int]:
    """Which of `frames` a clip holds."""
    return [round(frame.getpixel((0, 0))[0] / 10) for frame in clip.frames]


def write_folder(folder, count: int):
    for number, frame in enumerate(frames(count)):
        frame.save(folder / f"frame_{number}.png")
    return folder


def write_animation(path, durations: list[int]):
    first, *others = frames(len(durations))
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=durations, **lossless)
    return path


def test_a_list_is_taken_whole_at_its_own_rate():
    clip = load_video(frames(5))
    assert numbers(clip) == [0, 1, 2, 3, 4] and clip.fps == 2
    assert load_video(frames(5), fps=10).fps == 10


def test_too_many_frames_are_thinned_out_uniformly_and_count_for_more_time():
    clip = load_video(frames(21), fps=6, num_frames=7)
    assert numbers(clip) == [0, 3, 7, 10, 13, 17, 20] and clip.fps == pytest.approx(2)
    assert numbers(load_video(frames(3), num_frames=1)) == [0]


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    write_folder(tmp_path, 12)
    (tmp_path / "notes.txt").write_text("no frame")
    assert numbers(load_video(str(tmp_path))) == list(range(12))
    assert numbers(load_video(tmp_path, num_frames=4)) == [0, 4, 7, 11]


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_so_many_frames_a_second_are_taken_of_an_animation(tmp_path, kind):
    path = write_animation(tmp_path / f"clip.{kind}", [100] * 20)  # two seconds
    clip = load_video(path)
    assert numbers(clip) == [0, 6, 12, 19] and clip.fps == 2
    clip = load_video(path, fps=5)
    assert len(clip.frames) == 10 and clip.fps == 5
    assert len(load_video(path, fps=5, num_frames=6).frames) == 6


def test_a_picture_that_stands_long_is_taken_often(tmp_path):
    path = write_animation(tmp_path / "clip.gif", [100, 100, 1500, 100, 200])
    assert numbers(load_video(path, fps=5)) == [0, 2, 2, 4]
    assert at_times([0, 1, 5, 6], 4) == [0, 1, 1, 3]


@pytest.mark.parametrize(
    "case, expected",
    [
        ((100, 10.0, 2.0, 768), 20),
        ((100, 10.5, 2.0, 768), 20),  # an even number
        ((100, 0.5, 2.0, 768), 4),  # four at least
        ((3, 0.5, 2.0, 768), 2),
        ((1, 0.1, 2.0, 768), 1),
        ((10000, 5000.0, 2.0, 768), 768),
        ((10000, 5000.0, 2.0, 1), 1),
    ],
)
def test_how_many_frames_are_taken(case, expected):
    assert num_taken(*case) == expected


def test_frames_are_spread_from_the_first_to_the_last():
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 5) == [0, 1, 2] and spread(9, 1) == [0]


def test_what_is_no_video_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    photo, film = tmp_path / "photo.png", tmp_path / "film.mp4"
    frames(1)[0].save(photo)
    film.write_bytes(b"\0\0\0 ftypisom" + bytes(99))
    broken = write_animation(tmp_path / "broken.gif", [100] * 20)
    broken.write_bytes(broken.read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    for source, options, says in (
        (photo, {}, "is a single image, not a video"),
        (film, {}, r"video files need PyAV, .* pip install -e '\.\[video\]', or give a folder"),
        (broken, {}, "cannot read video .*broken.gif"),
        (tmp_path / "empty", {}, "holds no frames"),
        ([], {}, "the list is empty"),
        ([photo], {}, "must hold PIL images, not PosixPath"),
        (photo, {"fps": 0}, r"fps \(0\) must be above 0"),
        (photo, {"num_frames": 0}, r"num_frames \(0\) must be a whole number"),
    ):
        with pytest.raises(ValueError, match=says):
            load_video(source, **options)
    with pytest.raises(FileNotFoundError, match="video file not found"):
        load_video(tmp_path / "nowhere.gif")


class Container:
    """Stands for a file of 30 frames, 10 a second, opened by PyAV."""

    streams = SimpleNamespace(video=[SimpleNamespace(average_rate=10)])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def demux(self, stream):
        return [SimpleNamespace(pts=n) for n in range(30)] + [SimpleNamespace(pts=None)]

    def decode(self, video):
        return (SimpleNamespace(to_image=lambda frame=frame: frame) for frame in frames(25))


def test_files_are_read_by_pyav_where_it_is_installed(tmp_path, monkeypatch):
    """Frames that are counted and cannot be decoded are replaced by the last one that can."""
    reader = ModuleType("av")
    reader.open, reader.FFmpegError = lambda path: Container(), OSError
    monkeypatch.setitem(sys.modules, "av", reader)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"not an image")
    clip = load_video(film)
    assert numbers(clip) == [0, 6, 12, 17, 23, 24] and clip.fps == 2


@pytest.mark.parametrize("degrees", [0, -90, 90, 180])
def test_files_of_telephones_are_turned_upright(tmp_path, monkeypatch, degrees):
    """PyAV says by how many degrees a frame is turned against the clock to be shown."""
    stored = Image.new("RGB", (8, 6), "blue")
    stored.putpixel((0, 0), (255, 0, 0))
    frame = SimpleNamespace(to_image=lambda: stored, rotation=degrees)
    monkeypatch.setattr(Container, "decode", lambda self, video: iter([frame] * 30))
    reader = ModuleType("av")
    reader.open, reader.FFmpegError = lambda path: Container(), OSError
    monkeypatch.setitem(sys.modules, "av", reader)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"not an image")
    shown = load_video(film).frames[0]
    assert shown.size == ((8, 6) if degrees in (0, 180) else (6, 8))
    assert shown == stored.rotate(degrees, expand=True)


def test_sound_alone_is_no_video(tmp_path, monkeypatch):
    monkeypatch.setattr(Container, "streams", SimpleNamespace(video=()))
    reader = ModuleType("av")
    reader.open, reader.FFmpegError = lambda path: Container(), OSError
    monkeypatch.setitem(sys.modules, "av", reader)
    song = tmp_path / "song.m4a"
    song.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="song.m4a: it holds no pictures, only sound"):
        load_video(song)


def test_reading_needs_no_torch():
    code = "import sys, llava.video_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
