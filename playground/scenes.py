"""Generated scenes: a picture of small textured things and signs, with its exact annotation.

A scene is a pure function of its seed. Every thing is two to three patches wide and told by its
colour and by a texture that shows inside one or two 14 px patches; a sign is a light plate with a
short word or number, about one patch per character. Needs numpy and Pillow only.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 336
COLORS = {
    "red": (214, 30, 38),
    "green": (26, 150, 52),
    "blue": (28, 62, 216),
    "yellow": (248, 222, 30),
    "purple": (150, 34, 190),
    "cyan": (40, 216, 232),
    "black": (14, 14, 16),
    "white": (252, 252, 250),
}
SIGN_COLORS = ("red", "green", "blue", "purple", "black")
KINDS = ("ball", "ring", "star", "ladder", "fence", "rope", "net", "board", "dice", "wall")
WORDS = tuple(
    "cat dog sun tea map bus car log pen cab bed tap sea oat bag bat coat boat goat road rose moon "
    "lamp gold team seal post camp note open stop land sand pool bell boot salt gate past soup "
    "peas tent rest plan tuna menu deal".split()
)
CHARACTERS = "".join(sorted(set("".join(WORDS)))) + "0123456789"
CELL = 14  # width of one character on a sign, px
CELL_HEIGHT = 18
PLATE_MARGIN = 5
GAP = 5  # smallest distance between two things, px
SIZES = tuple(range(30, 45, 2))
TRAIN_SEEDS = 0  # training scenes count upwards from here
HELD_OUT_SEEDS = 1_000_000_000  # benchmark and validation scenes count upwards from here


@dataclass(frozen=True)
class Thing:
    """One coloured thing; box is (left, top, right, bottom) in px, right and bottom exclusive."""

    color: str
    kind: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """What a question calls it."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Sign:
    """A light plate whose border and text have one colour."""

    color: str
    text: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """What a question calls it."""
        return f"{self.color} sign"

    def character_center(self, index: int) -> tuple[float, float]:
        """Centre (x, y) in px of one character."""
        left, top = self.box[:2]
        return (
            left + PLATE_MARGIN + CELL * (index + 0.5),
            top + PLATE_MARGIN + CELL_HEIGHT / 2,
        )


@dataclass(frozen=True)
class Scene:
    """The annotation of one picture; size is (width, height) in px."""

    seed: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)


