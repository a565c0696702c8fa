"""Measuring variants of one model in turns: stages, tokens, cache bytes, peak memory."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.efficiency.bandwidth import weight_bytes
from llava.eval.efficiency.memory import peak_bytes
from llava.eval.efficiency.oracle import Oracle, imitation, watch_schedule
from llava.eval.efficiency.stock import stock_decoder, time_stock
from llava.eval.efficiency.stopwatch import Stopwatch
from llava.model.multimodal_encoder.qwen2_5_vl_images import smart_resize
from llava.progress import progress
from llava.pruning import METHODS, Pruner, build_pruner, build_with_budget, trace_pruning
from llava.pruning.base import option_names
from llava.pruning.cost import FORMULAS, prefill_flops
from llava.pruning.cues import check_needs
from llava.pruning.stages import filled_hooks

STAGES = {
    "vision": "vision tower, with the extras a method asks for",
    "select": "the method's own work, wherever it acts",
    "prefill": "decoder and head on the prompt, without what the method does in between",
    "decode": "decoder and head on one further token",
    "first_token": "from pixels and token ids to the logits of the first token",
    "end_to_end": "from pixels and token ids to the last token",
}
DENSE, ORACLE, STOCK = "dense", "oracle", "stock"
#: (width, height) in pixels of an image, where every image has a grid of its own
IMAGE_SIZE = (672, 672)


@dataclass
class Workload:
    """What the model is asked to do.

    input_ids:   (B, L) prompts with one image each
    images:      (B, 3, S, S) pixels, (B, crops, 3, S, S), or one (crops, 3, S, S) per image; as
                 the model's image processor makes them
    image_sizes: (width, height) of every image
    num_tokens:  tokens that every prompt is answered with
    """

    input_ids: Tensor
    images: Tensor | list[Tensor]
    image_sizes: list[tuple[int, int]]
    num_tokens: int
    asked: int = 0

    @classmethod
    def random(
        cls,
        model,
        batch_size: int,
        prompt_length: int,
        num_tokens: int,
        image_size: tuple[int, int] | None = None,
    ) -> Workload:
        """`prompt_length` text tokens around each image, half of them before it.

        image_size: (width, height) in pixels, `IMAGE_SIZE` by default, of models whose images have
                    grids of their own; ValueError with others
        """
        generator = torch.Generator().manual_seed(0)
        shape, size = image_shape(model, image_size)
        images = torch.randn(batch_size, *shape, generator=generator)
        config = model.config
        marks = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        high = min([config.vocab_size, *(mark for mark in marks if mark is not None)])
        ids = torch.randint(3, high, (batch_size, prompt_length + 1), generator=generator)
        ids[:, prompt_length // 2] = IMAGE_TOKEN_INDEX
        return cls(
            ids.to(model.device),
            images.to(model.device, model.dtype),
            [size] * batch_size,
            num_tokens,
        )

    def questions(self) -> list[str]:
        """One per image; nobody has asked them before, so that nothing can be remembered."""
        self.asked += 1
        return [f"What is {self.asked}-{row}?" for row in range(len(self.image_sizes))]

    def run(self, model, num_tokens: int | None = None) -> None:
        model.generate(
            self.input_ids,
            images=self.images,
            image_sizes=self.image_sizes,
            questions=self.questions(),
            do_sample=False,
            max_new_tokens=num_tokens or self.num_tokens,
        )


def image_shape(
    model, image_size: tuple[int, int] | None = None
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(shape of the tensor of an image, its (width, height) in pixels), as in `Workload.random`."""
    tower = model.get_vision_tower()
    if tower.grid is None:
        config = tower.config
        side = config.patch_size * config.spatial_merge_size
        width, height = image_size or IMAGE_SIZE
        bounds = 4 * side**2, 16384 * side**2  # of the released image processor
        height, width = smart_resize(height, width, side, *bounds)
        block = (config.spatial_merge_size**2, config.patch_values)
        return (height // side, width // side, *block), (width, height)
    side, crops = tower.image_size, model.crops_in_budget(Pruner())
    if image_size is not None:
        raise ValueError(
            f"--image-size has no place here: the tower of this model sees crops of {side} x {side}"
            " pixels, whatever the image"
        )
    if crops == 1:
        return (3, side, side), (side, side)
    return (crops, 3, side, side), (2 * side, 2 * side)


@dataclass
class Variant:
    """One thing to measure: `run` does the work once and returns seconds per stage.

    oracle: name of the variant that has the same token counts and chooses nothing
    """

    name: str
    run: Callable[[], dict[str, float]]
    oracle: str | None = None
    facts: dict = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)


