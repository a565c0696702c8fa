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
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from llava.errors import errors_as_messages
from llava.eval.efficiency import decode_speed, launches
from llava.eval.efficiency.arguments import (
    add_rounds_args,
    add_shape_args,
    check_layers,
    check_rounds,
    clock_of,
    placed,
)
from llava.eval.efficiency.bandwidth import copy_bandwidth
from llava.eval.efficiency.facts import facts_of
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
from llava.eval.efficiency.report import MARK, format_table, markdown, plot, summarize
from llava.eval.files.writing import write_json
from llava.eval.markdown import write_between_marks
from llava.eval.plotting import import_pyplot
from llava.model_args import DTYPES
from llava.playground import default_model_path
from llava.program_parser import ProgramParser, Several, dashed
from llava.pruning import METHODS, Pruner
from llava.pruning.cli import method_name

ALL = "all"
#: what is done in place of timing rounds -> options that say nothing of it
NO_PLACE = {
    "decode": "repeats time_limit batch_size output_tokens stock plot count_kernels".split(),
    "count_kernels": "repeats warmup time_limit processor_time stock plot".split(),
}


def methods_to_measure(
    names: list[str], visual_token_num: int, model, image_size: tuple[int, int] | None = None
) -> tuple[dict[str, Pruner], dict[str, str]]:
    """(pruners by name, reasons by name why a method is not measured).

    A method that is named must run; among "all" one that does not know the budget is left out, and
    the report says so.
    """
    every = names == [ALL]
    pruners, refused = {}, {}
    for name in [name for name in METHODS if name != Pruner.name] if every else names:
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
    return {
        "command": shlex.join(["python", "-m", "llava.eval.efficiency", *command]),
        **facts_of(model, args),
        "copy_bandwidth": None if args.count_kernels else copy_bandwidth(model.device),
        "image_size": by_x(image_shape(model, args.image_size)[1]),
        "repeats": args.repeats,
    }


def by_x(size: tuple[int, int]) -> str:
    """(width, height) as `--image-size` takes them."""
    return "x".join(map(str, size))


def number(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def method_or_all(text: str) -> str:
    """The type of --methods: a method, two in a row, or the word for all of them."""
    return text if text == ALL else method_name(text)


def build_parser() -> ProgramParser:
    parser = ProgramParser(__doc__)
    add = parser.add_argument
    sizes = f"{', '.join(CONFIGS)}, playground, or a checkpoint folder"
    add("--config", default="playground", help=f"sizes to measure: {sizes} (default: playground)")
    add_shape_args(parser)
    parser.add_argument(
        "--methods",
        "--method",
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
    add_rounds_args(parser)
    add(
        "--batch-size",
        action=Several,
        type=number,
        default=[1],
        metavar="N",
        help="prompts at a time, one image each; several sizes are each measured",
    )
    add("--prompt-length", type=int, default=64, help="text tokens per prompt (default: 64)")
    add(
        "--output-tokens",
        action=Several,
        type=number,
        default=[17],
        metavar="N",
        help="tokens of every answer; several lengths are each measured",
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
        help="compiles decoding, on a GPU also prompts; with --decode, all with and without it",
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
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; `given` holds the values of those that stand in the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    found = vars(parser.parse_args(argv, unset))
    args.given = {name: value for name, value in found.items() if value is not None}
    for what, others in NO_PLACE.items():
        if what in args.given and (strange := [name for name in others if name in args.given]):
            what, other = (dashed(f"--{name}") for name in (what, strange[0]))
            parser.error(f"{what} has no use for {other}: leave it out")
    if args.count_kernels and len(args.batch_size) > 1:
        parser.error("--count-kernels counts for one --batch-size: name one")
    for name in ("prompt_length", "visual_token_num"):
        if getattr(args, name) < 1:
            raise ValueError(f"{dashed(f'--{name}')} must be at least 1")
    check_layers(args.layers)
    check_rounds(args)
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
        failed if args.methods == [ALL] else None,
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
        write_between_marks(args.markdown, launches.page(result["about"], counts), launches.MARK)


def decode_words(given: dict[str, object]) -> list[str]:
    """The command line of `llava.eval.efficiency.decode_speed` for the same request; given: the
    values of the options that were given, by name."""
    own = {name: value for name, value in given.items() if name != "decode"}
    config, methods = own.pop("config", "playground"), own.pop("methods", [ALL])
    if config != "playground":
        own["config" if config in CONFIGS else "model_path"] = config
    if "image_size" in own:
        own["image_size"] = by_x(own["image_size"])
    words = [] if methods == [ALL] else ["--methods", *methods]
    for name, value in own.items():
        words += [dashed(f"--{name}")] if value is True else [dashed(f"--{name}"), str(value)]
    return words


@errors_as_messages()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints tables and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    if args.decode:
        return decode_speed.main(decode_words(args.given))
    name = default_model_path() if args.config == "playground" else args.config
    model = build_random_model(*shapes(name, args.layers), **placed(args))
    if args.count_kernels and args.compile and model.device.type != "cuda":
        raise ValueError(
            "--count-kernels counts what eager code asks for; --compile adds what the profiler "
            f"sees on a GPU of compiled steps, and this is {model.device.type}: leave it out"
        )
    model.compile_decoding = args.compile and not args.count_kernels
    pruners, refused = methods_to_measure(
        args.methods, args.visual_token_num, model, args.image_size
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
            save(args, result)  # what comes later may fail
    print("Milliseconds, medians. " + "; ".join(f"{k}: {v}" for k, v in STAGES.items()) + ".")
    if args.markdown:
        write_between_marks(args.markdown, markdown(result), MARK)
    if args.plot:
        plot(result, args.plot)
    return finish(args, result)


def save(args, result: dict) -> None:
    """Writes the result where it was asked for."""
    if args.json:
        write_json(result, args.json, indent=1)


def finish(args, result: dict) -> dict:
    """Writes the result where it was asked for, and prints it as one line."""
    save(args, result)
    print(json.dumps(result))
    return result
