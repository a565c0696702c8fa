"""Methods x budgets x benchmarks, as a comparison people can trust: scores with 95 % intervals,
agreement with the unpruned answers, and what every setting costs.

    python -m llava.eval.compare --tokens 192 128 64 32 --limit 100
    python -m llava.eval.compare --methods nuwa vispruner --tasks refcoco --published
    python -m llava.eval.compare --page docs/Results.md      (pictures into images/, numbers
                                                              into docs/results/)

Answers come from `llava.eval.compare.suite` (same options, resumable, several processes). On top of
its scores.json the folder gets compare.json, compare.csv, compare.md and three plots: score over
visual tokens, over operations and over measured time. See docs/Comparing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from llava.errors import errors_as_messages
from llava.eval.compare import gallery, pages, suite
from llava.eval.compare.budget import Budget
from llava.eval.compare.comparison import Comparison, compare_runs
from llava.eval.compare.costs import measure_costs, sample_prompts
from llava.eval.compare.pages import AXES
from llava.eval.compare.plot import plot
from llava.eval.compare.published import model_beside, published_table, read_published
from llava.eval.compare.report import csv_text, markdown
from llava.program_parser import ProgramParser, Several


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ProgramParser(__doc__, whole=True)
    suite.add_suite_args(parser, out="runs/compare")
    parser.set_defaults(tokens=[Budget(number) for number in (192, 128, 64, 32)])
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--timed-prompts",
        type=int,
        default=8,
        help="prompts on which times and memory are measured",
    )
    group.add_argument(
        "--published",
        nargs="?",
        const="",
        metavar="MODEL",
        help="put published numbers of this model beside ours (default: those of the "
        "family and size that is compared)",
    )
    group.add_argument(
        "--page",
        metavar="FILE",
        help="also write the results as a page of docs/, its pictures, and its numbers for the "
        "page of all results (llava.eval.compare.gallery)",
    )
    group.add_argument(
        "--highlight",
        action=Several,
        metavar="METHOD",
        help="methods drawn in colour, five at most (default: those that are best at their cost)",
    )
    args = suite.parse_suite_args(parser, argv)
    if args.timed_prompts < 1:
        parser.error("--timed-prompts must be at least 1")
    if unknown := [name for name in args.highlight or () if name not in args.methods]:
        parser.error(f"--highlight {unknown[0]}: --methods has {', '.join(args.methods)}")
    return args


def write(comparison: Comparison, args: argparse.Namespace, command: str) -> None:
    """Writes all files of a comparison."""

    def save(name: str, text: str) -> None:
        with open(os.path.join(args.out, name), "w", encoding="utf-8", newline="") as file:
            file.write(text)

    save("compare.json", json.dumps(comparison.as_dict(), indent=1))
    save("compare.csv", csv_text(comparison))
    text = markdown(comparison)
    if args.published:
        text += "\n" + published_table(comparison, read_published(), args.published)
    save("compare.md", text)
    for axis in AXES:
        plot(comparison, axis, os.path.join(args.out, f"{axis}.png"), args.highlight)
    if args.page:
        docs = Path(args.page).parent
        comparison.settings |= pages.origin(args.page, command, args.published, args.highlight)
        saved = gallery.save(comparison, docs / "results")
        pages.write(gallery.load(saved), docs)


def computed_in(model) -> dict[str, str]:
    """The numbers that a model computes in and the device: scores and costs are true of these."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": name}


@errors_as_messages()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    loop, runs, benchmarks, workers = suite.prepare(args)
    if args.published is not None:
        args.published = model_beside(args.published, loop.model.config)
    scores = suite.run_all(loop, runs, benchmarks, args, workers)
    if not workers.main:
        return
    prompts = sample_prompts(loop, benchmarks, args.data_dir, args.timed_prompts, args.limit)
    costs = measure_costs(loop.model, runs, prompts)
    comparison = compare_runs(runs, scores, costs, benchmarks, args)
    comparison.settings |= computed_in(loop.model)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    write(comparison, args, f"python -m llava.eval.compare {given}".strip())
    print(markdown(comparison))
    print(f"written: {args.out}/compare.md .csv .json, {', '.join(AXES)}.png", file=sys.stderr)
