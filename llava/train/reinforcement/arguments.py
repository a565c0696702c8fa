"""The flags of GlimpsePrune+'s first stage, with the paper's values; names of published recipes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from llava.answer_scores import JUDGE_MODEL

from ..arguments import filled
from ..glimpse.arguments import BoxTrainingArguments, GlimpseArguments, shown
from .objective import PolicyWeights
from .rewards import LOCAL_JUDGE


@dataclass
class PolicyModelArguments(GlimpseArguments):
    """The model that learns. What its recipe says of the shape of a glimpse is accepted, and only
    `reduce_layer` used."""

    model_name_or_path: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    load_new_modules: str | None = field(
        default=None, **shown("trained glimpse, for questions without boxes")
    )
    use_ref_masks: bool = field(
        default=True, **shown("keep the tokens in the boxes; False: those of the trained glimpse")
    )
    gen_mask_usage_ratio: float = field(
        default=0.0, **shown("share of the questions that use the glimpse in spite of their boxes")
    )

    def __post_init__(self):
        if self.adapter_dir is not None:
            raise ValueError(
                "adapter_dir cannot be set: the result is an adapter of the model alone; merge the "
                "one that there is first, with scripts/merge_lora_weights.py"
            )
        if self.use_zero_masks:
            raise ValueError("use_zero_masks must be False: an answer needs tokens to look at")
        if not 0 <= self.gen_mask_usage_ratio <= 1:
            raise ValueError(
                f"gen_mask_usage_ratio {self.gen_mask_usage_ratio} must lie between 0 and 1"
            )


@dataclass
class PolicyTrainingArguments(BoxTrainingArguments):
    """Those of the reinforcement."""

    ddp_find_unused_parameters: bool | None = False
    use_peft: bool = field(default=True, **shown("accepted: True, only an adapter is trained"))
    lora_r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    lora_task_type: str = field(default="CAUSAL_LM", **shown("accepted: CAUSAL_LM"))
    lora_target_modules: list[str] | None = field(
        default=None, **shown("linear layers of the decoder, such as q_proj; default: all")
    )
    num_generations: int = field(default=4, **shown("answers to one question, its group"))
    temperature: float = field(default=1.0, **shown("of the probabilities answers are drawn from"))
    max_completion_length: int = field(default=128, **shown("tokens of an answer"))
    max_seq_length: int | None = field(
        default=640, **shown("tokens of a pruned prompt and its answer that are learned from")
    )
    reward_weight: float = 1.0
    kd_weight: float = field(default=0.04, **shown("of the distance from the model as it was"))
    token_pass: str = field(
        default="released", **shown("how tokens behind the first are weighed: released or exact")
    )
    le_weight: float = field(default=0.0, **shown("accepted: 0, it belongs to a glimpse"))
    loc_weight: float = field(default=0.0, **shown("accepted: 0, likewise"))
    judge_url: str = field(
        default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or LOCAL_JUDGE,
        **shown("endpoint of the judge, up to /v1; default: OPENAI_BASE_URL, else localhost:8000"),
    )
    judge_model: str = field(
        default_factory=lambda: os.environ.get("JUDGE_MODEL") or JUDGE_MODEL,
        **shown("its name there; default: JUDGE_MODEL, else the published one"),
    )
    judge_workers: int = field(default=4, **shown("questions under way at once, per process"))
    judge_timeout: float = field(default=20.0, **shown("seconds for one attempt, of three"))

    @property
    def policy_weights(self) -> PolicyWeights:
        return filled(PolicyWeights, self)

    def check(self) -> None:
        """Raises ValueError for flags that ask for something else, or do not fit one another."""
        others = {
            "use_peft": not self.use_peft,
            "lora_task_type": self.lora_task_type != "CAUSAL_LM",
            "le_weight": self.le_weight,
            "loc_weight": self.loc_weight,
            **self.foreign(),
            "deepspeed": self.deepspeed,
            "fsdp": self.fsdp,
        }
        if asked := [name for name, value in others.items() if value]:
            raise ValueError(
                f"{', '.join(asked)} cannot be set: only an adapter is trained, by reinforcement, "
                "whole in every process"
            )
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations {self.num_generations} must be at least 2: answers are compared "
                "with one another"
            )
        at_once = self.per_device_train_batch_size * self.world_size
        if at_once % self.num_generations:
            raise ValueError(
                f"num_generations {self.num_generations} must divide the {at_once} answers that "
                f"are drawn at once ({self.per_device_train_batch_size} of each of "
                f"{self.world_size} processes): set per_device_train_batch_size, or use more "
                "processes"
            )
        positive = "temperature max_completion_length lora_r judge_workers judge_timeout".split()
        if wrong := [name for name in positive if getattr(self, name) <= 0]:
            raise ValueError(f"{wrong[0]} {getattr(self, wrong[0])} must be positive")
