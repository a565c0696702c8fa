"""Self-speculative generation: a drafter guesses tokens, the whole decoder verifies them at once.

The drafter shares the first layers with the decoder (see `llava.pruning.drafter`), so a token runs
through those once and its hidden row serves guessing and verifying. Every emitted token is a choice
of the decoder: greedy output is that of autoregressive generation, sampled output has its
distribution. Verified tokens stay in the caches, rejected ones are forgotten by setting a number.

Paper: Growing a Twig to Accelerate Large Vision-Language Models, https://arxiv.org/abs/2503.14075
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..pruning.branches import Branches
from ..pruning.drafter import Drafter
from ..pruning.precision import casting
from ..pruning.prefill import Prefill
from ..pruning.required import required
from ..pruning.stages import DecoderStage
from .kv_cache import KVCache
from .language_model.decode_step import Ending
from .token_choice import TokenChoice
from .token_tree import TokenTree

NO_TOKEN = "no token of the answer is known before the prompt has run"


@dataclass
class SpeculationLog:
    """What one prompt's generation did, step by step (a step is one run of the whole decoder).

    drafts:        tokens guessed in each step
    probabilities: the drafter's probability of each of them, in a tree that of the path to it
    accepted:      how many of them the decoder agreed with, from the first on
    bonus:         the decoder's own token behind those
    kv_lengths:    entries of every layer's cache after the step, the drafter's layers last
    trees:         where trees are guessed, those; their tokens are `drafts`
    paths:         and the nodes that were accepted
    first_seconds: until the tokens of the first step were known, vision excluded
    seconds:       of the whole generation, vision excluded; a step that answers of a batch take
                   together counts for each of them in equal parts
    """

    drafts: list[list[int]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    bonus: list[int] = field(default_factory=list)
    kv_lengths: list[list[int]] = field(default_factory=list)
    trees: list[TokenTree] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    first_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def acceptable(self) -> list[int]:
        """How many guesses each step could have accepted: all of a row, the levels of a tree."""
        return [tree.deepest for tree in self.trees] or list(map(len, self.drafts))

    @property
    def acceptance_rate(self) -> float:
        """Accepted guesses per acceptable one, 0 without any; the decoder's own tokens do not
        count."""
        return sum(self.accepted) / max(1, sum(self.acceptable))

    @property
    def tokens_per_step(self) -> float:
        return 1 + sum(self.accepted) / max(1, len(self.accepted))


@dataclass
class Guess:
    """Tokens the drafter guessed: one (1, 1) tensor each, and, when tokens are sampled, the
    distribution (1, V) it was drawn from.

    numbers, probabilities: the tokens and their probabilities on the host
    ended: whether the last of them ends an answer
    """

    tokens: list[Tensor] = field(default_factory=list)
    distributions: list[Tensor | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    ended: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


class Speculation:
    """The generation of one prompt.

    model:     a LLaVA model
    choice:    how tokens follow from logits
    most:      tokens to generate at most, at least 1
    of_several: it is one of several; those that guess trees grow together
    """

    def __init__(
        self,
        model,
        drafter: Drafter,
        choice: TokenChoice,
        most: int,
        of_several: bool = False,
    ):
        self.of_several = of_several
        self.decoder, self.drafter = model.model, drafter
        self.model, self.choice, self.most = model, choice, most
        self.depth = len(self.decoder.layers)
        self.cache = KVCache(self.depth + len(drafter.layers), most + self.spare)
        self.shared = self.decoder.layers[: drafter.shared_layers]
        self.deep = self.decoder.layers[drafter.shared_layers :]
        self.newest: Tensor | None = None  # (1, 1) the newest token of the answer
        self.count = 0  # tokens of the answer
        self.drafted = 0  # tokens of the answer, guesses included, that the drafter's layers saw
        self.waiting: list[Tensor] = []  # (1, 1, D) rows the drafter's layers have not seen yet
        self.log = SpeculationLog()

    @property
    def spare(self) -> int:
        """Places in the caches beyond those of the answer."""
        return self.drafter.num_speculations + 1

    # --- the prompt ---------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, prompt: dict) -> tuple[Tensor, list[int]]:
        """Runs the prompt and verifies the first guesses, in one pass of the deeper layers.

        prompt: the arguments of the decoder that describe one row, without padding
        Returns the scores (n, V) of the new tokens, and these as numbers.
        """
        trace = self.model.pruning_trace
        seen = prompt["visuals"] is not None and prompt["visuals"].there
        hooks = DraftingHooks(self, self.model.pruner.decoder if seen else DecoderStage())
        asked = self.model.asking(lambda: len(hooks.guess) + 1)
        out = self.decoder(**prompt, cache=self.cache, stage=hooks, trace=trace, **asked)
        guess = hooks.guess
        count = len(guess)
        self.prompt_lengths = [
            length - (count if layer < self.depth else self.drafted)
            for layer, length in enumerate(self.cache.lengths)
        ]
        for layer, size in enumerate(self.prompt_lengths):
            # Guesses that ran with the prompt are no part of it.
            self.cache.state_of(layer).size = size
        if trace is not None:
            self._trace_prompt(trace, count)
        logits = self.model.logits_of(out.hidden_states[:, -(count + 1) :].contiguous())[0]
        return self._verify(guess, logits)

    def _trace_prompt(self, trace, count: int) -> None:
        """Makes the trace describe the prompt alone, without the `count` guesses behind it."""
        first, lengths = self.drafter.shared_layers, self.cache.lengths
        for layer in range(first, self.depth):
            trace.prompt_tokens[layer] = trace.prompt_tokens[layer] - count
        for layer in [layer for layer in trace.decoder_keep if layer >= first and count]:
            kept = [row[: len(row) - count] for row in trace.decoder_keep[layer]]
            before = trace.prompt_tokens[layer - 1] if layer else trace.prompt_size
            trace.decoder_keep[layer] = kept
            if len(kept[0]) == before:  # nothing but the guesses changed there
                del trace.decoder_keep[layer]
        self.cache.lengths = list(self.prompt_lengths)
        trace.kv_lengths = self.cache.row_lengths()[: self.depth]
        trace.cache_bytes = self.cache.num_bytes()
        self.cache.lengths = lengths

    def guess_first(self, prefill: Prefill) -> tuple[Any, Tensor | None, Branches | None]:
        """The first guesses, from the prompt as it leaves the shared layers; their rows (1, g, D)
        as they leave these, and how they follow each other, see `Prefill.append`."""
        guess, rows = self._guess(self._first_logits(prefill))
        return guess, torch.cat(rows, dim=1) if rows else None, None

    def _first_logits(self, prefill: Prefill) -> Tensor:
        """(1, V) of the drafter at the last token of the prompt."""
        hidden, row = self.decoder.branch(prefill, self.drafter.layers, self.cache)
        prefill.drafter_row = row
        self._share_state(prefill.layer - 1)
        return self._at_home(self.drafter.logits(hidden)[:, -1])

    def _share_state(self, layer: int) -> None:
        """Makes the drafter's layers and `layer`, which ran before them without a hook in between,
        know their tokens as the same ones."""
        before = self.cache.rows[layer] if layer >= 0 else None
        for number in range(self.depth, self.depth + len(self.drafter.layers)):
            own = self.cache.state_of(number)
            here = own.next_position.device
            if before and before.size == own.size and before.next_position.device == here:
                self.cache.rows[number] = before

    # --- later steps --------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> tuple[Tensor, list[int]]:
        """Guesses and verifies once more; returns as `start` does."""
        guess, rows = self._guess(None)
        x, most = torch.cat(rows, dim=1), self.drafter.num_speculations + 1
        logits = self.model.step_logits(self.deep, x, self.cache, most=most)
        return self._verify(guess, logits[0])

    def _guess(self, logits: Tensor | None) -> tuple[Guess, list[Tensor]]:
        """Guesses until the drafter is unsure, and the rows (1, 1, D) of all tokens fed meanwhile.

        logits: (1, V) of the drafter at the last prompt token; None in later steps, which start
                by feeding the newest token
        """
        guess, rows, choice = Guess(), [], self.choice
        limit = min(self.drafter.num_speculations, self.most - self.count - 1)
        newest = self.newest
        while len(guess) < limit:
            if logits is None:
                row, logits = self._go_on(required(newest, NO_TOKEN))
                rows.append(row)
            token, probability, distribution = choice.guess(logits, guess.tokens)
            guess.tokens.append(token)
            guess.distributions.append(distribution)
            newest, logits = token, None
            number, sure = choice.on_host(token, probability)
            guess.numbers.append(number)
            guess.probabilities.append(sure)
            stops, guess.ended = choice.stops(number, sure, self.drafter.draft_stop_prob)
            if stops:
                break
        if newest is not None:
            rows.append(self._feed(newest))
        return guess, rows

    def _feed(self, token: Tensor) -> Tensor:
        """Runs one token (1, 1) through the shared layers."""
        x = self.decoder.step(self.shared, self.decoder.embed_tokens(token), self.cache)
        self.waiting.append(x)
        return x

    def _go_on(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Runs one token (1, 1) through the shared layers and the drafter's; its row (1, 1, D)
        between them, and the logits (1, V) after it.

        The row of the last guess of a step waits until the next one, where it runs along if it was
        accepted: a row more costs next to nothing, a pass of its own as much as any.
        """
        step, layers, cache = self.decoder.step, self.drafter.layers, self.cache
        ending = Ending(self.drafter.norm, self.drafter.head, last=True)
        if self.waiting:
            row = self._feed(token)
            x = torch.cat(self.waiting, dim=1)  # two tokens, whenever there are more than one
            logits = step(layers, x, cache, ending=ending, most=x.shape[1])
        else:
            x = self.decoder.embed_tokens(token)
            row, logits = step.both(self.shared, layers, x, cache, ending)
        self.drafted += max(1, len(self.waiting))
        self.waiting = []
        return row, self._at_home(logits[:, -1])

    def _at_home(self, logits: Tensor) -> Tensor:
        """Logits on the device of the answer, where tokens are chosen."""
        return logits.to(self.choice.ids.device)

    # --- verification -------------------------------------------------------------------------

    def _verify(self, guess: Any, logits: Tensor) -> tuple[Tensor, list[int]]:
        """Accepts guesses; logits (g + 1, V) of the decoder before each guess and behind the last.

        Returns what `start` returns.
        """
        tokens, numbers, scores = self.choice.verify(self._at_home(logits), guess)
        accepted = len(numbers) - 1
        self.count += accepted + 1
        self.newest = tokens[accepted:, None]
        self._roll_back()
        self._record(guess, numbers)
        self.choice.add(tokens)
        return scores, numbers

    def _roll_back(self) -> None:
        """Forgets what belongs to rejected guesses; the newest token did not run yet."""
        done = self.count - 1
        for layer, length in enumerate(self.prompt_lengths):
            self.cache.crop(layer, length + done)
        self.waiting = self.waiting[: max(0, done - self.drafted)]
        self.drafted = min(self.drafted, done)

    def _record(self, guess: Any, numbers: Any) -> None:
        self.log.drafts.append(guess.numbers)
        self.log.probabilities.append(guess.probabilities)
        self.log.accepted.append(len(numbers) - 1)
        self.log.bonus.append(numbers[-1])
        self.log.kv_lengths.append(list(self.cache.lengths))

    def finished_log(self) -> SpeculationLog:
        """The log with plain numbers alone."""
        return self.log


class DraftingHooks:
    """The stage of a method with guessing put before it: once the shared layers have run the
    prompt, the drafter guesses, and the guesses join the prompt behind what the method keeps."""

    def __init__(self, speculation: Speculation, stage: DecoderStage):
        self.speculation, self.stage, self.guess = speculation, stage, Guess()
        self.casting = casting(speculation.choice.ids.device)

    def __getattr__(self, name: str):
        return getattr(self.stage, name)

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        """Those of the method, but where the drafter looks at what the layer before gives."""
        shared = self.speculation.drafter.shared_layers
        return tuple(cut for cut in self.stage.blind_cuts(num_layers) if cut != shared)

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        rows = branches = None
        if index == self.speculation.drafter.shared_layers:
            with self.casting or nullcontext():  # in the types of all other steps
                self.guess, rows, branches = self.speculation.guess_first(prefill)
            if self.casting:  # the method chooses by what is not cast
                prefill.drafter_row = prefill.drafter_input = None
        prefill = self.stage.before_layer(index, prefill)
        prefill.drafter_row = prefill.drafter_input = None  # of use to that hook alone
        return prefill if rows is None else prefill.append(rows, branches)