def time_llava(
    model, pruner: Pruner, workload: Workload, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of every stage of `STAGES` for one call of `generate`; now: says what time it is."""
    return stages_of(model, pruner, workload, Stopwatch(model.device, now))


def stages_of(model, pruner: Pruner, workload: Workload, watch: Stopwatch) -> dict[str, float]:
    """What `watch` measures of every stage of `STAGES` for one call of `generate`; `decode` is the
    mean of its steps, and missing where there are none."""
    model.pruner = pruner
    pruner = model.pruner  # a share of tokens is a number by now
    hooks = filled_hooks(pruner.vision, pruner.decoder)
    methods = [(stage, hook, "select") for stage, hook in hooks]
    tower = model.get_vision_tower()
    methods.append((tower, "features" if tower.grid is None else "tokens", "vision"))
    methods.append((model, "forward", lambda: "decode" if watch.seen("prefill") else "prefill"))
    with watch.watch(methods), watch.span("rest") as whole:
        workload.run(model)
    stages = watch.read()
    prefill = next(span for span in watch.spans if span.stage == "prefill")
    found = {name: sum(stages.get(name, ())) for name in ("vision", "select", "prefill")}
    if "decode" in stages:
        found["decode"] = sum(stages["decode"]) / len(stages["decode"])
    found["first_token"] = watch.elapsed(whole.start, prefill.stop)
    found["end_to_end"] = watch.elapsed(whole.start, whole.stop)
    return found


def llava_facts(model, pruner: Pruner, workload: Workload) -> dict:
    """`facts`: tokens, cache bytes (measured on its tensors) and operations of one batch;
    `schedule`: the token counts to imitate."""
    model.pruner = pruner
    with trace_pruning(model) as trace, watch_schedule(pruner) as schedule:
        workload.run(model, num_tokens=1)
    rows = list(zip(*(tokens.tolist() for tokens in trace.prompt_tokens), strict=True))
    visual = torch.stack(trace.visual_tokens).double().mean(dim=1)  # per layer
    facts = {
        "setting": repr(pruner),
        "visual_tokens_first_layer": visual[0].item(),
        "visual_tokens_mean": visual.mean().item(),
        "visual_tokens_per_layer": visual.tolist(),
        "prompt_tokens_first_layer": rows[0][0],
        "kv_bytes": trace.kv_bytes,
        **{
            f"flops_{formula}": sum(prefill_flops(trace.shape, row, formula) for row in rows)
            for formula in FORMULAS
        },
    }
    return {"facts": facts, "schedule": schedule}


def with_budget(name: str, visual_token_num: int | None, **options) -> Pruner:
    """The method with this budget, where it takes one and one is given, and further options."""
    known = option_names(METHODS[name]) if name in METHODS else ["visual_token_num"]
    if visual_token_num is None or "visual_token_num" not in known:
        return build_pruner(name, **options)
    return build_with_budget(name, {"visual_token_num": visual_token_num}, **options)


def make_pruner(name: str, visual_token_num: int, model, **options) -> Pruner:
    """As `with_budget`, in use on `model` with random weights in place of trained parts.

    Raises ValueError where the method does not know the budget, or the model.
    """
    pruner = with_budget(name, visual_token_num, **options)
    check_needs(pruner.vision, model.get_vision_tower(), METHODS.own.values())
    pruner.use_random_parts(model)
    model.pruner = pruner
    return pruner


def check_image(pruner: Pruner, model, image_size: tuple[int, int] | None) -> None:
    """Raises ValueError where a setting cannot run on an image of this size: with a grid for every
    image that is known no earlier."""
    if model.get_vision_tower().grid is None:
        rows, columns = image_shape(model, image_size)[0][:2]
        own = pruner.with_budget_of(rows * columns)
        own.check(rows * columns, model.config.num_hidden_layers)


@torch.no_grad()
def build_variants(
    model,
    workload: Workload,
    pruners: dict[str, Pruner],
    visual_token_num: int,
    stock: bool = False,
    failed: dict[str, str] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> list[Variant]:
    """dense, the oracle of the budget, then each method behind the oracle of its own token counts;
    with `stock` also transformers' decoder on the dense prompt.

    Methods with the same counts share an oracle.
    failed: takes the methods that end with an error of the device, by name, with what it says;
            None: such an error is raised
    now: says what time it is, in seconds
    """
    crops = model.crops_in_budget(Pruner())
    variants: list[Variant] = []

    def add(name: str, pruner: Pruner, found: dict, oracle: str | None = None) -> None:
        model.pruner = pruner
        peak = peak_bytes(partial(workload.run, model), model.device)
        facts = {**found["facts"], "peak_bytes_over_weights": peak}
        facts["weight_bytes"] = weight_bytes(model)
        run = partial(time_llava, model, pruner, workload, now)
        variants.append(Variant(name, run, oracle, facts))

    add(DENSE, Pruner(), llava_facts(model, Pruner(), workload))
    plain = Oracle.constant(max(1, visual_token_num // crops), crops * len(workload.input_ids))
    oracles = {ORACLE: plain}
    add(ORACLE, plain, llava_facts(model, plain, workload))
    groups: dict[str, list] = {ORACLE: []}
    bar = progress(len(pruners), "first runs", "methods")
    for name, pruner in pruners.items():
        bar.update()
        try:
            found = llava_facts(model, pruner, workload)
        except RuntimeError as error:
            if failed is None:
                raise
            traceback.print_exc(file=sys.stderr)
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        own = imitation(found["schedule"], like=pruner)
        known = (key for key, oracle in oracles.items() if oracle.does_the_same_as(own, crops > 1))
        key = next(known, f"{ORACLE} of {name}")
        oracles.setdefault(key, own)
        groups.setdefault(key, []).append((name, pruner, found))
    bar.close()
    for key, group in groups.items():
        if key != ORACLE:
            add(key, oracles[key], llava_facts(model, oracles[key], workload))
        for name, pruner, found in group:
            add(name, pruner, found, oracle=key)
    if stock:
        model.pruner = Pruner()
        prompt = model.build_prompt(
            workload.input_ids, images=workload.images, image_sizes=workload.image_sizes
        )
        decoder = stock_decoder(model)
        task = decoder, prompt.inputs_embeds, workload.num_tokens
        variants.append(Variant(STOCK, lambda: time_stock(*task, Stopwatch(model.device, now))))
    return variants


def measure(
    variants: list[Variant],
    repeats: int,
    warmup: int = 2,
    seconds: float | None = None,
    label: str = "rounds",
) -> int:
    """Runs the variants in turns, each round starting with another one, and stores the rounds.

    Noise of a shared machine hits neighbours alike, so that ratios within a round stay meaningful.
    seconds: after so many no further round is begun, but for the first one that counts
    Returns how many rounds were measured.
    """
    start = time.perf_counter()
    with progress((warmup + repeats) * len(variants), label, "runs") as bar:
        for number in range(-warmup, repeats):
            over = seconds is not None and time.perf_counter() - start > seconds
            if over and number > 0:
                return number
            if over and number < 0:
                continue
            shift = number % len(variants)
            for variant in variants[shift:] + variants[:shift]:
                gc.collect()
                spent = variant.run()
                bar.update()
                if number >= 0:
                    variant.rounds.append(spent)
    return repeats


def check_same_tokens(variant: Variant, oracle: Variant) -> None:
    """Raises ValueError where an oracle's layers have other token counts than its method."""
    name = "visual_tokens_per_layer"
    if variant.facts[name] != oracle.facts[name]:
        raise ValueError(
            f"{variant.name} and its oracle differ in tokens per layer: {variant.facts[name]} and "
            f"{oracle.facts[name]}"
        )
