"""Generation strategies: how a model's `generate` gets from one token to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from ..constants import STRATEGIES
from ..pruning import PruningTrace, no_drafter
from ..pruning.drafter import DRAFTER_OPTIONS, Drafter
from .lockstep import together
from .model_part import ModelPart
from .patches import replacement
from .self_speculative import Speculation, SpeculationLog
from .token_choice import Noise, TokenChoice
from .tree_speculation import TreeSpeculation

#: arguments of the decoder that `generate` passes on
PROMPT_TENSORS = ("inputs_embeds", "position_ids")
#: keywords of `generate` that cannot be followed, and why
NOT_TAKEN = {
    "inputs_embeds": "pass input_ids and images, or give embedded prompts to generate_from",
    "past_key_values": "it makes a cache of its own; questions about one image share theirs with "
    "llava.model.reuse.PrefixCache",
    "position_ids": "they follow from the attention_mask",
    "assistant_model": 'tokens are guessed with generation_strategy="self_speculative" alone',
}
#: decoder outputs that speculation does not collect
NOT_COLLECTED = ("output_hidden_states", "output_attentions")
#: modules of the rules that settings of a call stand for, which treat every row alike
ROW_BY_ROW = (LogitsProcessor.__module__, StoppingCriteria.__module__)
#: rules of those modules that know the prompts of all rows
OF_ALL_ROWS = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """As of other strategies, and `logs`: a `SpeculationLog` for every prompt."""

    logs: list[SpeculationLog] | None = None


def check_strategy(name: str) -> str:
    """`name`, when it is a strategy; ValueError listing them otherwise."""
    if name not in STRATEGIES:
        raise ValueError(
            f"unknown generation_strategy {name!r}, choose from {', '.join(STRATEGIES)}"
        )
    return name


def setting(model, keywords: dict, name: str) -> Any:
    """What a `generate` call with these keywords goes by: the keyword, else what the generation
    config says that was given, or the model's own."""
    config = keywords.get("generation_config") or model.generation_config
    return keywords[name] if name in keywords else getattr(config, name)


def no_search(name: str) -> str:
    return (
        f"{name} is not supported: choose greedy search, sampling or beam search, or guess tokens "
        f"with generation_strategy={STRATEGIES[1]!r}"
    )


