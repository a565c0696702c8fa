"""What pruning saves: time per stage, cache bytes and operations, on random weights of real sizes.

    python -m llava.eval.efficiency --config 7b --method vispruner --visual-token-num 64
    python -m llava.eval.efficiency --config 7b --method all --batch-size 1,4,16 \\
        --output-tokens 1,32,256 --json runs/7b.json --plot runs/7b.png

Every run measures, in one process and in turns, the dense model, the oracle (the model fed as many
visual tokens as the budget allows, with no work to select them), each method, and the oracle that
has the method's own number of tokens in every layer. See docs/Efficiency.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import __version__ as transformers_version

from llava.errors import errors_as_messages
from llava.eval.efficiency import decode_speed
from llava.eval.efficiency.arguments import add_shape_args, check_layers, placed, write_json
from llava.eval.efficiency.measure import (
    STAGES,
    Workload,
    build_variants,
    check_image,
    check_same_tokens,
    image_shape,
    make_pruner,
    measure,
)
from llava.eval.efficiency.random_model import CONFIGS, build_random_model, shapes
from llava.eval.efficiency.report import (
    format_table,
    markdown,
    plot,
    summarize,
    write_between_marks,
)
from llava.eval.plotting import import_pyplot
from llava.model_args import DTYPES, add_option
from llava.playground import default_model_path
from llava.pruning import METHODS, Pruner

ALL = "all"


def methods_to_measure(
    names: str, visual_token_num: int, model, image_size: tuple[int, int] | None = None
) -> tuple[dict[str, Pruner], dict[str, str]]:
    """(pruners by name, reasons by name why a method is not measured).

    A method that is named must run; among "all" one that does not know the budget is left out, and
    the report says so.
    """
    every = names.strip() == ALL
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if every:
        wanted = [name for name in METHODS if name != Pruner.name]
    pruners, refused = {}, {}
    for name in wanted:
        try:
            pruner = make_pruner(name, visual_token_num, model)
            check_image(pruner, model, image_size)
            pruners[name] = pruner
        except ValueError as error:
            if not every:
                raise
            refused[name] = str(error)
    return pruners, refused


def describe(args: argparse.Namespace, model, command: list[str]) -> dict:
    """Everything the numbers depend on besides the code."""
    device = model.device
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", "-m", "llava.eval.efficiency", *command]),
        "config": args.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if cuda
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "layers": model.config.num_hidden_layers,
        "image_size": "x".join(map(str, image_shape(model, args.image_size)[1])),
        "visual_token_num": args.visual_token_num,
        "prompt_length": args.prompt_length,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }


def numbers(text: str) -> list[int]:
    """Whole numbers of at least 1 with commas between them."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every number must be at least 1")
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.efficiency", description=__doc__.split("\n")[0]
    )

    add = partial(add_option, parser)
    sizes = f"{', '.join(CONFIGS)}, playground, or a checkpoint folder"
    add("--config", default="playground", help=f"sizes to measure: {sizes} (default: playground)")
    add_shape_args(parser)
    add(
        "--method",
        default=ALL,
        help="methods to measure, with commas between them, or all (the default)",
    )
    add("--visual-token-num", type=int, default=64, help="token budget per image (default: 64)")
    add("--dtype", choices=DTYPES, help="default: bf16, fp32 on a CPU without bf16 products")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--repeats", type=int, default=10, help="timed rounds (default: 10)")
    add("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    add(
        "--batch-size",
        type=numbers,
        default=[1],
        help="prompts at a time, one image each; several sizes with commas (default: 1)",
    )
    add("--prompt-length", type=int, default=64, help="text tokens per prompt (default: 64)")
    add(
        "--output-tokens",
        type=numbers,
        default=[17],
        help="tokens of every answer; several lengths with commas (default: 17)",
    )
    add(
        "--decode",
        action="store_true",
        help="instead: long answers token by token, with and without guessed tokens, of the "
        "playground, a checkpoint, or random weights; more options: "
        "python -m llava.eval.efficiency.decode_speed --help",
    )
    add("--stock", action="store_true", help="also time transformers' own decoder, dense")
    add("--json", metavar="FILE", help="write the result there, too")
    add("--markdown", metavar="FILE", help="write the table into this page, between its marks")
    add("--plot", metavar="FILE", help="draw the times there (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    for name in ("repeats", "prompt_length", "visual_token_num"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    check_layers(args.layers)
    if args.warmup < 0:
        raise ValueError("--warmup must not be negative")
    for file in filter(None, (args.json, args.markdown, args.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.plot:
        import_pyplot()  # a missing extra should be known before an hour of measuring
    return args


def run_workload(args, model, pruners: dict[str, Pruner], batch_size: int, length: int) -> dict:
    """Measures everything with one batch size and one length of the answers."""
    workload = Workload.random(model, batch_size, args.prompt_length, length, args.image_size)
    variants = build_variants(model, workload, pruners, args.visual_token_num, args.stock)
    by_name = {variant.name: variant for variant in variants}
    for variant in variants:
        if variant.oracle is not None:
            check_same_tokens(variant, by_name[variant.oracle])
    measure(variants, args.repeats, args.warmup)
    rows = summarize(variants)
    print(f"\nbatch {batch_size}, {length} tokens out\n{format_table(rows)}", flush=True)
    return {"batch_size": batch_size, "output_tokens": length, "variants": rows}


def decode_words(args) -> list[str]:
    """The command line of `llava.eval.efficiency.decode_speed` for the same request."""
    words = {
        "--visual-token-num": args.visual_token_num,
        "--dtype": args.dtype,
        "--device": args.device,
        "--json": args.json,
        "--layers": args.layers,
        "--image-size": args.image_size and "x".join(map(str, args.image_size)),
    }
    if args.config != "playground":
        words["--config" if args.config in CONFIGS else "--model-path"] = args.config
    given = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
    if args.method.strip() != ALL:
        given += ["--methods", *(name.strip() for name in args.method.split(","))]
    return given


@errors_as_messages()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints tables and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    if args.decode:
        return decode_speed.main(decode_words(args))
    name = default_model_path() if args.config == "playground" else args.config
    model = build_random_model(*shapes(name, args.layers), **placed(args))
    pruners, refused = methods_to_measure(
        args.method, args.visual_token_num, model, args.image_size
    )
    about = describe(args, model, sys.argv[1:] if argv is None else argv)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for method, reason in refused.items():
        print(f"not measured: {method}: {reason}")
    result = {"about": about, "refused": refused, "runs": []}
    for batch_size in args.batch_size:
        for length in args.output_tokens:
            result["runs"].append(run_workload(args, model, pruners, batch_size, length))
    print("Milliseconds, medians. " + "; ".join(f"{k}: {v}" for k, v in STAGES.items()) + ".")
    write_json(result, args.json)
    if args.markdown:
        write_between_marks(args.markdown, markdown(result))
    if args.plot:
        plot(result, args.plot)
    print(json.dumps(result))
    return result
