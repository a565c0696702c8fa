"""What pruning saves: time per stage, cache bytes and operations, on random weights of real sizes.

    python -m llava.eval.efficiency --config 7b --method vispruner --visual-token-num 64
    python -m llava.eval.efficiency --config 7b --method all --batch-size 1,4,16 \\
        --output-tokens 1,32,256 --json runs/7b.json --plot runs/7b.png
    python -m llava.eval.efficiency --config small --layers 32 --count-kernels

Every run measures, in one process and in turns, the dense model, the oracle (the model fed as many
visual tokens as the budget allows, with no work to select them), each method, and the oracle that
has the method's own number of tokens in every layer. With --count-kernels it counts launches
instead, which needs no GPU. See docs/Efficiency.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import __version__ as transformers_version

from llava.errors import errors_as_messages
from llava.eval.efficiency import decode_speed, launches
from llava.eval.efficiency.arguments import (
    add_clock_arg,
    add_shape_args,
    check_layers,
    clock_name,
    clock_of,
    placed,
    write_json,
)
from llava.eval.efficiency.bandwidth import copy_bandwidth
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
from llava.eval.efficiency.profile import profile_tokens
from llava.eval.efficiency.random_model import CONFIGS, build_random_model, shapes
from llava.eval.efficiency.report import (
    EFFICIENCY,
    LAUNCHES,
    format_table,
    markdown,
    plot,
    summarize,
    write_between_marks,
)
from llava.eval.plotting import import_pyplot
from llava.model_args import DTYPES
from llava.playground import default_model_path
from llava.program_parser import ProgramParser, Several
from llava.pruning import METHODS, Pruner
from llava.pruning.cli import method_name

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
        "clock": clock_name(args),
        "copy_bandwidth": None if args.count_kernels else copy_bandwidth(device),
        "layers": model.config.num_hidden_layers,
        "image_size": "x".join(map(str, image_shape(model, args.image_size)[1])),
        "visual_token_num": args.visual_token_num,
        "prompt_length": args.prompt_length,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def method_or_all(text: str) -> str:
    """The type of --methods: a method, two in a row, or the word for all of them."""
    return text if text == ALL else method_name(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ProgramParser(__doc__)

    add = parser.add_argument
    sizes = f"{', '.join(CONFIGS)}, playground, or a checkpoint folder"
    add("--config", default="playground", help=f"sizes to measure: {sizes} (default: playground)")
    add_shape_args(parser)
    parser.add_argument(
        "--methods",
        "--method",
        dest="method",
        action=Several,
        type=method_or_all,
        default=[ALL],
        metavar="METHOD",
        help="methods to measure, two in a row as METHOD+METHOD, or all (the default)",
    )
    add("--visual-token-num", type=int, default=64, help="token budget per image (default: 64)")
    add(
        "--dtype",
        choices=DTYPES,
        help="type of numbers (default: bf16, fp32 on a CPU without bf16 products)",
    )
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--repeats", type=int, default=20, help="timed rounds (default: 20)")
    add("--warmup", type=int, default=3, help="rounds before those that count (default: 3)")
    add_clock_arg(add)
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no further round of a table after so long (default: none); the table says how "
        "many rounds there were",
    )
    add(
        "--batch-size",
        action=Several,
        type=number,
        default=[1],
        metavar="N",
        help="prompts at a time, one image each; of several sizes each is measured",
    )
    add("--prompt-length", type=int, default=64, help="text tokens per prompt (default: 64)")
    add(
        "--output-tokens",
        action=Several,
        type=number,
        default=[17],
        metavar="N",
        help="tokens of every answer; of several lengths each is measured",
    )
    add(
        "--decode",
        action="store_true",
        help="measure long answers instead, token by token, with and without guesses, of the "
        "playground, a checkpoint, or random weights; more options: "
        "python -m llava.eval.efficiency.decode_speed --help",
    )
    add(
        "--compile",
        action="store_true",
        help="compiles decoding, on a GPU also prompts; with --decode, every way runs both ways",
    )
    add(
        "--count-kernels",
        action="store_true",
        help="measure no times, but count what a device is asked to run, by stage and per token",
    )
    add("--stock", action="store_true", help="also time transformers' own decoder, dense")
    add("--json", metavar="FILE", help="write the result there, too")
    add("--markdown", metavar="FILE", help="write the table into this page, between its marks")
    add("--plot", metavar="FILE", help="write a picture of the times (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    args.method = ",".join(args.method)
    for name in ("repeats", "prompt_length", "visual_token_num"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    check_layers(args.layers)
    if args.time_limit is not None and args.time_limit <= 0:
        raise ValueError(f"--time-limit ({args.time_limit:g}) must be more than 0 seconds")
    if args.warmup < 0:
        raise ValueError("--warmup must not be negative")
    for file in filter(None, (args.json, args.markdown, args.plot)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.plot:
        import_pyplot()  # a missing extra should be known before an hour of measuring
    return args


def run_workload(
    args, model, pruners: dict[str, Pruner], refused: dict[str, str], batch_size: int, length: int
) -> dict:
    """Measures everything with one batch size and one length of the answers.

    refused: takes, among "all", methods that end with an error of the device
    """
    workload = Workload.random(model, batch_size, args.prompt_length, length, args.image_size)
    failed: dict[str, str] = {}
    variants = build_variants(
        model,
        workload,
        pruners,
        args.visual_token_num,
        args.stock,
        failed if args.method.strip() == ALL else None,
        clock_of(args, model.device),
    )
    refused.update(failed)
    by_name = {variant.name: variant for variant in variants}
    for variant in variants:
        if variant.oracle is not None:
            check_same_tokens(variant, by_name[variant.oracle])
    label = f"batch {batch_size}, {length} tokens out"
    rounds = measure(variants, args.repeats, args.warmup, args.time_limit, label)
    rows = summarize(variants)
    print(f"\n{label}, {rounds} rounds\n{format_table(rows)}", flush=True)
    return {"batch_size": batch_size, "output_tokens": length, "rounds": rounds, "variants": rows}


def run_counts(args, model, pruners: dict[str, Pruner], result: dict) -> None:
    """Adds the launches of the unpruned model and of every method to the result, and what a GPU
    really ran for a token where there is one."""
    length = max(launches.TOKENS, *args.output_tokens)
    workload = Workload.random(
        model, args.batch_size[0], args.prompt_length, length, args.image_size
    )
    counts = launches.count_all(model, pruners, workload)
    print(f"\n{launches.table(counts)}", flush=True)
    result["launches"] = [asdict(own) for own in counts]
    if model.device.type == "cuda":
        ways = {"plain": False} | ({"compiled": True} if args.compile else {})
        result["profile"] = {}
        for way, compiled in ways.items():
            model.compile_decoding = compiled
            found = result["profile"][way] = profile_tokens(model, workload)
            print(f"\nprofile of the unpruned model, {way}, per token: {found}", flush=True)
    if args.markdown:
        write_between_marks(args.markdown, launches.page(result["about"], counts), LAUNCHES)


def decode_words(args) -> list[str]:
    """The command line of `llava.eval.efficiency.decode_speed` for the same request."""
    words = {
        "--visual-token-num": args.visual_token_num,
        "--dtype": args.dtype,
        "--device": args.device,
        "--json": args.json,
        "--markdown": args.markdown,
        "--layers": args.layers,
        "--image-size": args.image_size and "x".join(map(str, args.image_size)),
    }
    if args.config != "playground":
        words["--config" if args.config in CONFIGS else "--model-path"] = args.config
    given = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
    if args.method.strip() != ALL:
        given += ["--methods", *(name.strip() for name in args.method.split(","))]
    given += ["--compile"] if args.compile else []
    return given + (["--processor-time"] if args.processor_time else [])


@errors_as_messages()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints tables and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    if args.decode:
        return decode_speed.main(decode_words(args))
    name = default_model_path() if args.config == "playground" else args.config
    model = build_random_model(*shapes(name, args.layers), **placed(args))
    model.compile_decoding = args.compile
    pruners, refused = methods_to_measure(
        args.method, args.visual_token_num, model, args.image_size
    )
    about = describe(args, model, sys.argv[1:] if argv is None else argv)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for method, reason in refused.items():
        print(f"not measured: {method}: {reason}")
    result = {"about": about, "refused": refused, "runs": []}
    if not pruners and refused:
        raise ValueError("no method can be measured with these options, see above")
    if args.count_kernels:
        run_counts(args, model, pruners, result)
        return finish(args, result)
    for batch_size in args.batch_size:
        for length in args.output_tokens:
            run = run_workload(args, model, pruners, refused, batch_size, length)
            result["runs"].append(run)
            write_json(result, args.json)  # what comes later may fail
    print("Milliseconds, medians. " + "; ".join(f"{k}: {v}" for k, v in STAGES.items()) + ".")
    if args.markdown:
        write_between_marks(args.markdown, markdown(result), EFFICIENCY)
    if args.plot:
        plot(result, args.plot)
    return finish(args, result)


def finish(args, result: dict) -> dict:
    """Writes the result where it was asked for, and prints it as one line."""
    write_json(result, args.json)
    print(json.dumps(result))
    return result