def make_scene(seed: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Scene:
    """The annotation of the scene with this seed: 3 to 7 things, no two alike, and 1 or 2 signs;
    fewer where a picture of this (width, height) has no room for them."""
    rng = np.random.default_rng(seed)
    boxes: list[tuple[int, int, int, int]] = []
    signs = []
    colors = rng.permutation(SIGN_COLORS)
    for index in range(1 + int(rng.random() < 0.4)):
        text = _sign_text(rng)
        plate = (CELL * len(text) + 2 * PLATE_MARGIN, CELL_HEIGHT + 2 * PLATE_MARGIN)
        box = _place(rng, boxes, plate, size)
        if box is not None:
            signs.append(Sign(str(colors[index]), text, box))
    things = []
    for color, kind in _thing_names(rng, int(rng.integers(3, 8))):
        side = int(rng.choice(SIZES))
        box = _place(rng, boxes, (side, side), size)
        if box is not None:
            things.append(Thing(color, kind, box))
    return Scene(seed, tuple(things), tuple(signs), size)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (height, width, 3) uint8."""
    rng = np.random.default_rng((scene.seed, 1))
    image = _background(rng, scene.size)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        ink = np.clip(np.array(COLORS[thing.color]) + rng.integers(-10, 11, 3), 0, 255)
        _blend(image[top:bottom, left:right], thing_mask(thing.kind, right - left), ink)
    for sign in scene.signs:
        left, top, right, bottom = sign.box
        plate = image[top:bottom, left:right]
        plate[:] = 240 + rng.integers(-6, 7)
        _blend(plate, _sign_mask(sign.text), np.array(COLORS[sign.color]))
    return image


def _sign_text(rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        return str(rng.choice(WORDS))
    length = int(rng.integers(2, 4))
    return str(rng.integers(10 ** (length - 1), 10**length))


def _thing_names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Different (colour, kind) pairs of few colours and kinds, so that counts above one occur."""
    colors = rng.permutation(list(COLORS))[: rng.integers(3, 6)]
    kinds = rng.permutation(KINDS)[: rng.integers(3, 7)]
    pairs = [(str(color), str(kind)) for color in colors for kind in kinds]
    return [pairs[i] for i in rng.permutation(len(pairs))[:count]]


def _place(rng, boxes: list, item: tuple, size: tuple) -> tuple[int, int, int, int] | None:
    """A free place for an item (width, height) in a picture of that size, added to boxes; None
    after 60 failed tries."""
    width, height = item
    for _ in range(60):
        left = int(rng.integers(2, size[0] - width - 1))
        top = int(rng.integers(2, size[1] - height - 1))
        box = (left, top, left + width, top + height)
        if not any(_near(box, other) for other in boxes):
            boxes.append(box)
            return box
    return None


def _near(one, other) -> bool:
    return (
        one[0] < other[2] + GAP
        and other[0] < one[2] + GAP
        and one[1] < other[3] + GAP
        and other[1] < one[3] + GAP
    )


def _blend(area: np.ndarray, mask: np.ndarray, ink: np.ndarray) -> None:
    """Paint ink over area (h, w, 3) in place where mask (h, w) in 0..1 says so."""
    alpha = mask[..., None]
    area[:] = (area * (1 - alpha) + ink * alpha).astype(np.uint8)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Soft gradient, low-contrast blotches and fine noise around a middle grey."""
    coarse = rng.uniform(110, 165) + rng.uniform(-14, 14, (5, 5, 3))
    small = _enlarge(coarse.astype(np.uint8), (28, 28)) + rng.normal(0, 7, (28, 28, 1))
    large = _enlarge(np.clip(small, 0, 240).astype(np.uint8), size)
    top, left = rng.integers(0, 64, 2)
    noise = _noise_pool().take(range(top, top + size[1]), 0, mode="wrap")
    noise = noise.take(range(left, left + size[0]), 1, mode="wrap")
    return large + noise[..., None]  # the grey stays far from 255, so uint8 cannot wrap


def _enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


@lru_cache
def _noise_pool() -> np.ndarray:
    """(400, 400) uint8 fine noise, 0 to 10."""
    return np.random.default_rng(0).integers(0, 11, (400, 400)).astype(np.uint8)


@cache
def thing_mask(kind: str, size: int) -> np.ndarray:
    """Ink mask (size, size) float32 in 0..1 of a kind of thing."""
    fine = 4  # sub-pixels per pixel and direction
    axis = (np.arange(size * fine) + 0.5) / fine
    x, y = np.meshgrid(axis, axis)
    ink = _texture(kind, x, y, size)
    return ink.reshape(size, fine, size, fine).mean((1, 3)).astype(np.float32)


def _texture(kind: str, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Whether ink lies at (x, y) px from the left and top edge of a thing of this size."""
    middle = size / 2
    radius = np.hypot(x - middle, y - middle)
    disc = radius <= middle
    if kind == "ball":
        return disc
    if kind == "ring":
        return disc & (radius >= middle - 7)
    if kind == "star":
        angle = np.arctan2(y - middle, x - middle)
        return disc & ((np.cos(6 * angle) > 0.1) | (radius < 4))
    if kind == "ladder":
        return y % 8 < 4.5
    if kind == "fence":
        return x % 8 < 4.5
    if kind == "rope":
        return (x + y) % 11 < 6
    if kind == "net":
        return (x % 9 < 2.5) | (y % 9 < 2.5)
    if kind == "board":
        return (x // 6 + y // 6) % 2 == 0
    if kind == "dice":
        return np.hypot(x % 10 - 5, y % 10 - 5) < 3.4
    if kind == "wall":
        row = y // 9
        return (y % 9 < 7) & ((x + 6 * (row % 2)) % 12 < 10)
    raise ValueError(f"unknown kind {kind!r}; possible: {', '.join(KINDS)}")


@cache
def _glyph(character: str) -> np.ndarray:
    """Ink mask (18, 14) float32 of one character, bold and centred on its own ink."""
    large = Image.new("L", (CELL * 4, CELL_HEIGHT * 4))
    draw = ImageDraw.Draw(large)
    font = ImageFont.load_default(68)
    draw.text((CELL * 2, 56), character, fill=255, font=font, anchor="ms", stroke_width=2)
    small = large.resize((CELL, CELL_HEIGHT), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255


@lru_cache(maxsize=4096)
def _sign_mask(text: str) -> np.ndarray:
    """Ink mask of a whole sign: border and characters."""
    width, height = CELL * len(text) + 2 * PLATE_MARGIN, CELL_HEIGHT + 2 * PLATE_MARGIN
    mask = np.ones((height, width), np.float32)
    mask[2:-2, 2:-2] = 0
    for index, character in enumerate(text):
        left = PLATE_MARGIN + CELL * index
        mask[PLATE_MARGIN:-PLATE_MARGIN, left : left + CELL] = _glyph(character)
    return mask
