"""What pruning saves: time per stage, cache bytes and operations, on random weights of real sizes.

    python -m llava.eval.efficiency --config 7b --method vispruner --visual-token-num 64

Every run measures, in one process and in turns, the dense model, the oracle (the model fed as many
visual tokens as the budget allows, with no work to select them) and each method. See
docs/Efficiency.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.errors import errors_as_messages
from llava.eval.random_model import DECODERS, build_random_model, shapes
from llava.eval.stock import stock_decoder, time_stock
from llava.eval.stopwatch import Stopwatch
from llava.model import LlavaLlamaForCausalLM
from llava.playground import default_model_path
from llava.pruning import Pruner, SelectPruner, VisionTokens, build_pruner, trace_pruning
from llava.pruning.cost import prefill_flops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOOKS = (
    "before_tower",
    "before_tower_layer",
    "after_encoder",
    "after_projector",
    "after_layout",
    "before_layer",
)
STAGES = {
    "vision": "vision tower, with the extras a method asks for",
    "select": "the method's own work, wherever it acts",
    "prefill": "decoder and head on the prompt, without what the method does in between",
    "decode": "decoder and head on one further token",
    "first_token": "from pixels and token ids to the logits of the first token",
    "end_to_end": "from pixels and token ids to the last token",
}


@dataclass
class Oracle(SelectPruner):
    """Keeps the first patches: what a budget costs when choosing is free."""

    name = "oracle"

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        count = self.num_keep(vision)
        features, positions = vision.features[:, :count], vision.positions[:, :count]
        return replace(vision, features=features, positions=positions)


@dataclass
class Workload:
    """What the model is asked to do.

    input_ids:  (B, L) prompts with one image each
    images:     (B, 3, S, S) pixels
    num_tokens: tokens that every prompt is answered with
    """

    input_ids: Tensor
    images: Tensor
    num_tokens: int

    @classmethod
    def random(cls, model, batch_size: int, prompt_length: int, num_tokens: int) -> Workload:
        """`prompt_length` text tokens around each image, half of them before it."""
        generator = torch.Generator().manual_seed(0)
        side = model.get_vision_tower().image_size
        images = torch.randn(batch_size, 3, side, side, generator=generator)
        high = model.config.vocab_size
        ids = torch.randint(3, high, (batch_size, prompt_length + 1), generator=generator)
        ids[:, prompt_length // 2] = IMAGE_TOKEN_INDEX
        return cls(ids.to(model.device), images.to(model.device, model.dtype), num_tokens)


@dataclass
class Variant:
    """One thing to measure: `run` does the work once and returns seconds per stage."""

    name: str
    run: Callable[[], dict[str, float]]
    facts: dict = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)


def time_llava(
    model: LlavaLlamaForCausalLM, pruner: Pruner, workload: Workload
) -> dict[str, float]:
    """Seconds of every stage of `STAGES` for one call of `generate`."""
    model.pruner = pruner
    watch = Stopwatch(model.device)
    methods = [(pruner, hook, "select") for hook in own_hooks(pruner)]
    methods.append((model.get_vision_tower(), "tokens", "vision"))
    methods.append((model, "forward", lambda: "decode" if watch.count("prefill") else "prefill"))
    with watch.watch(methods), watch.span("rest") as whole:
        _generate(model, workload)
    stages = watch.read()
    prefill = next(span for span in watch.spans if span.stage == "prefill")
    seconds = {name: sum(stages.get(name, ())) for name in ("vision", "select", "prefill")}
    if "decode" in stages:
        seconds["decode"] = sum(stages["decode"]) / len(stages["decode"])
    seconds["first_token"] = watch.elapsed(whole.start, prefill.stop)
    seconds["end_to_end"] = watch.elapsed(whole.start, whole.stop)
    return seconds


def own_hooks(pruner: Pruner) -> list[str]:
    """The hooks that the method fills."""
    return [name for name in HOOKS if getattr(type(pruner), name) is not getattr(Pruner, name)]


def _generate(model: LlavaLlamaForCausalLM, workload: Workload) -> None:
    model.generate(
        workload.input_ids,
        images=workload.images,
        do_sample=False,
        max_new_tokens=workload.num_tokens,
    )


def llava_facts(model: LlavaLlamaForCausalLM, pruner: Pruner, workload: Workload) -> dict:
    """Tokens, cache bytes (measured on its tensors) and operations of one prompt batch."""
    model.pruner = pruner
    with trace_pruning(model) as trace:
        _generate(model, replace(workload, num_tokens=1))
    rows = list(zip(*(tokens.tolist() for tokens in trace.prompt_tokens), strict=True))
    visual = torch.stack(trace.visual_tokens).double().mean(dim=1)  # per layer
    return {
        "setting": repr(pruner),
        "visual_tokens_first_layer": visual[0].item(),
        "visual_tokens_mean": visual.mean().item(),
        "prompt_tokens_first_layer": rows[0][0],
        "kv_bytes": trace.kv_bytes,
        "flops_exact": sum(prefill_flops(trace.shape, row, "exact") for row in rows),
        "flops_fastv": sum(prefill_flops(trace.shape, row, "fastv") for row in rows),
    }


@torch.no_grad()
def build_variants(
    model: LlavaLlamaForCausalLM,
    workload: Workload,
    methods: list[str],
    visual_token_num: int,
    stock: bool = False,
) -> list[Variant]:
    """dense, oracle, each method; with `stock` also transformers' decoder on the dense prompt."""
    pruners = {"dense": build_pruner("none"), "oracle": Oracle(visual_token_num)}
    pruners |= {name: build_pruner(name, visual_token_num=visual_token_num) for name in methods}
    for pruner in pruners.values():
        model.pruner = pruner  # a setting that cannot run is refused before anything is timed
    variants = [
        Variant(
            name, partial(time_llava, model, pruner, workload), llava_facts(model, pruner, workload)
        )
        for name, pruner in pruners.items()
    ]
    if stock:
        model.pruner = build_pruner("none")
        embeds = model.build_prompt(workload.input_ids, images=workload.images).inputs_embeds
        run = partial(time_stock, stock_decoder(model), embeds, workload.num_tokens)
        variants.append(Variant("stock", run))
    return variants


