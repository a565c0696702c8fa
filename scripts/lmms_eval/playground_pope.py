"""What playground_pope.yaml asks lmms-eval to call: a question's picture and its text."""

from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).resolve().parents[2] / "playground/benchmark/images"


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The picture of a question."""
    with Image.open(IMAGES / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: dict) -> str:
    """The question, as the benchmark's own question file asks it."""
    return f"{doc['text']}\nAnswer the question using a single word or phrase."
