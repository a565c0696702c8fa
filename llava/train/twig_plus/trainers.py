"""The Trainers of both stages; checkpoints and results are whole twigs in the published layout."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.conv_mode import CONFIG_KEY
from llava.pruning.twig_files import OUR_HEAD, read_twig
from llava.pruning.twigvlm import save_twig
from llava.pruning.twigvlm_plus import TwigVLMPlus

from ..llava_trainer import LLaVATrainer
from ..saving import gathered
from ..train_twigvlm import TwigTrainer
from .policy import HeadReinforcement


class LoggedParts:
    """Mixin of Trainers: the log shows the means of the numbers that the model gives beside its
    loss, over the steps since the last line and over all processes, which wait for one another and
    so sum up all of them, whatever their own samples gave."""

    #: the names of all such numbers
    parts: tuple[str, ...] = ()
    _sums: Tensor | None = None  # (parts, 2) with how many numbers that are

    def note(self, out: dict[str, Tensor]) -> None:
        """Adds what the model returned to the sums."""
        if self._sums is None:
            self._sums = torch.zeros(len(self.parts), 2, device=out["loss"].device)
        for own, name in zip(self._sums, self.parts, strict=True):
            if name in out:
                own += torch.stack([value := out[name].detach().float(), torch.ones_like(value)])

    def log(self, logs: dict[str, float]) -> None:
        if self._sums is not None and "loss" in logs:
            sums = self.accelerator.reduce(self._sums, "sum").tolist()
            means = zip(self.parts, sums, strict=True)
            logs = logs | {name: round(own / count, 4) for name, (own, count) in means if count}
            self._sums = None
        super().log(logs)


class DistillationTrainer(LoggedParts, TwigTrainer):
    """Of a `TwigDistillation`; final_wipe_layer: what config.json is to say."""

    method = TwigVLMPlus.name
    final_wipe_layer = 0
    parts = ("ntp", "attn_kl", "pred_kl")

    def compute_loss(self, model, inputs, return_outputs: bool = False):
        out = model(**inputs)
        self.note(out)
        return (out["loss"], out) if return_outputs else out["loss"]

    def run_settings(self) -> dict:
        return super().run_settings() | {"stage": 1}

    def twig_facts(self) -> dict:
        layer = self.model.weights.attention_layer
        own = {"final_wipe_layer": self.final_wipe_layer, "attention_layer": layer, "stage": 1}
        return own | super().twig_facts()


class ReinforcementTrainer(LoggedParts, LLaVATrainer):
    """Of a `HeadReinforcement`. The twig that is written has the bytes of stage 1, except in the
    two gates.

    twig_path: folder of that twig; base_model: what config.json says it was trained on
    """

    twig_path = base_model = ""
    parts = ("policy", "cost_std", "kept", "attn_kl", "cost")
    _step = -1

    @property
    def reinforcement(self) -> HeadReinforcement:
        return self.accelerator.unwrap_model(self.model)

    @property
    def hidden_size(self) -> int:
        return self.model.trunk.config.hidden_size

    def run_settings(self) -> dict:
        cuts, groups = self.model.cuts, self.model.settings.num_groups
        return {"twig_K": cuts.first, "wipe": cuts.wipe, "num_groups": groups, "stage": 2}

    def compute_loss(self, model, inputs, return_outputs: bool = False):
        args, done = self.args, self.state.global_step
        if done != self._step:
            self._step, self._part = done, 0
        place = self._part * args.world_size + args.process_index  # of the batch in the step
        self._part += 1
        progress, key = done / max(1, self.state.max_steps), (args.seed, done, place)
        out = model(**inputs, progress=progress, key=key)
        self.note(out)
        return (out["loss"], out) if return_outputs else out["loss"]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the whole twig; called by every process. Checkpoints during training
        (`_internal_call`) keep the gates in the training precision, the result has them in that of
        stage 1."""
        own = self.reinforcement
        gates = {OUR_HEAD + name: gathered(p) for name, p in own.head.named_parameters()}
        if not self.args.should_save:
            return
        _, tensors = read_twig(self.twig_path)
        if not _internal_call:
            gates = {name: gate.to(tensors[name].dtype) for name, gate in gates.items()}
        config = own.trunk.config
        save_twig(
            output_dir or self.args.output_dir,
            tensors | gates,
            own.cuts.first,
            self.base_model,
            TwigVLMPlus.name,
            final_wipe_layer=own.cuts.wipe,
            attention_layer=own.settings.attention_layer,
            stage=2,
            **{CONFIG_KEY: getattr(config, CONFIG_KEY)},
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        head = (self.model if model is None else model).head
        _, tensors = read_twig(resume_from_checkpoint)
        head.load_state_dict({name: tensors[OUR_HEAD + name] for name in head.state_dict()})