def measure(variants: list[Variant], repeats: int, warmup: int = 2, cuda: bool = False) -> None:
    """Runs the variants in turns, each round starting with another one, and stores the rounds.

    Noise of a shared machine hits neighbours alike, so that ratios within a round stay meaningful.
    With `cuda`, also the peak of GPU memory above what is held between runs.
    """
    for number in range(-warmup, repeats):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            gc.collect()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds = variant.run()
            if cuda:
                peak = torch.cuda.max_memory_allocated() - before
                variant.facts["peak_bytes_over_weights"] = peak
            if number >= 0:
                variant.rounds.append(seconds)


def summarize(variants: list[Variant]) -> list[dict]:
    """One row per variant: milliseconds (median, p10, p90) of every stage and ratios.

    A ratio is the median over the rounds of the quotient within one round.
    """
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for variant in variants:
        row = {"variant": variant.name, **variant.facts}
        row["ms"] = {
            stage: spread([1000 * seconds[stage] for seconds in variant.rounds])
            for stage in variant.rounds[0]
        }
        for base in ("oracle", "dense"):
            row[f"times_{base}"] = {
                stage: median(
                    own[stage] / other[stage]
                    for own, other in zip(variant.rounds, by_name[base].rounds, strict=True)
                )
                for stage in variant.rounds[0]
                if stage != "select"  # next to nothing there: a quotient would say nothing
            }
        rows.append(row)
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}


def format_table(rows: list[dict]) -> str:
    """The rows for people; times are medians in milliseconds."""
    head = ["variant", "tokens", *STAGES, "p10-p90", "x oracle", "x dense"]
    head += ["KV MB", "TFLOP", "TFLOP (FastV)"]
    lines = [head]
    for row in rows:
        ms, cells = row["ms"], [row["variant"]]
        cells.append(_number(row.get("visual_tokens_mean"), "{:.4g}"))
        cells += [_number(ms.get(stage, {}).get("median"), "{:.1f}") for stage in STAGES]
        whole = ms.get("end_to_end")
        cells.append("-" if whole is None else f"{whole['p10']:.0f}-{whole['p90']:.0f}")
        for base in ("oracle", "dense"):
            cells.append(_number(row[f"times_{base}"].get("end_to_end"), "{:.3f}"))
        cells.append(_number(row.get("kv_bytes"), "{:.1f}", 1e-6))
        cells += [_number(row.get(f"flops_{name}"), "{:.3f}", 1e-12) for name in ("exact", "fastv")]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(value * scale)


def describe(args: argparse.Namespace, model: LlavaLlamaForCausalLM) -> dict:
    """Everything the numbers depend on besides the code."""
    device = model.device
    cuda = device.type == "cuda"
    return {
        "config": args.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(device)
        if cuda
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "prompt_length": args.prompt_length,
        "generated_tokens": args.decode_tokens + 1,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(flag: str, **kwargs) -> None:
        parser.add_argument(*dict.fromkeys((flag, "--" + flag[2:].replace("-", "_"))), **kwargs)

    sizes = f"{', '.join(DECODERS)}, playground, or a checkpoint folder"
    add("--config", default="playground", help=f"sizes to measure: {sizes} (default: playground)")
    add("--method", default="vispruner", help="methods to measure, with commas between them")
    add("--visual-token-num", type=int, default=64, help="token budget per image (default: 64)")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--repeats", type=int, default=10, help="timed rounds (default: 10)")
    add("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    add("--batch-size", type=int, default=1, help="prompts at a time, one image each (default: 1)")
    add("--prompt-length", type=int, default=64, help="text tokens per prompt (default: 64)")
    add("--decode-tokens", type=int, default=16, help="tokens after the first (default: 16)")
    add("--stock", action="store_true", help="also time transformers' own decoder, dense")
    add("--json", metavar="FILE", help="write the result there, too")
    args = parser.parse_args(argv)
    for name in ("repeats", "batch_size", "prompt_length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.warmup, args.decode_tokens) < 0:
        raise ValueError("--warmup and --decode-tokens must not be negative")
    return args


@errors_as_messages()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints a table and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = default_model_path() if args.config == "playground" else args.config
    methods = [method.strip() for method in args.method.split(",") if method.strip()]
    model = build_random_model(*shapes(name), dtype=DTYPES[args.dtype], device=device)
    about = describe(args, model)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    workload = Workload.random(model, args.batch_size, args.prompt_length, args.decode_tokens + 1)
    variants = build_variants(model, workload, methods, args.visual_token_num, args.stock)
    measure(variants, args.repeats, args.warmup, cuda=model.device.type == "cuda")
    result = {**about, "variants": summarize(variants)}
    print(format_table(result["variants"]))
    print("Milliseconds, medians. " + "; ".join(f"{k}: {v}" for k, v in STAGES.items()) + ".")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
