"""Make the playground's two checkpoints: tower and decoder; or go on with llava.train.train.

    python -m playground.train all                  # what ships, in this order:
    python -m playground.train tower                # stage 1: the CLIP-type tower
    python -m playground.train decoder              # stage 2: the decoder, many short turns
    python -m playground.train finetune             # further: conversations, llava.train.train

Every stage has a time budget (--minutes), is seeded and continues where it stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from playground import fast_train, make_data

ROOT = Path(__file__).parent
CHECKPOINTS = ROOT / "checkpoints"
TOWER = CHECKPOINTS / "clip-playground-patch14-336"
LLAVA = CHECKPOINTS / "llava-v1.5-playground"
DATA = ROOT / "data"
FINETUNE_SCENES = 1_000_000  # training scenes that stages 1 and 2 do not reach
MINUTES = {"tower": 33, "decoder": 104}
DECODER_SCENES = 100_000  # first of the training scenes of stage 2


def tower(args: argparse.Namespace) -> None:
    """Stage 1."""
    words = ["--output", TOWER, "--keep", 128, "--dense-share", 0.2]
    _module("playground.train_tower", *words, "--minutes", args.minutes or MINUTES["tower"])


def decoder(args: argparse.Namespace) -> None:
    """Stage 2."""
    words = ["--tower", TOWER, "--output", LLAVA, "--features", DATA / "features", "--compile"]
    words += ["--first", DECODER_SCENES, "--pictures", 20_000, "--dense-share", 0.2]
    _module("playground.fast_train", *words, "--minutes", args.minutes or MINUTES["decoder"])


def finetune(args: argparse.Namespace) -> None:
    """Further training on real pictures and conversations with the project's own trainer."""
    from llava.train.train import train

    output = DATA / "finetune"
    if not (DATA / "train" / "conversations.json").exists():
        make_data.write_training(DATA / "train", FINETUNE_SCENES, args.pictures)
    train(finetune_words(output, args.pictures, args.learning_rate))
    publish(output)


def finetune_words(output: Path, pictures: int, learning_rate: float) -> list[str]:
    """The command line of finetuning."""
    batch = 4
    options = {
        "model_name_or_path": LLAVA,
        "version": "v1",
        "vision_tower": TOWER.resolve(),
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "data_path": DATA / "train" / "conversations.json",
        "image_folder": DATA / "train" / "images",
        "output_dir": output,
        "bf16": True,
        "use_cpu": True,
        "matrix_optim": "muon",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "num_train_epochs": 1,
        "max_steps": pictures // batch,
        "per_device_train_batch_size": batch,
        "model_max_length": 2048,
        "dataloader_num_workers": 0,
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": 0,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def publish(trained: Path) -> None:
    """Copy trained weights into the checkpoint folder, with its own configuration and tokenizer."""
    shutil.copy(trained / "model.safetensors", LLAVA / "model.safetensors")
    text = json.dumps(fast_train.config(), indent=2) + "\n"
    (LLAVA / "config.json").write_text(text, encoding="utf-8")


def _module(name: str, *words) -> None:
    subprocess.run([sys.executable, "-m", name, *map(str, words)], check=True)


def main() -> None:
    """Run one stage or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", "tower", "decoder", "finetune"))
    parser.add_argument("--minutes", type=float, help="time budget of stage 1 or 2")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures of finetuning")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of finetuning")
    args = parser.parse_args()
    stages = {"tower": tower, "decoder": decoder, "finetune": finetune}
    for name in ("tower", "decoder") if args.stage == "all" else [args.stage]:
        stages[name](args)


if __name__ == "__main__":
    main()
