"""How the release of TwigVLM is called, and what its `generate` returns.

Programs of the release give options in `twigvlm_config`, which may change from call to call, and
decode `output.predicted_tokens`; all others decode `output` itself. `PublishedOutput` serves both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .choice import open_group
from .published import Published
from .twig_files import holds_pruning_head

#: entry of `twigvlm_config` that is no option of the method
STRATEGY = "generation_strategy"
#: options that belong to a twig: they cannot change from call to call
FIXED = ("twig", "twig_K", "twig_T")


class TwigRelease(Published):
    """`generate(..., twigvlm_config={"enable_pruning", "attention_rank", "generation_strategy"})`,
    also under other names of these options."""

    def __init__(self):
        names = {
            "attention_rank": "visual_token_num",
            "avg_retain_rank": "visual_token_num",
            "retained_tokens": "visual_token_num",
            "R": "visual_token_num",
            "enable_FastV": "enable_pruning",
            "twig_block": "twig",
        }
        super().__init__(options=names, group="twigvlm_config")

    def can_mean(self, options: Mapping[str, object]) -> bool:
        """Unless the twig has a pruning head: that is TwigVLM++'s."""
        return not holds_pruning_head(options.get("twig"))

    def for_call(self, pruner, keywords: dict) -> tuple:
        if self.group not in keywords and not pruner.as_published:
            return pruner, keywords
        keywords = dict(keywords)
        entries = keywords.pop(self.group, None)
        options = open_group(type(pruner), {} if entries is None else entries, (STRATEGY,))
        if STRATEGY in options:
            keywords[STRATEGY] = options.pop(STRATEGY)
        own = {name: getattr(pruner, name) for name in FIXED}
        if fixed := [name for name in own if options.get(name, own[name]) != own[name]]:
            raise ValueError(
                f"{', '.join(fixed)} cannot change from call to call: assign another {pruner.name}"
            )
        config = keywords.get("generation_config")
        told = getattr(config, "return_dict_in_generate", False)
        as_tensor = not keywords.get("return_dict_in_generate", told)
        if options or as_tensor != pruner.as_published:
            pruner = pruner.with_options(**options)
            pruner.as_published = as_tensor
        return pruner, {**keywords, "return_dict_in_generate": True}

    def present(self, pruner, output, ends: set[int]):
        """With `predicted_tokens` and the other fields of the release, when the model was loaded or
        called in its way and the call did not ask for an output object."""
        return published_output(output, ends) if pruner.as_published else output


class TwigPlusRelease(TwigRelease):
    """The same of TwigVLM++, which calls the budget `avg_retain_rank`."""

    def can_mean(self, options: Mapping[str, object]) -> bool:
        return holds_pruning_head(options.get("twig"))


class PublishedOutput(Tensor):
    """New token ids (B, n), with the fields of the release beside them; whatever is computed from
    it is an ordinary tensor.

    predicted_tokens:     the ids of every answer as a list, end marks excluded
    num_tokens_generated: how many those are

    From self-speculative generation only, over all prompts (seconds without the vision tower):
    total_draft_matches, total_generations: guesses accepted, guesses made (of a tree its levels)
    acceptance_rate:      accepted guesses per guess
    prefill_time:         seconds until the tokens of the first step were known
    decoding_time:        seconds of the whole generation, the first step included
    decoding_tokens_per_second
    """

    # What torch itself gives to subclasses that are no more than a tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    predicted_tokens: list[list[int]]
    num_tokens_generated: int
    total_draft_matches: int
    total_generations: int
    acceptance_rate: float
    prefill_time: float
    decoding_time: float
    decoding_tokens_per_second: float


def published_output(output, ends: Collection[int]) -> PublishedOutput:
    """output: what transformers' `generate` returns, with `return_dict_in_generate` or without;
    ends: ids of tokens that end an answer."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    result = sequences.as_subclass(PublishedOutput)
    result.predicted_tokens = [answer(row, ends) for row in sequences.tolist()]
    result.num_tokens_generated = sum(map(len, result.predicted_tokens))
    logs = getattr(output, "logs", None)
    if logs:
        result.total_draft_matches = sum(sum(log.accepted) for log in logs)
        result.total_generations = sum(sum(log.acceptable) for log in logs)
        result.acceptance_rate = result.total_draft_matches / max(1, result.total_generations)
        result.prefill_time = sum(log.first_seconds for log in logs)
        result.decoding_time = sum(log.seconds for log in logs)
        rate = result.num_tokens_generated / max(result.decoding_time, 1e-9)
        result.decoding_tokens_per_second = rate
    return result


def answer(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids in front of the first end mark."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[:place]
    return ids
