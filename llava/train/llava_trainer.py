"""The Trainer of transformers with our sampler, learning-rate groups and checkpoints."""

from __future__ import annotations

import logging
import math
import os
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from .family import FULL, LORA, PROJECTOR, Family
from .fsdp import announce_prefetch, settle_fsdp
from .llava_family import LlavaFamily
from .optimizer import MuonWith, decoder_matrices, parameter_groups, split_matrices
from .run import check_same_run, check_whole, trained_shapes, write_run
from .sampler import (
    ChunkSampler,
    EpochRandomSampler,
    LengthGroupedSampler,
    tell_difference,
    whole_steps,
)
from .saving import (
    NON_LORA_FILE,
    PROJECTOR_FILE,
    PRUNER_FILE,
    is_written,
    lora_state,
    non_lora_state,
    projector_state,
    save_full,
    save_lora,
    save_projector,
    unwrapped,
)
from .zero import settle_sizes

logger = logging.getLogger(__name__)


class NothingLeft(Exception):
    """The checkpoint that a run goes on from holds its last step."""


class SamplerEpochs(TrainerCallback):
    """Tells the sampler which epoch begins, also in a resumed run; steps: those of an epoch.

    The loader's own `set_epoch` does not reach the sampler where several processes share it and
    accelerate is older than the newest.
    """

    def __init__(self, sampler, steps: int):
        self.sampler, self.steps = sampler, steps

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.start_epoch(state.global_step // self.steps)


class ResumedSteps(TrainerCallback):
    """What transformers gets wrong when a run goes on from a checkpoint: it logs, saves and
    evaluates as often as the run before did, whatever the flags say now; and where no step is left,
    for which NothingLeft is raised here, it takes another one.

    begun: the step that the run goes on from
    """

    begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = state.global_step
        for name in ("logging_steps", "save_steps", "eval_steps"):
            if (often := getattr(args, name)) is not None:  # below 1: a share of the run
                steps = math.ceil(state.max_steps * often) if often < 1 else often
                setattr(state, name, steps)
        if 0 < state.max_steps <= state.global_step:
            raise NothingLeft


class LLaVATrainer(Trainer):
    """Trains a model of `family`; `args` are `llava.train.arguments.TrainingArguments`.

    The order of samples depends on seed and epoch only, so a resumed run sees the same batches.
    """

    #: whether samples that do not fill a step are left out, and how often in a row each one comes
    full_batches, repeats = False, 1
    _final = False

    def __init__(self, *args, family: Family | None = None, **kwargs):
        self.family = family or LlavaFamily()
        super().__init__(*args, **kwargs)
        self._resumed = ResumedSteps()
        self.add_callback(self._resumed)
        settle_sizes(self.args, self.hidden_size)
        self._trained = trained_shapes(self.model)  # before anything wraps the model

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.model.config.hidden_size

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp:
            announce_prefetch(self.args)
        # transformers 4.37 passes arguments that accelerate 1.0 has removed.
        self.accelerator = Accelerator(
            dataloader_config=DataLoaderConfiguration(
                dispatch_batches=self.args.dispatch_batches, split_batches=self.args.split_batches
            ),
            deepspeed_plugin=self.args.deepspeed_plugin,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=self.args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
        self.gather_function = self.accelerator.gather_for_metrics
        state = self.accelerator.state
        self.is_deepspeed_enabled = getattr(state, "deepspeed_plugin", None) is not None
        self.is_fsdp_enabled = getattr(state, "fsdp_plugin", None) is not None
        if self.is_fsdp_enabled and self.args.fsdp:  # a launcher may ask for it as well
            settle_fsdp(state.fsdp_plugin, self.args)
        if self.is_deepspeed_enabled and getattr(self.args, "hf_deepspeed_config", None) is None:
            self.propagate_args_to_deepspeed()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        # transformers 4.37 calls a form of autocast that torch has deprecated.
        if not self.use_cpu_amp:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast("cpu", dtype=self.amp_dtype, cache_enabled=cache_enabled)

    def train(self, *args, **kwargs):
        """As of every Trainer. A checkpoint of the last step is loaded, and nothing is trained."""
        try:
            return super().train(*args, **kwargs)
        except NothingLeft:
            steps = self.state.global_step, self.state.max_steps
            logger.warning("the checkpoint is of step %d of %d: nothing is left to train", *steps)
        self.is_in_train = False
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, math.nan, {})

    def log(self, logs: dict[str, float]) -> None:
        """As of every Trainer, which counts the steps before a checkpoint as if this run had taken
        them, in its time and with a loss of 0."""
        if "train_runtime" in logs and self._resumed.begun:
            steps = self.state.global_step - self._resumed.begun
            for key in [key for key in logs if key.endswith("_per_second")]:
                logs[key] = round(logs[key] * steps / self.state.max_steps, 3)
            logs["train_loss"] *= self.state.global_step / steps
        super().log(logs)

    # --- what is trained, in which order ------------------------------------------------------

    @property
    def data_seed(self) -> int:
        """The seed of the order of samples."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def epoch_size(self, batch: int) -> tuple[int, int]:
        """(steps, samples) of an epoch; batch: samples that a process takes at once."""
        args = self.args
        return whole_steps(
            len(self.train_dataset) * self.repeats,
            batch if args.split_batches else batch * args.world_size,
            args.gradient_accumulation_steps,
            drop_last=self.full_batches or args.dataloader_drop_last,
        )

    def num_examples(self, dataloader) -> int:
        """The samples that an epoch takes of the training's data, or all of other data."""
        data = getattr(dataloader, "dataset", None)
        if data is self.train_dataset and hasattr(self, "order"):
            return len(self.order)
        return super().num_examples(dataloader)

    def _get_train_sampler(self):
        args, batch, size = self.args, self._train_batch_size, len(self.train_dataset)
        parts = args.gradient_accumulation_steps  # of a step, of all processes
        parts *= 1 if args.split_batches else args.world_size
        steps, taken = self.epoch_size(batch)
        if self.full_batches:
            self.order = ChunkSampler(size, self.data_seed, batch * parts, self.repeats)
        else:
            tell_difference(size, taken, batch * parts)
            self.order = self._free_order(batch, parts, taken)
        self.add_callback(SamplerEpochs(self.order, steps))
        return self.order

    def _free_order(self, batch: int, parts: int, taken: int) -> Sampler:
        """The order of the flags; parts: batches of a step, in all processes."""
        args, data, seed = self.args, self.train_dataset, self.data_seed
        by_modality = args.group_by_modality_length
        if not by_modality and not args.group_by_length:
            return EpochRandomSampler(len(data), seed, taken)
        return LengthGroupedSampler(
            batch,
            world_size=parts,
            lengths=data.modality_lengths if by_modality else data.lengths,
            group_by_modality=by_modality,
            seed=seed,
            taken=taken,
        )

    def create_optimizer(self):
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        groups = parameter_groups(
            self.model,
            args.weight_decay,
            args.mm_projector_lr,
            args.mm_vision_tower_lr,
            self.family.part_of,
        )
        if args.matrix_optim not in ("same", "muon"):
            raise ValueError(f"matrix_optim {args.matrix_optim!r} is unknown, choose same or muon")
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if args.matrix_optim == "same":
            self.optimizer = optimizer_class(groups, **options)
        elif self.is_deepspeed_enabled:
            raise ValueError("matrix_optim muon does not work with DeepSpeed, choose same")
        else:
            matrices, others = split_matrices(groups, decoder_matrices(self.model))
            rest = optimizer_class(others, **options)
            self.optimizer = MuonWith(matrices, rest, lr=args.learning_rate)
        if optimizer_class.__name__ == "Adam8bit":
            _keep_embeddings_exact(self.model)
        return self.optimizer

    # --- checkpoints --------------------------------------------------------------------------

    @property
    def deepspeed(self):
        """DeepSpeed's engine; None without DeepSpeed, and before the first step."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine) -> None:
        if engine is not None:  # its checkpoints hold what is trained, see below
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
            engine.load_checkpoint = partial(engine.load_checkpoint, load_module_strict=False)
        self._engine = engine

    @property
    def saved_part(self) -> str:
        """What checkpoints hold, see `Family.saved_part`."""
        return self.family.saved_part(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained part of the model; called by every process.

        Checkpoints during training (`_internal_call`) keep the training precision. The final result
        is written in the compute precision, and its projector file beside a `checkpoint-N` folder.
        """
        folder = output_dir or self.args.output_dir
        if self.saved_part == FULL:
            self._final = not _internal_call
            # What is split between processes is collected by all of them, in the first alone.
            split = self.is_fsdp_enabled or self.is_deepspeed_enabled
            state = self.accelerator.get_state_dict(self.model_wrapped) if split else None
            if self.args.should_save:
                self._save(folder, state)
            return
        if self.saved_part == LORA:
            states = lora_state(self.model), non_lora_state(self.model)
        else:
            states = (projector_state(self.model),)
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            if self.saved_part == LORA:
                save_lora(self.model, folder, *states)
            else:
                save_projector(self.model, folder, *states, beside=not _internal_call)
            self._save_extras(folder)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        dtype = self.args.compute_dtype if self._final else None
        save_full(self.model, folder, state, dtype, self.family)
        self._save_extras(folder)

    def _save_extras(self, folder: str) -> None:
        self.family.save_beside(folder, self.saved_part, self.tokenizer)
        if weights := self._pruner_state():
            torch.save(weights, os.path.join(folder, PRUNER_FILE))

    def _pruner_state(self) -> dict:
        module = getattr(unwrapped(self.model), "pruner_module", None)
        return {} if module is None else module.state_dict()

    def run_settings(self) -> dict:
        """What makes runs with equal shapes and data different from one another."""
        return {}

    def run_facts(self) -> dict:
        """What a checkpoint says of its run; one that says otherwise is of another."""
        facts = {"trains": type(self).__name__, "samples": len(self.train_dataset)}
        return facts | self.run_settings() | {"trained": self._trained} | self.run_order()

    def run_order(self) -> dict:
        """What decides which samples a step takes, and in which order."""
        args = self.args
        sizes = {"processes": args.world_size} if self.is_deepspeed_enabled else {}
        return sizes | {
            "seed": args.seed,
            "data_seed": self.data_seed,
            "per_device_train_batch_size": args.train_batch_size,
            "processes x gradient_accumulation_steps": args.world_size
            * args.gradient_accumulation_steps,
            "steps of an epoch": self.epoch_size(args.train_batch_size)[0],
            "group_by_length": args.group_by_length,
            "group_by_modality_length": args.group_by_modality_length,
        }

    def check_checkpoint(self, folder: str) -> None:
        """Raises ValueError unless this run can continue exactly from a checkpoint."""
        needed = ["trainer_state.json"]
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled  # which save in ways of their own
        if not split:
            needed += ["optimizer.pt", "scheduler.pt", "rng_state*.pth"]
        check_whole(folder, needed)
        check_same_run(folder, self.run_facts(), later=self.run_order())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_run(output_dir, self.run_facts())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        def read(name: str) -> dict:
            path = os.path.join(resume_from_checkpoint, name)
            return torch.load(path, map_location="cpu", weights_only=True)

        model = self.model if model is None else model
        if self.saved_part == FULL:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.saved_part == PROJECTOR:
            load_some(model, read(PROJECTOR_FILE))
        else:
            from peft import load_peft_weights, set_peft_model_state_dict

            weights = load_peft_weights(resume_from_checkpoint, device="cpu")
            set_peft_model_state_dict(model, weights)
            load_some(model, read(NON_LORA_FILE))
        if self._pruner_state():
            unwrapped(model).pruner_module.load_state_dict(read(PRUNER_FILE))

    def _load_best_model(self) -> None:
        # transformers would look for the weights of a whole model.
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        kept = [n for n in load_result.missing_keys if is_written(self.model, n, self.family)]
        load_result.missing_keys[:] = kept
        super()._issue_warnings_after_load(load_result)

    def _load_rng_state(self, checkpoint) -> None:
        # The file holds numpy's state as an array, which torch.load refuses unless told.
        allowed = [
            np.ndarray,
            np.dtype,
            type(np.dtype(np.uint32)),
            np.zeros(0).__reduce__()[0],
        ]
        with torch.serialization.safe_globals(allowed):
            super()._load_rng_state(checkpoint)


def load_some(model: torch.nn.Module, state: dict) -> None:
    """Copies `state` into the model; ValueError if it names a parameter the model lacks."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"the checkpoint holds weights the model lacks: {', '.join(unexpected)}")


def _keep_embeddings_exact(model: torch.nn.Module) -> None:
    """Optimizer state of embeddings in 32 bit, where the rest is in 8."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
