"""The same weights in transformers' LLaVA and here: time to the first token, and per further one.

    python -m llava.eval.efficiency.upstream --config 0.6b --methods vispruner --compile

Builds a model with random weights twice over one memory: as `LlavaForConditionalGeneration` of
transformers, with SDPA attention in its decoder, and as ours. Both answer one prompt by `generate`,
in turns, each round beginning with another one; answers of the unpruned models are compared first.
transformers' decoder is timed alone as well, on the embedded prompt and without `generate`: what
surrounds it in its LLaVA is then no part of the comparison. See docs/Efficiency.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.efficiency.arguments import (
    add_layers_arg,
    add_rounds_args,
    check_layers,
    check_rounds,
    clock_of,
    placed,
)
from llava.eval.efficiency.bandwidth import copy_bandwidth, weight_bytes
from llava.eval.efficiency.decode_run import COMPILED, Clock, ways_of_steps
from llava.eval.efficiency.facts import facts_of, sentence, size
from llava.eval.efficiency.measure import DENSE, Variant, Workload, make_pruner, measure
from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.eval.efficiency.report import ratios, spread
from llava.eval.efficiency.stock import IMAGE_ID, stock_decoder, stock_llava, time_stock
from llava.eval.efficiency.stopwatch import Stopwatch
from llava.eval.files.writing import write_json
from llava.model_args import DTYPES
from llava.program_parser import ProgramParser, Several
from llava.progress import progress
from llava.pruning import Pruner
from llava.pruning.cli import method_name

UPSTREAM, ALONE = "transformers", "transformers, decoder alone"
FIRST, LATER = "first_token", "decode"
#: the place of a page that the table is written into
MARK = "upstream"


@dataclass
class Row:
    """One way of answering; times are medians over the rounds, in milliseconds.

    first_ms, first_spread: until the first token, and the 10th and 90th percentile
    later_ms, later_spread: from one token to the next
    first, later:  the same over transformers' LLaVA, medians of the quotients within a round
    later_alone:   over transformers' decoder alone
    gigabytes:     weights that a token reads, over the time it takes, in GB/s
    """

    name: str
    first_ms: float | None
    first_spread: str | None
    later_ms: float
    later_spread: str
    first: float | None
    later: float
    later_alone: float
    gigabytes: float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ProgramParser(__doc__)
    add = parser.add_argument
    add("--config", default="0.6b", help="sizes of LLaVA-1.5, see docs/Efficiency.md")
    add_layers_arg(parser)
    add(
        "--methods",
        action=Several,
        default=[],
        type=method_name,
        metavar="METHOD",
        help="methods that are measured as well",
    )
    add("--visual-token-num", type=int, default=64, help="token budget of the methods")
    add("--compile", action="store_true", help="measures ours with compiled steps as well")
    add("--dtype", choices=DTYPES, default="fp32", help="type of numbers")
    add("--device", help="cuda or cpu (default: the best there is)")
    add("--prompt-length", type=int, default=64, help="text tokens per prompt (default: 64)")
    add("--output-tokens", type=int, default=17, help="tokens of every answer (default: 17)")
    add_rounds_args(parser)
    add("--json", metavar="FILE", help="also write the numbers here")
    add("--markdown", metavar="FILE", help="write the table into this page, between its marks")
    args = parser.parse_args(argv)
    check_layers(args.layers)
    check_rounds(args)
    if args.prompt_length < 1 or args.output_tokens < 2:
        parser.error("--prompt-length must be at least 1, --output-tokens 2")
    return args


def answer(generate: Callable, num_tokens: int, now: Callable) -> tuple[Tensor, dict[str, float]]:
    """(tokens of the answer, seconds to the first and between later ones) of `generate`, which is
    told how many there are to be. now: says what time it is"""
    clock = Clock(now)
    ids = generate(
        streamer=clock, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
    )
    return ids[0, -num_tokens:], {FIRST: clock.first_seconds, LATER: 1 / clock.decode_rate}


def ways_of_ours(
    model, pruners: dict[str, Pruner], compile: bool, now: Callable
) -> dict[str, Callable]:
    """Functions that make the model answer in some way, by name: (workload, tokens) -> as
    `answer`."""
    use = ways_of_steps(model, [True, False] if compile else [False])

    def run(pruner: Pruner, compiled: bool, workload: Workload, num_tokens: int):
        model.pruner = pruner
        use[compiled]()
        inputs = {"images": workload.images, "image_sizes": workload.image_sizes}
        inputs |= {"input_ids": workload.input_ids, "questions": workload.questions()}
        return answer(partial(model.generate, **inputs), num_tokens, now)

    return {
        name + (COMPILED if compiled else ""): partial(run, pruner, compiled)
        for name, pruner in pruners.items()
        for compiled in sorted(use)
    }


def ways_of_theirs(model, now: Callable) -> dict[str, Callable]:
    """The same for transformers on the weights of `model`; its decoder alone says no tokens."""
    theirs, decoder = stock_llava(model), stock_decoder(model)

    def whole(workload: Workload, num_tokens: int):
        ids = workload.input_ids.masked_fill(workload.input_ids == IMAGE_TOKEN_INDEX, IMAGE_ID)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generate = partial(theirs.generate, pixel_values=workload.images, **inputs)
        return answer(generate, num_tokens, now)

    def alone(workload: Workload, num_tokens: int):
        watch = Stopwatch(model.device, now)
        seconds = time_stock(decoder, embedded(model, workload), num_tokens, watch)
        return None, {LATER: seconds[LATER]}

    return {UPSTREAM: whole, ALONE: alone}


def embedded(model, workload: Workload) -> Tensor:
    """(B, S, D) whole prompts as they enter the decoder."""
    model.pruner = Pruner()
    prompt = model.build_prompt(
        workload.input_ids, images=workload.images, image_sizes=workload.image_sizes
    )
    return prompt.inputs_embeds


@torch.no_grad()
def compare(model, pruners: dict[str, Pruner], args) -> tuple[list[Row], int, bool]:
    """(rows, how many rounds were measured, whether the unpruned model says what transformers'
    says)."""
    workload = Workload.random(model, 1, args.prompt_length, args.output_tokens)
    now = clock_of(args, model.device)
    ways = ways_of_theirs(model, now)
    ways |= ways_of_ours(model, {DENSE: Pruner()} | pruners, args.compile, now)
    run = {name: partial(way, workload, args.output_tokens) for name, way in ways.items()}
    both = [run[name] for name in (UPSTREAM, DENSE)]
    theirs, ours = [way()[0] for way in progress(both, "first answers", "models")]
    same = torch.equal(theirs, ours)
    variants = [Variant(name, lambda way=way: way()[1]) for name, way in run.items()]
    rounds = measure(variants, args.repeats, args.warmup, args.time_limit)
    return rows_of(variants, weight_bytes(model)), rounds, same


def rows_of(variants: list[Variant], num_bytes: int) -> list[Row]:
    """What the rounds of variants say; num_bytes: weights that a token reads."""
    by_name = {variant.name: variant for variant in variants}
    rows = []
    for variant in variants:
        later = [1000 * seconds[LATER] for seconds in variant.rounds]
        first = [1000 * seconds[FIRST] for seconds in variant.rounds if FIRST in seconds]
        over = ratios(variant, by_name[UPSTREAM])
        row = Row(
            variant.name,
            spread(first)["median"] if first else None,
            _range(first, 0) if first else None,
            spread(later)["median"],
            _range(later, 1),
            over.get(FIRST),
            over[LATER],
            ratios(variant, by_name[ALONE])[LATER],
            num_bytes / spread(later)["median"] / 1e6,
        )
        rows.append(row)
    return rows


def _range(values: list[float], digits: int) -> str:
    found = spread(values)
    return f"{found['p10']:.{digits}f}–{found['p90']:.{digits}f}"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["", "first token, ms", "p10–p90", "per further token, ms", "p10–p90"]
    head += ["first token / transformers", "further token / transformers"]
    head += ["/ its decoder alone", "GB/s of weights"]
    lines = [
        [
            row.name,
            _cell(row.first_ms, 0),
            row.first_spread or "–",
            _cell(row.later_ms, 1),
            row.later_spread,
            *(_cell(ratio, 2) for ratio in (row.first, row.later, row.later_alone)),
            _cell(row.gigabytes, 1),
        ]
        for row in rows
    ]
    return markdown.table(head, lines, "lr")


def page(command: list[str], about: dict, rows: list[Row]) -> str:
    """What stands between the marks of a page."""
    words = shlex.join(["python", "-m", "llava.eval.efficiency.upstream", *command])
    prompts = f"{about['prompt_length']} text tokens and one image per prompt"
    what = size(about), f"{about['rounds']} rounds", prompts, f"{about['output_tokens']} tokens out"
    same = "the same" if about["same_answers"] else "NOT the same"
    said = f"{sentence(about, *what)} Unpruned answers are {same}."
    return f"`{words}`\n\n{said}\n\n{table(rows)}\n"


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@errors_as_messages()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints the table and, as the last line, everything as JSON."""
    args = parse_args(argv)
    model = build_random_model(*shapes(args.config, args.layers), **placed(args))
    clock_of(args, model.device)  # refuses before anything is measured
    pruners = {name: make_pruner(name, args.visual_token_num, model) for name in args.methods}
    rows, rounds, same = compare(model, pruners, args)
    about = facts_of(model, args) | {
        "rounds": rounds,
        "output_tokens": args.output_tokens,
        "copy_bandwidth": copy_bandwidth(model.device),
        "same_answers": same,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    result = {"about": about, "rows": [vars(row) for row in rows]}
    if args.json:
        write_json(result, args.json, indent=1)
    if args.markdown:
        command = sys.argv[1:] if argv is None else argv
        markdown.write_between_marks(args.markdown, page(command, about, rows), MARK)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
