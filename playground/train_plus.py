"""Reinforcement on the playground: a small model learns to count and to give boxes in pruned
pictures.

    python -m playground.train_plus                              # LLaVA, in playground/data/plus
    python -m playground.train_plus --model QWEN_CHECKPOINT --reduce-layer 4 --output FOLDER

Questions are those of the glimpse (`glimpse_data.py`), of the kinds that suffer most where all but
the boxes is pruned. A number is rewarded where it is right, a box for what it shares with the right
one. Draws what the reward did.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from llava.eval.plotting import import_pyplot
from playground import glimpse_data
from playground.make_data import write_lines
from playground.train import DATA, LLAVA, here, run

#: how questions of a kind begin, and what an answer is rewarded for
KINDS = {
    "counting": (re.compile(r"How many|Are there"), "precision_match"),
    "boxes": (re.compile(r"Please provide the bounding box"), "share_box_iou"),
}
PICTURES, PER_PICTURE = 300, 24
LONGEST_ANSWER = {"counting": 8, "boxes": 32}  # tokens
WINDOW = 10  # steps that a point of the curve is the mean of


def write_questions(folder: Path, pictures: int = PICTURES, kinds: Iterable[str] = KINDS) -> Path:
    """Pictures, boxes and the yaml file that names the hard questions and their rewards."""
    glimpse_data.write(folder, pictures, PER_PICTURE)
    rows = list(map(json.loads, (folder / "boxes.jsonl").read_text().splitlines()))
    entries = []
    for kind in kinds:
        beginning, reward = KINDS[kind]
        file = folder / f"hard_{kind}.jsonl"
        write_lines(file, [row for row in rows if beginning.match(row["question"])])
        entries.append({"json_path": str(file), "score_funcs": [reward]})
    (folder / "hard.yaml").write_text(yaml.dump({"datasets": entries}))
    return folder / "hard.yaml"


def rewards(folder: Path) -> list[float]:
    """Mean reward of every step of a run, from its trainer_state.json."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["reward"] for entry in history if "reward" in entry]


def running_mean(values: list[float], window: int = WINDOW) -> list[float]:
    """Of the last `window` values, or of those there are."""
    parts = [values[max(0, n - window + 1) : n + 1] for n in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(values: list[float], path: Path) -> None:
    """The reward of every step, and the running mean."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, ".", color="0.7", label="one step")
    axes.plot(steps, running_mean(values), color="C0", label=f"mean of {WINDOW} steps")
    axes.set(xlabel="step", ylabel="reward")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Train, and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=LLAVA, help="to train an adapter on")
    parser.add_argument("--output", type=Path, default=DATA / "plus")
    parser.add_argument("--steps", type=int, default=190)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--answers", type=int, default=64, help="of a step, eight to a question")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument(
        "--reduce-layer", type=int, help="last layer that sees all tokens; default: the glimpse's"
    )
    parser.add_argument("--glimpse", type=Path, help="trained part, for its layer")
    parser.add_argument("--curve", type=Path, help="picture to draw; default: in OUTPUT")
    args = parser.parse_args()
    options = {
        "model_name_or_path": args.model,
        "train_dataset": write_questions(args.output, args.pictures, args.kinds),
        "img_dir": args.output,
        "per_device_train_batch_size": args.answers,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "max_completion_length": max(map(LONGEST_ANSWER.get, args.kinds)),
        "token_pass": "exact",  # what is rewarded is not the first token of an answer
        "learning_rate": args.rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "max_steps": args.steps,
    }
    if args.reduce_layer is not None:
        options["reduce_layer"] = args.reduce_layer
    if args.glimpse is not None:
        options["load_new_modules"] = args.glimpse
    output = args.output / "run"
    own = here(output) | {"logging_steps": 1, "save_steps": 10, "bf16": False}
    run("llava.train.train_glimpseprune_plus", options | own)
    values = rewards(output)
    draw(values, args.curve or args.output / "reward.png")
    part = max(len(values) // 5, 1)
    first, last = (sum(values[own]) / part for own in (slice(part), slice(-part, None)))
    print(f"reward: {first:.3f} in the first fifth of the steps, {last:.3f} in the last")


if __name__ == "__main__":
    main()