class GenerationStrategies(ModelPart):
    """Mixin of causal language models: chooses the strategy of a `generate` call.

    It takes the place of transformers' greedy search and sampling, so everything that `generate`
    prepares for those (length, processors, stopping criteria, streamer) holds here as well.
    """

    #: what `generate` uses when the call does not say
    generation_strategy = STRATEGIES[0]
    #: makes the rule by which guesses are chosen and verified, with the arguments of `TokenChoice`
    token_choice = TokenChoice

    @property
    def possible_strategy(self) -> str:
        """`generation_strategy`, where the pruning method in use can serve it, else the plain one;
        for programs that change the method from call to call."""
        drafter = self.pruner.decoder.drafter(self.config.num_hidden_layers)
        return STRATEGIES[0] if drafter is None else self.generation_strategy

    def check_keywords(self, keywords: dict) -> None:
        """Takes keywords of `generate` that say nothing out of `keywords`; raises ValueError, or
        NotImplementedError as LLaVA does, for those that cannot be followed."""
        for name, reason in NOT_TAKEN.items():
            if keywords.pop(name, None) is not None:
                kind = NotImplementedError if name == "inputs_embeds" else ValueError
                raise kind(f"`{name}` is not supported by generate: {reason}")

    def _maybe_initialize_input_ids_for_generation(
        self, inputs=None, bos_token_id: int | None = None, model_kwargs: dict | None = None
    ) -> Tensor:
        """The start mark that stands for an embedded prompt, from the model's settings where the
        `generation_config` of a call names none."""
        if bos_token_id is None:
            bos_token_id = self.generation_config.bos_token_id
        if bos_token_id is None:
            bos_token_id = self.config.bos_token_id
        return super()._maybe_initialize_input_ids_for_generation(
            inputs, bos_token_id, model_kwargs
        )

    def _validate_generated_length(
        self, generation_config, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        """Lengths count an answer and its start mark; here, where transformers knows them all, the
        ids of a prompt are added where those stand in front of the answer."""
        more = input_ids_length - 1
        if generation_config.max_new_tokens is not None:
            generation_config.max_length -= more  # it was counted from behind the prompt
        super()._validate_generated_length(generation_config, 1, has_default_max_length)
        generation_config.max_length += more
        if generation_config.min_length:
            generation_config.min_length += more

    def _get_logits_processor(self, generation_config, *args, **keywords) -> LogitsProcessorList:
        """Without the rule about the input of an encoder, for which transformers would take the
        embeddings of the prompt."""
        if (generation_config.encoder_repetition_penalty or 1) != 1:
            raise ValueError(
                "encoder_repetition_penalty is not supported: it is about the input of an encoder, "
                "and this is a decoder alone; use repetition_penalty"
            )
        return super()._get_logits_processor(generation_config, *args, **keywords)

    @staticmethod
    def _expand_inputs_for_generation(expand_size: int = 1, *args, **keywords):
        """Every row `expand_size` times (beams), in what is known of images as well, which
        transformers, looking at tensors alone, leaves as it is."""
        ids, expanded = GenerationMixin._expand_inputs_for_generation(
            expand_size, *args, **keywords
        )
        if expand_size > 1 and (visuals := keywords.get("visuals")) is not None:
            expanded["visuals"] = visuals.repeated(expand_size)
        return ids, expanded

    def contrastive_search(self, *args, **keywords):
        raise ValueError(no_search("contrastive search (penalty_alpha with top_k)"))

    def _get_candidate_generator(self, *args, **keywords):
        raise ValueError(no_search("assisted decoding (assistant_model, prompt_lookup_num_tokens)"))

    def drafter_for(self, keywords: dict) -> Drafter | None:
        """The drafter that a `generate` call asks for; takes its keywords out of `keywords`.

        Raises ValueError for an unknown strategy, for one that the pruning method in use cannot
        serve, and for options without a strategy they belong to.
        """
        strategy = keywords.pop("generation_strategy", None) or self.generation_strategy
        options = {key: keywords.pop(key) for key in DRAFTER_OPTIONS if key in keywords}
        if check_strategy(strategy) == STRATEGIES[0]:
            if options:
                raise ValueError(f"{', '.join(options)} need generation_strategy={STRATEGIES[1]!r}")
            return None
        drafter = self.pruner.decoder.drafter(self.config.num_hidden_layers)
        if drafter is None:
            raise ValueError(no_drafter(strategy, self.pruner))
        if setting(self, keywords, "use_cache") is False:
            raise ValueError(f"generation_strategy {strategy!r} needs a cache (use_cache=True)")
        drafter = replace(drafter, **options)
        check_shape(drafter, options)
        return drafter

    def greedy_search(self, input_ids: Tensor, drafter: Drafter | None = None, **keywords):
        if drafter is None:
            return super().greedy_search(input_ids, **keywords)
        return self._speculate(input_ids, drafter, None, **keywords)

    def sample(self, input_ids: Tensor, drafter: Drafter | None = None, **keywords):
        if drafter is None:
            return super().sample(input_ids, **keywords)
        warpers = keywords.pop("logits_warper", None)
        return self._speculate(
            input_ids, drafter, LogitsProcessorList() if warpers is None else warpers, **keywords
        )

    def _speculate(
        self,
        input_ids: Tensor,
        drafter: Drafter,
        warpers: LogitsProcessorList | None,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        pad_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        output_scores: bool = False,
        return_dict_in_generate: bool = False,
        streamer=None,
        synced_gpus: bool = False,
        **prompt,
    ):
        """Every prompt has its own caches, as rows accept different numbers of guesses. Answers
        that are guessed in rows grow one after the other, those in trees together."""
        check_speculation(self, input_ids, [*logits_processor, *stopping_criteria], prompt)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer shows one answer, but there are {len(input_ids)} prompts")
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or [])
        kind = TreeSpeculation if drafter.guesses_trees else Speculation
        several, noise = len(input_ids) > 1, Noise(len(input_ids))
        answers = []
        for row in traced_rows(self, len(input_ids)):
            ids = input_ids[row : row + 1]
            choice = self.token_choice(logits_processor, warpers, ids, ends, noise, row)
            most = max(1, stopping_criteria.max_length - ids.shape[1])
            left = 1 if drafter.guesses_trees else len(input_ids) - row
            answers.append(
                Answer(
                    kind(self, drafter, choice, most, several),
                    with_share_of_time(stopping_criteria, left),
                    streamer,
                    output_scores,
                )
            )
            answers[-1].start(one_row(prompt, row))
            if not drafter.guesses_trees:
                answers[-1].finish()
        grow_together(answers)
        sequences = padded([answer.ids for answer in answers], pad_token_id)
        if not return_dict_in_generate:
            return sequences
        scores = padded_scores([answer.scores for answer in answers]) if output_scores else None
        logs = [answer.log for answer in answers]
        return SpeculativeOutput(sequences=sequences, scores=scores, logs=logs)


