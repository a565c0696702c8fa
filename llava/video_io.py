"""Reading videos: folders of frames, animations (GIF, WebP), and, with PyAV, video files.

How many frames are taken follows the public chat helper of Qwen2.5-VL: so many a second, at least
`LEAST` and at most `MOST`, an even number, spread uniformly over the video.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence, UnidentifiedImageError

from llava.errors import how_to_install
from llava.image_io import displayed, load_image

#: frames a second that are taken, or that frames of unknown source are taken for
FPS = 2.0
#: fewest and most frames that are taken of a video
LEAST, MOST = 4, 768
#: what the frames in a folder are called
FRAME_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: milliseconds that a picture of an animation stands where the file says nothing, as in browsers
USUAL_DURATION = 100
#: degrees against the clock that a frame has to be turned by to be seen upright -> how
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
NO_READER = (
    f"video files need PyAV, which is not installed: {how_to_install('video')}, or give a folder "
    "of frames, or an animated GIF or WebP"
)


@dataclass
class Clip:
    """Frames of a video: RGB images of one size, `fps` of them a second."""

    frames: list[Image.Image]
    fps: float


def load_video(
    source: str | Path | Sequence[Image.Image],
    fps: float | None = None,
    num_frames: int | None = None,
) -> Clip:
    """Frames of a video file, of an animation, of the images in a folder by name, or of a list.

    fps:        frames a second to take; of frames in a folder or a list, which are all taken, how
                many of them make a second. None: 2
    num_frames: the most frames to take, spread uniformly. None: 768
    Raises FileNotFoundError for a missing file and ValueError for what cannot be read.
    """
    fps, most = FPS if fps is None else fps, MOST if num_frames is None else num_frames
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps ({fps}) must be above 0: frames a second")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"num_frames ({most!r}) must be a whole number of at least 1 frame")
    if not isinstance(source, (str, Path)):
        if odd := [type(frame).__name__ for frame in source if not isinstance(frame, Image.Image)]:
            raise ValueError(f"a list of frames must hold PIL images, not {odd[0]}")
        if not source:
            raise ValueError("a video needs at least one frame, and the list is empty")
        chosen = spread(len(source), most)
        frames = [displayed(source[number]) for number in chosen]
        return Clip(frames, fps * len(chosen) / len(source))
    path = Path(source)
    if path.is_dir():
        return read_folder(path, fps, most)
    if not path.is_file():
        raise FileNotFoundError(f"video file not found: {path}")
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        return read_file(path, fps, most)
    with image:
        if getattr(image, "n_frames", 1) == 1:
            raise ValueError(f"{path} is a single image, not a video: give it as an image")
        try:
            return read_animation(image, fps, most)
        except Exception as error:  # a broken file can raise nearly anything
            raise ValueError(f"cannot read video {path}: {error}") from error


def read_folder(folder: Path, fps: float, most: int) -> Clip:
    """The images in a folder, in the order of the numbers in their names."""
    names = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_TYPES]
    if not names:
        raise ValueError(
            f"the folder {folder} holds no frames: images that end in {', '.join(FRAME_TYPES)}"
        )
    names.sort(key=lambda path: [(len(n), n) for n in re.findall(r"\d+|\D+", path.name)])
    chosen = spread(len(names), most)
    frames = [load_image(names[number]) for number in chosen]
    return Clip(frames, fps * len(chosen) / len(names))


def read_animation(image: Image.Image, fps: float, most: int) -> Clip:
    """The pictures of an animated image, at the times they are shown."""
    starts, end = [], 0
    for picture in ImageSequence.Iterator(image):
        picture.load()  # WebP tells how long a picture stands when it is decoded
        starts.append(end)
        end += picture.info.get("duration") or USUAL_DURATION
    seconds = end / 1000
    chosen = at_times(starts, num_taken(len(starts), seconds, fps, most))
    frames = []
    for number in chosen:
        image.seek(number)
        frames.append(displayed(image.copy()))
    return Clip(frames, len(chosen) / seconds)


def read_file(path: Path, fps: float, most: int) -> Clip:
    """A video file, upright; it is read twice, so that no more frames than are taken are in
    memory."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: {NO_READER}") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it holds no pictures, only sound or data")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            total = sum(packet.pts is not None for packet in container.demux(stream))
        if not total or not rate:
            raise ValueError("it holds no frames, or does not say how many there are in a second")
        seconds = total / rate
        chosen = spread(total, num_taken(total, seconds, fps, most))
        with av.open(str(path)) as container:
            frames = pick(map(upright, container.decode(video=0)), chosen)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"cannot read video {path}: {error}") from error
    return Clip(frames, len(frames) / seconds)


def upright(frame) -> Image.Image:
    """A frame of PyAV as a player shows it: a telephone stores it as the sensor saw it, and says
    beside it how to turn it (PyAV 14 or later tells)."""
    turn = TURNS.get(getattr(frame, "rotation", 0) % 360)
    image = frame.to_image()
    return image if turn is None else image.transpose(turn)


def num_taken(total: int, seconds: float, fps: float, most: int) -> int:
    """How many of `total` frames of a video are taken: an even number, or one."""
    wanted = min(max(seconds * fps, LEAST), most, total)
    return max(int(wanted) // 2 * 2, 1)


def spread(total: int, count: int) -> list[int]:
    """Numbers of at most `count` of `total` frames, the first and the last among them."""
    if count >= total:
        return list(range(total))
    step = (total - 1) / max(1, count - 1)
    return [round(number * step) for number in range(count)]


def at_times(starts: list[float], count: int) -> list[int]:
    """Numbers of the pictures that stand at `count` times, which divide the time from the first
    start to the last equally."""
    times = (starts[-1] * number / max(1, count - 1) for number in range(count))
    return [bisect_right(starts, time) - 1 for time in times]


def pick(frames: Iterable[Image.Image], chosen: list[int]) -> list[Image.Image]:
    """The frames with the numbers `chosen`, ascending; the last there is for those beyond it."""
    found, wanted, last = [], iter(chosen), None
    number = next(wanted)
    for place, frame in enumerate(frames):
        while place == number:
            found.append(frame)
            number = next(wanted, None)
        if number is None:
            return found
        last = frame
    if last is None:
        raise ValueError("it holds no frames")
    return found + [last] * (len(chosen) - len(found))
