"""Write questions with boxes around what they need, to train the glimpse of GlimpsePrune on.

    python -m playground.glimpse_data --pictures 1500         # playground/data/glimpse

The layout is that of Visual-CoT: boxes.jsonl, pictures in cot/playground. A folder that is already
written is left as it is.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image

from llava.progress import progress
from playground import questions, scenes
from playground.make_data import write_lines
from playground.questions import PLURALS, Question
from playground.scenes import COLORS, KINDS, Scene

ROOT = Path(__file__).parent
FIRST_SCENE = 2_000_000  # training scenes that the training of the checkpoint does not reach
SET = "playground"


def needed(scene: Scene, question: Question) -> list[tuple[int, int, int, int]]:
    """Boxes in px of what has to be seen to answer: the things and signs it names, or counts.

    Where it asks for what is not there, the things that resemble it, or else all things. A question
    about all things names nothing and needs the whole picture: how many there are is seen from how
    much they leave free.
    """
    text = question.bare
    if question.task == "description":
        return [item.box for item in (*scene.things, *scene.signs)]
    named = [item for item in (*scene.things, *scene.signs) if mentions(text, item.name)]
    if not named and "sign" in text:
        named = list(scene.signs)
    if not named:
        kinds = {kind for kind in KINDS if mentions(text, kind) or mentions(text, PLURALS[kind])}
        colors = {color for color in COLORS if mentions(text, color)}
        if not kinds and not colors:
            return [(0, 0, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)]
        if kinds and question.task != "existence":  # "Is the ring red?" is about the ring
            colors = set()
        named = [item for item in scene.things if item.kind in kinds or item.color in colors]
    return [item.box for item in named or scene.things]


def mentions(text: str, name: str) -> bool:
    """Whether the whole words occur."""
    return re.search(rf"\b{name}\b", text) is not None


def records(seed: int, image: str, count: int) -> list[dict]:
    """Lines of Visual-CoT's layout: `count` questions about one picture."""
    scene = scenes.make_scene(seed)
    asked = questions.ask(scene, np.random.default_rng((seed, 5)))[:count]
    size = {"width": scenes.IMAGE_SIZE, "height": scenes.IMAGE_SIZE}
    place = {"image": image, **size, "dataset": SET, "split": "train"}
    return [
        {
            "question": q.text,
            "answer": q.answer,
            **place,
            "bboxs": list(map(list, needed(scene, q))),
        }
        for q in asked
    ]


def write(folder: Path, pictures: int, per_picture: int) -> None:
    """Pictures, and boxes.jsonl last, so that a folder with it is complete."""
    if (folder / "boxes.jsonl").exists():
        return
    images = folder / "cot" / SET
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    first = scenes.TRAIN_SEEDS + FIRST_SCENE
    for seed in progress(range(first, first + pictures), "scenes", "pictures"):
        name = f"{seed:08d}.png"
        image = Image.fromarray(scenes.render(scenes.make_scene(seed)))
        image.save(images / name, compress_level=1)
        lines += records(seed, name, per_picture)
    write_lines(folder / "boxes.jsonl", lines)


def main() -> None:
    """Write the training data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "glimpse")
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--per-picture", type=int, default=6, help="questions about each")
    args = parser.parse_args()
    write(args.output, args.pictures, args.per_picture)


if __name__ == "__main__":
    main()
