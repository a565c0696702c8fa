"""Make what the playground ships: tower, decoder, and the trained parts of two pruning methods.

    python -m playground.train all                  # all of it, in this order:
    python -m playground.train tower                # stage 1: the CLIP-type tower
    python -m playground.train decoder              # stage 2: the decoder, many short turns
    python -m playground.train finetune             # stage 3: conversations, llava.train.train
    python -m playground.train twig                 # stage 4: llava.train.train_twigvlm
    python -m playground.train glimpse              # stage 5: llava.train.train_glimpseprune
    python -m playground.train twig_plus            # stage 6: llava.train.train_twigvlm_plus, twice

Stages 1 and 2 have a time budget (--minutes), the others a number of steps. All are seeded and
continue where they stopped. What stages 4 to 6 make fits the decoder of stage 3 alone.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava.model.placement import cpu_multiplies_bfloat16
from playground import glimpse_data, make_data

ROOT = Path(__file__).parent
CHECKPOINTS = ROOT / "checkpoints"
TOWER = CHECKPOINTS / "clip-playground-patch14-336"
LLAVA = CHECKPOINTS / "llava-v1.5-playground"
DATA = ROOT / "data"
WEIGHTS = "model.safetensors"
PICTURES = {"finetune": 6000, "twig": 10_000, "twig_plus": 2500}
MINUTES = {"tower": 33, "decoder": 161}
DECODER_SCENES = 100_000  # first of the training scenes of stage 2
CONVERSATION_SCENES = 1_000_000  # of stages 3, 4 and 6, which stages 1 and 2 do not reach
TURNS = {"finetune": 6, "twig": 12, "twig_plus": 1}  # of a conversation at most


def tower(args: argparse.Namespace) -> None:
    """Stage 1."""
    words = {"output": TOWER, "keep": 128, "dense-share": 0.2}
    run("playground.train_tower", words | {"minutes": args.minutes or MINUTES["tower"]})


def decoder(args: argparse.Namespace) -> None:
    """Stage 2."""
    words = {"tower": TOWER, "output": LLAVA, "features": DATA / "features"}
    words |= {"first": DECODER_SCENES, "pictures": 20_000, "dense-share": 0.13}
    words |= {"minutes": args.minutes or MINUTES["decoder"]}
    run("playground.fast_train", words, "--compile")


def finetune(args: argparse.Namespace) -> None:
    """Stage 3: the whole model on real pictures and conversations. What ships is the mean of the
    weights before and after, which keeps more of the single questions than either end loses."""
    output, start = DATA / "finetune", DATA / "finetune" / "start"
    if not start.exists():
        shutil.copytree(LLAVA, start, ignore=shutil.ignore_patterns("training_*"))
    options = conversations("finetune", start, output) | {
        "vision_tower": TOWER,
        "learning_rate": 3e-5,
    }
    run("llava.train.train", options | {"max_steps": args.steps or 300})
    save_mean(start / WEIGHTS, output / WEIGHTS, LLAVA / WEIGHTS)


def save_mean(one: Path, other: Path, result: Path) -> None:
    """Write the mean of two files of weights."""
    weights = load_file(other)
    for name, weight in load_file(one).items():
        weights[name] = weights[name].float().lerp(weight.float(), 0.5).to(weight.dtype)
    save_file(weights, result, metadata={"format": "pt"})


def twig(args: argparse.Namespace) -> None:
    """Stage 4: a twig of two layers on the embeddings; all visual tokens enter the layers below a
    twig, so with any below it no average of 64 of 576 could be reached."""
    output = DATA / "twig"
    options = conversations("twig", LLAVA, output) | {
        "twig_K": 0,
        "twig_T": 2,
        "learning_rate": 1e-3,
    }
    run("llava.train.train_twigvlm", options | {"max_steps": args.steps or 4000})
    _publish_part(output, "twigvlm")


def glimpse(args: argparse.Namespace) -> None:
    """Stage 5: a glimpse read in three layers up to the middle of the decoder, where its attention
    shows what the question names, and a small predictor."""
    data, output = DATA / "glimpse", DATA / "glimpse" / "run"
    glimpse_data.write(data, pictures=1500, per_picture=6)
    options = {
        "model_name_or_path": LLAVA,
        "train_dataset": data / "boxes.jsonl",
        "img_dir": data,
        "selected_layers": (1, 2, 3),
        "reduce_layer": 3,
        "attn_fuse_size": 64,
        "visual_cond_size": 128,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_steps": args.steps or 900,
    }
    run("llava.train.train_glimpseprune", options | here(output))
    _publish_part(output, "glimpseprune")


def twig_plus(args: argparse.Namespace) -> None:
    """Stage 6: the twig of stage 4 with a pruning head, distilled, then reinforced. On single
    questions: the pruning head hears the first of a conversation alone."""
    first, second = DATA / "twig_plus_1", DATA / "twig_plus_2"
    options = conversations("twig_plus", LLAVA, first) | {
        "stage": 1,
        "twig_path": CHECKPOINTS / "twigvlm-playground",
        "attention_layer": 4,  # what ships learned from it, though it is above the wipe's 3
        "learning_rate": 4e-4,
    }
    run("llava.train.train_twigvlm_plus", options | {"max_steps": args.steps or 400})
    options = conversations("twig_plus", LLAVA, second) | {
        "stage": 2,
        "twig_path": first,
        "num_groups": 16,
        "matrix_optim": "same",
        "learning_rate": 5e-4,
        "warmup_steps": 5,
        "per_device_train_batch_size": 8,
    }
    run("llava.train.train_twigvlm_plus", options | {"max_steps": args.steps or 80})
    _publish_part(second, "twigvlm-plus")


def conversations(stage: str, model: Path, output: Path) -> dict:
    """Options of `llava.train.train` for conversations about new scenes."""
    data = DATA / f"train_{stage}"
    if not (data / "conversations.json").exists():
        make_data.write_training(data, CONVERSATION_SCENES, PICTURES[stage], TURNS[stage])
    options = {
        "model_name_or_path": model,
        "version": "v1",
        "data_path": data / "conversations.json",
        "image_folder": data / "images",
        "image_aspect_ratio": "pad",
        "matrix_optim": "muon",
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "model_max_length": 2048,
        "dataloader_num_workers": 0,
    }
    return options | here(output)


def here(output: Path) -> dict:
    """Options of every Trainer for a run on this machine that can be continued."""
    on_gpu = torch.cuda.is_available()
    options = {"output_dir": output, "use_cpu": not on_gpu}
    options |= {"bf16": on_gpu or cpu_multiplies_bfloat16()}
    options |= {"save_steps": 100, "save_total_limit": 1, "logging_steps": 10}
    # What a short run left, without a checkpoint, is trained again.
    options |= {"overwrite_output_dir": not any(output.glob("checkpoint-*"))}
    return options | {"report_to": "none", "seed": 0}


def _publish_part(trained: Path, method: str) -> None:
    """Copy a trained part to where the method looks for it."""
    folder = CHECKPOINTS / f"{method}-playground"
    folder.mkdir(exist_ok=True)
    for name in (WEIGHTS, "config.json"):
        shutil.copy(trained / name, folder / name)


def run(module: str, options: dict, *flags: str) -> None:
    """Run a module with options as a program of its own."""
    subprocess.run([sys.executable, "-m", module, *as_words(options), *flags], check=True)


def as_words(options: dict) -> list[str]:
    """A command line; the values of a tuple stand one behind the other."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


STAGES = {f.__name__: f for f in (tower, decoder, finetune, twig, glimpse, twig_plus)}


def main() -> None:
    """Run one stage or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--minutes", type=float, help="time budget of stage 1 or 2")
    parser.add_argument("--steps", type=int, help="steps of stage 3 to 6, of each part")
    args = parser.parse_args()
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](args)


if __name__ == "__main__":
    main()
