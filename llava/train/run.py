"""What all training programs share: their flags, and a run from its first step to its result."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape, glob
from importlib.util import find_spec

import transformers
from accelerate.state import AcceleratorState
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from llava.config_file import read_json
from llava.errors import errors_as_messages
from llava.program_parser import typed_command
from llava.spelling import did_you_mean

from .fsdp import check_fsdp
from .zero import check_deepspeed

#: says in a checkpoint which run it belongs to
RUN_FILE = "run.json"


class FlagParser(transformers.HfArgumentParser):
    """Flags are the fields of dataclasses, written out; a mistake is a ValueError."""

    def __init__(self, classes: Sequence[type]):
        super().__init__(classes, prog=typed_command(), allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)

    def parse(self, words: Sequence[str]) -> tuple:
        """One object of each class."""
        *parsed, left = self.parse_args_into_dataclasses(list(words), return_remaining_strings=True)
        if left:
            flag = next((word for word in left if word.startswith("--")), left[0])
            hint = did_you_mean(flag, self._option_string_actions)
            raise ValueError(f"there is no flag {flag}{hint}")
        return tuple(parsed)


def given_flags(words: Sequence[str]) -> set[str]:
    """Names of the flags on a command line; `--no_NAME` gives NAME a value as well."""
    names = {word.lstrip("-").split("=")[0] for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def check_trainer_flags(training_args, has_eval_data: bool = False) -> None:
    """Raises ValueError for flags of the Trainer that no program here can follow, before a model is
    loaded; has_eval_data: whether there is something to evaluate on."""
    check_evaluation(training_args, has_eval_data)
    check_fsdp(training_args)
    check_deepspeed(training_args)
    if training_args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {training_args.label_smoothing_factor} cannot be set: the "
            "losses are made in the models, without smoothing"
        )
    if training_args.max_steps <= 0 and not 0 < training_args.num_train_epochs < math.inf:
        raise ValueError(
            f"--num_train_epochs {training_args.num_train_epochs} must be a number above 0, or "
            "give --max_steps"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(training_args, name)) < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if training_args.group_by_length and training_args.group_by_modality_length:
        raise ValueError("--group_by_length and --group_by_modality_length: leave one out")
    asked, output = training_args.resume_from_checkpoint, training_args.output_dir
    if asked is not None and not os.path.isdir(asked):
        raise ValueError(
            f"--resume_from_checkpoint {asked}: there is no such folder; without this flag a run "
            "goes on from the newest checkpoint in --output_dir"
        )
    if "wandb" in training_args.report_to and find_spec("wandb") is None:
        raise ValueError(
            "--report_to wandb needs the package wandb: pip install wandb, or --report_to none "
            "(REPORT_TO=none in front of a recipe)"
        )
    finished = os.path.isfile(os.path.join(output, TRAINER_STATE_NAME))
    anew = training_args.overwrite_output_dir or asked is not None
    if finished and not anew and newest_checkpoint(output) is None:
        raise ValueError(
            f"--output_dir {output} holds what another run has trained, and no checkpoint to go on "
            "from: name another folder, or --overwrite_output_dir True"
        )
    if training_args.overwrite_output_dir and (newest := newest_checkpoint(output)):
        raise ValueError(
            f"--overwrite_output_dir: a run goes on from the newest checkpoint, which is {newest}: "
            "leave the flag out, or move the checkpoints away to begin anew"
        )


def check_evaluation(training_args, has_data: bool) -> None:
    """Raises ValueError when a run is to be evaluated and there is nothing to evaluate it on."""
    if training_args.evaluation_strategy != "no" and not has_data:
        strategy = training_args.evaluation_strategy.value
        raise ValueError(
            f"--evaluation_strategy {strategy} needs data to evaluate on, and there is none: "
            "leave it out"
        )


def run(prepare: Callable[[Sequence[str]], transformers.Trainer], args: Sequence[str] | None):
    """A whole training: prepared, continued from the checkpoint that is named, or else from the
    newest one in its output folder, and saved there. Returns its Trainer.

    prepare: makes the Trainer from the words of a command line
    args:    these words; None: those of this process, which then ends with one line if what they
             ask for cannot be done
    """
    words = list(sys.argv[1:] if args is None else args)
    with own_precision():
        with errors_as_messages() if args is None else nullcontext():
            trainer = prepare(words)
            asked = trainer.args.resume_from_checkpoint
            newest = newest_checkpoint(output := trainer.args.output_dir)
            if checkpoint := asked or newest:
                trainer.check_checkpoint(checkpoint)
            if asked and newest:
                check_newest(asked, newest)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        trainer.save_model(output)
    return trainer


def newest_checkpoint(folder: str) -> str | None:
    """The last checkpoint in the folder of a run; None without any. Where several processes begin
    a run, one of them makes the folder, and the others may be here before it."""
    return get_last_checkpoint(folder) if os.path.isdir(folder) else None


def check_newest(asked: str, newest: str) -> None:
    """Raises ValueError when the checkpoint that is asked for lies before the newest one of the
    run: those behind it would be overwritten one by one, and a new start go on from the last."""
    step = read_json(os.path.join(asked, TRAINER_STATE_NAME))["global_step"]
    if step < int(newest.rpartition("-")[2]):
        raise ValueError(
            f"--resume_from_checkpoint {asked} is of step {step}, but --output_dir holds {newest}: "
            "leave the flag out to go on from there, or move away what is newer"
        )


@contextmanager
def own_precision() -> Iterator[None]:
    """Keeps precision, DeepSpeed and FSDP of this run from those of later ones in this process; its
    Trainer can be used when it has ended."""

    def settings() -> dict[str, str]:
        prefixes = ("ACCELERATE_", "FSDP_")
        return {key: value for key, value in os.environ.items() if key.startswith(prefixes)}

    before = settings()
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        for key in settings().keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def trained_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of what is trained, whole also where DeepSpeed has split it."""
    return {
        name: list(getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def write_run(folder: str, facts: dict) -> None:
    with open(os.path.join(folder, RUN_FILE), "w", encoding="utf-8") as file:
        json.dump(facts, file)


def check_whole(folder: str, needed: Sequence[str]) -> None:
    """Raises ValueError unless a checkpoint has these files; a name may be a pattern."""
    if lacking := [name for name in needed if not glob(os.path.join(escape(folder), name))]:
        raise ValueError(
            f"{folder} cannot be continued from, it lacks {lacking[0]} (--save_only_model leaves "
            "out what a run goes on from): name another one with --resume_from_checkpoint, or "
            "move it away, and the run begins from the checkpoint before it, or anew"
        )


def check_same_run(folder: str, facts: dict, later: Collection[str] = ()) -> None:
    """Raises ValueError when a checkpoint is of a run with other `facts`; later: those that older
    checkpoints do not hold."""
    if not os.path.isfile(path := os.path.join(folder, RUN_FILE)):
        return  # written before there were such files
    there, here = read_json(path), json.loads(json.dumps(facts))
    for key in here:
        if key not in there and key in later:
            continue
        if there.get(key) != here[key]:
            what = key, there.get(key), here[key]
            if key == "trained":
                what = _first_difference(there.get(key) or {}, here[key])
            raise ValueError(
                f"{folder} is of another run ({what[0]}: {what[1]}, here {what[2]}): to begin "
                "anew choose another --output_dir"
            )


def _first_difference(there: dict, here: dict) -> tuple:
    names = [name for name in [*here, *there] if there.get(name) != here.get(name)]
    shapes = (known.get(names[0], "not trained") for known in (there, here))
    return names[0], *shapes
