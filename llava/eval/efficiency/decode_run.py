"""Timing long answers, token by token, one way of answering after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from llava.constants import STRATEGIES
from llava.eval.efficiency.measure import DENSE, Workload
from llava.eval.efficiency.pass_times import TimedStep, timed_passes
from llava.model.self_speculative import SpeculationLog
from llava.progress import progress
from llava.pruning import Pruner, build_pruner, can_draft

#: ending of the names of ways that are compiled
COMPILED = ", compiled"


class Clock:
    """A streamer that notes when how many tokens arrive.

    now:    says what time it is, in seconds
    passes: adds up the time of passes, of which those before the first arrival do not count
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, passes: TimedStep | None = None
    ):
        self.now, self.start, self.arrivals, self.prompt = now, now(), [], True
        self.passes = passes

    def put(self, value) -> None:
        if not self.prompt:  # the first call shows the prompt
            self.arrivals.append((self.now() - self.start, value.numel()))
            if self.passes is not None and len(self.arrivals) == 1:
                self.passes.seconds = 0.0
        self.prompt = False

    def end(self) -> None:
        """Nothing is left to show."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_seconds(self) -> float:
        return self.arrivals[0][0]

    @property
    def later(self) -> int:
        """Tokens after the first arrival."""
        return self.tokens - self.arrivals[0][1]

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first arrival; None when nothing came after it."""
        span = self.arrivals[-1][0] - self.arrivals[0][0]
        return self.later / span if self.later else None


@dataclass
class Variant:
    """One way of answering, and what was seen of it.

    options: further arguments of `generate`
    compiled: whether steps of decoding are
    first_call: seconds of the first call, which compiles
    pass_rates: tokens per second if only the passes of the decoder and the drafter took time
    """

    name: str
    pruner: Pruner
    strategy: str
    options: dict = field(default_factory=dict)
    compiled: bool = False
    first_call: float | None = None
    clocks: list[Clock] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    logs: list[SpeculationLog] = field(default_factory=list)
    pass_rates: list[float | None] = field(default_factory=list)

    @property
    def guesses(self) -> bool:
        return self.strategy == STRATEGIES[1] and self.options.get("num_speculations") != 0

    def run(self, model, inputs: dict, now: Callable[[], float] = time.perf_counter) -> None:
        clock = Clock(now)
        output = self.answer(model, inputs, clock)
        self.clocks.append(clock)
        self.answers.append(output.sequences[0].tolist())
        self.logs += getattr(output, "logs", None) or []

    def run_passes(self, model, inputs: dict, now: Callable[[], float] = time.perf_counter) -> None:
        """Answers once more, to see what the passes of its steps take."""
        with timed_passes(model, now) as passes:
            clock = Clock(now, passes)
            self.answer(model, inputs, clock)
        known = clock.later and passes.seconds
        self.pass_rates.append(clock.later / passes.seconds if known else None)

    def answer(self, model, inputs: dict, streamer):
        return model.generate(
            **inputs,
            **self.options,
            do_sample=False,
            generation_strategy=self.strategy,
            streamer=streamer,
            return_dict_in_generate=True,
        )


def variants_of(
    pruners: dict[str, Pruner],
    num_speculations: int | None = None,
    compile: bool = False,
    tree: dict[str, int | None] | None = None,
) -> list[Variant]:
    """The dense model, and each method with and, where it can guess, also without guesses.

    num_speculations: most guesses in a row; None: what the method says
    compile: adds all of them with compiled steps
    tree: tree_nodes, tree_depth and tree_width of trees that are guessed as well; without nodes by
    methods that do so anyway, as these say
    """
    options = {} if num_speculations is None else {"num_speculations": num_speculations}
    tree = {name: number for name, number in (tree or {}).items() if number is not None}
    found = [Variant(DENSE, build_pruner(), STRATEGIES[0])]
    for name, pruner in pruners.items():
        found.append(Variant(name, pruner, STRATEGIES[0]))
        if can_draft(type(pruner.decoder)):
            row = {"tree_nodes": 0}
            still = {"num_speculations": 0} | row
            found.append(Variant(f"{name}, no guesses", pruner, STRATEGIES[1], still))
            found.append(Variant(f"{name}, guessing", pruner, STRATEGIES[1], options | row))
            if tree.get("tree_nodes", getattr(pruner.decoder, "tree_nodes", 0)) != 0:
                found.append(Variant(f"{name}, guessing trees", pruner, STRATEGIES[1], tree))
    if compile:
        found += [
            Variant(v.name + COMPILED, v.pruner, v.strategy, dict(v.options), True) for v in found
        ]
    return found


def measure(
    model,
    variants: list[Variant],
    prompts: list[Callable[[], dict]],
    limit: int,
    now: Callable[[], float] = time.perf_counter,
    warmup: int = 1,
) -> None:
    """Runs every variant on every prompt, after `warmup` answers each to the first one.

    prompts: make the arguments of `generate`, but for the length of the answer
    now: says what time it is, in seconds
    """
    use = ways_of_steps(model, sorted({variant.compiled for variant in variants}))
    asked = [prompts[0]] * warmup + prompts
    for number, prompt in enumerate(progress(asked, "answers", "questions")):
        for variant in variants:
            model.pruner = variant.pruner  # first: how images are prepared may depend on it
            use[variant.compiled]()
            inputs = prompt() | {"max_new_tokens": limit}
            variant.run(model, inputs, now)
            if variant.guesses and number >= warmup:
                variant.run_passes(model, inputs, now)
            if number == 0 and warmup:
                variant.first_call = variant.clocks[0].arrivals[-1][0]
            if number < warmup:
                variant.clocks, variant.answers, variant.logs = [], [], []


def ways_of_steps(model, kinds: Iterable[bool]) -> dict[bool, Callable[[], None]]:
    """Functions that make the model decode compiled (True) or as it is (False), by that. The steps
    of each kind are made once: they keep what they captured."""

    def use(step, compile_prefill: bool) -> None:
        model.model.step, model.compile_prefill = step, compile_prefill

    found = {}
    for compiled in kinds:
        model.compile_decoding = compiled
        found[compiled] = partial(use, model.model.step, model.compile_prefill)
    return found


def made_up(model, prompt_length: int, image_size: tuple[int, int] | None = None) -> dict:
    """The arguments of `generate` for an image and `prompt_length` text tokens, all random."""
    work = Workload.random(model, 1, prompt_length, 1, image_size)
    return {"input_ids": work.input_ids, "images": work.images, "image_sizes": work.image_sizes}
