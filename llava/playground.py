"""Where the small checkpoint and benchmark of the repository are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "playground"
CHECKPOINT = "checkpoints/llava-v1.5-playground"
BENCHMARK = "benchmark"
#: checkpoint -> what stands between the method and "playground" in the name of its trained parts
PARTS = {
    CHECKPOINT: "",
    "checkpoints/qwen2.5-vl-playground": "qwen2.5-vl-",
    "checkpoints/qwen2.5-vl-plus-playground": "qwen2.5-vl-plus-",
}


def default_model_path(given: str | None = None) -> str:
    """`given`, or where no model was the folder of the playground checkpoint.

    Raises FileNotFoundError where that is not, and ValueError for an empty name, which an unset
    variable of a shell leaves behind.
    """
    if given == "":
        raise ValueError("--model-path is empty: name a model, or leave the option out")
    return str(_existing(CHECKPOINT)) if given is None else given


def benchmark_dir() -> str:
    """Folder of the playground benchmark. Raises FileNotFoundError where it is not."""
    return str(_existing(BENCHMARK))


def default_image() -> str:
    """An image of the playground benchmark: the first by name."""
    folder = _existing(f"{BENCHMARK}/images")
    images = sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png", ".webp"))
    if not images:
        raise FileNotFoundError(f"{folder} holds no images")
    return str(images[0])


def trained_part(method: str, model_path: str) -> str | None:
    """Folder of the trained part of a pruning method that comes with a playground checkpoint.

    None unless `model_path` is such a checkpoint and the part is there: what was trained on one
    model fits no other, so a learned method never falls back to it elsewhere.
    """
    for checkpoint, own in PARTS.items():
        if model_path and Path(model_path).resolve() == (ROOT / checkpoint).resolve():
            folder = ROOT / f"checkpoints/{method.replace('_', '-')}-{own}playground"
            return str(folder) if folder.is_dir() else None
    return None


def _existing(name: str) -> Path:
    path = ROOT / name
    if not path.is_dir():
        raise FileNotFoundError(
            f"the playground is not here ({path} is missing): it comes with a clone of the "
            "repository, not with the installed package; name a checkpoint with --model-path (and, "
            "where one is asked for, an image with --image-file)"
        )
    return path