def check_shape(drafter: Drafter, options: dict) -> None:
    """Raises ValueError for keywords about trees where none are guessed, and the reverse."""
    idle, instead = ("tree_depth", "tree_width"), "a row; tree_nodes=60 makes it a tree"
    if drafter.guesses_trees:
        idle = ("num_speculations", "draft_stop_prob")
        instead = "a tree; tree_nodes=0 makes it a row"
    if given := [name for name in idle if name in options]:
        raise ValueError(f"{', '.join(given)} would not be read, as guesses are {instead}")


def check_speculation(model, input_ids: Tensor, rules: list, options: dict) -> None:
    """Raises ValueError for what holds one token at a time alone.

    rules: about scores, and about the end
    """
    strategy = f"with generation_strategy {STRATEGIES[1]!r}"
    if asked := [name for name in NOT_COLLECTED if options.get(name)]:
        raise ValueError(f"{asked[0]} is not supported {strategy}")
    if model.pruning_trace is not None and model.pruning_trace.attention_layers:
        raise ValueError(f"attention rows are not recorded {strategy}")
    if replacement(model, "forward", type(model).forward) is not None:
        raise ValueError(f"forward of this model was replaced, but it is not called {strategy}")
    for rule in rules:
        if isinstance(rule, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            raise ValueError(f"guidance_scale is not supported {strategy}")
        if isinstance(rule, PrefixConstrainedLogitsProcessor) and len(input_ids) > 1:
            raise ValueError(f"prefix_allowed_tokens_fn takes one prompt at a time {strategy}")
        alike = type(rule).__module__ in ROW_BY_ROW and not isinstance(rule, OF_ALL_ROWS)
        if len(input_ids) > 1 and not alike:
            raise ValueError(
                f"{type(rule).__name__} would see one of {len(input_ids)} answers {strategy}: give "
                "one prompt at a time with rules of your own (logits_processor, stopping_criteria)"
            )


def with_share_of_time(criteria: StoppingCriteriaList, left: int) -> StoppingCriteriaList:
    """`criteria` for one of `left` answers that come one after the other: where the time of all is
    limited (`max_time`), it has its share of what remains."""
    now = time.time()
    return StoppingCriteriaList(
        MaxTimeCriteria((rule.initial_timestamp + rule.max_time - now) / left, now)
        if type(rule) is MaxTimeCriteria
        else rule
        for rule in criteria
    )


class Answer:
    """One answer while it grows.

    speculation: guesses and verifies its tokens; None when it is `finished`
    ids:         (n,) the answer, behind the ids that its `TokenChoice` began with
    scores:      (V,) for each of its tokens, if they are wanted
    """

    def __init__(self, speculation: Speculation, criteria, streamer, keep_scores: bool):
        self.speculation: Any = speculation
        self.choice, self.streamer, self.keep_scores = speculation.choice, streamer, keep_scores
        self.begin = self.size = self.choice.ids.shape[1]
        self.longest = criteria.max_length
        self.criteria = [rule for rule in criteria if not isinstance(rule, MaxLengthCriteria)]
        self.scores: list[Tensor] = []
        self.log = speculation.log

    @property
    def finished(self) -> bool:
        return self.speculation is None

    def start(self, prompt: dict) -> None:
        """Runs the prompt, `one_row` of a batch."""
        began = time.perf_counter()
        found = self.speculation.start(prompt)
        self.log.first_seconds = time.perf_counter() - began
        self.take(*found)
        self.log.seconds = time.perf_counter() - began

    def finish(self) -> None:
        """Lets it grow alone."""
        began = time.perf_counter()
        while not self.finished:
            self.take(*self.speculation.step())
        self.log.seconds += time.perf_counter() - began

    def take(self, rows: Tensor, numbers: list[int]) -> None:
        """What a step of `speculation` gave."""
        if self.keep_scores:
            self.scores.extend(rows)
        count, ended = answered(
            self.choice.ids, numbers, self.choice.ends, self.criteria, self.scores or None
        )
        if self.streamer is not None:
            self.streamer.put(torch.tensor(numbers[:count]))
        self.size += count
        if ended or self.size >= self.longest:
            self._end()

    def _end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
        self.log = self.speculation.finished_log()
        self.ids = self.choice.ids[0, : self.size]
        self.scores = self.scores[: self.size - self.begin]
        self.choice.noise.forget(self.choice.row)
        self.speculation = None  # its caches are free


def grow_together(answers: list[Answer]) -> None:
    """Lets answers grow until all have ended, a step of each at a time."""
    while growing := [answer for answer in answers if not answer.finished]:
        began = time.perf_counter()
        found = together([answer.speculation.steps() for answer in growing])
        for answer, own in zip(growing, found, strict=True):
            answer.take(*own)
        share = (time.perf_counter() - began) / len(growing)
        for answer in growing:
            answer.log.seconds += share


def answered(
    ids: Tensor, numbers: list[int], ends: set[int], criteria: list, scores
) -> tuple[int, bool]:
    """(how many of the new tokens belong to the answer, whether it is finished).

    ids: (1, n) the answer with the new tokens, which are `numbers`
    """
    before = ids.shape[1] - len(numbers)
    for count, number in enumerate(numbers, start=1):
        known = ids[:, : before + count]
        if number in ends or any(rule(known, scores) for rule in criteria):
            return count, True
    return len(numbers), False


def traced_rows(model, count: int) -> Iterator[int]:
    """0 ... count - 1; what the work in between does to `model.pruning_trace` is put together."""
    whole, own = model.pruning_trace, []
    if whole is None or count == 1:
        yield from range(count)
        return
    try:
        for row in range(count):
            model.pruning_trace = PruningTrace()
            own.append(model.pruning_trace)
            yield row
        whole.take_rows(own)
    finally:
        model.pruning_trace = whole


def one_row(prompt: dict, row: int) -> dict:
    """The decoder's arguments for one row of a batch, its padding removed."""
    visuals = prompt.get("visuals")
    if visuals is None or visuals.counts is None:
        real = prompt["attention_mask"][row].bool().nonzero()[:, 0]
    else:  # padded on the left
        length = visuals.counts.lengths[row]
        real = slice(prompt["attention_mask"].shape[1] - length, None)
    return {
        **{key: prompt[key][row][real][None] for key in PROMPT_TENSORS},
        "visuals": None if visuals is None else visuals.row(row, real),
    }


def padded(rows: list[Tensor], pad_token_id: int | None) -> Tensor:
    """(B, longest) ids, shorter answers padded on the right."""
    if len({len(row) for row in rows}) > 1 and pad_token_id is None:
        raise ValueError("answers of different lengths need a pad_token_id")
    return torch.nn.utils.rnn.pad_sequence(rows, True, pad_token_id or 0)


def padded_scores(answers: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Per token the scores (B, V) of all answers, zero behind the end of one."""
    longest = max(map(len, answers))
    blank = torch.zeros_like(answers[0][0])
    filled = [answer + [blank] * (longest - len(answer)) for answer in answers]
    return tuple(torch.stack(rows) for rows in zip(*filled, strict=True))
