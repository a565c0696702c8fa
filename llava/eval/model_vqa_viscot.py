"""Answers a set of the Visual-CoT benchmark: free-form questions, one image each.

python -m llava.eval.model_vqa_viscot --model-path llava-v1.5-7b --image-folder DIR \
    --question-file benchmark/gqa.json --answers-file A.jsonl [--brief] [--save-masks]

A judge scores the answers: `python -m llava.eval.benchmarks.viscot`. The questions come with boxes
around what they are about: each line says how the kept tokens meet them, `A_info.json` sums that up
with the time and the tokens of the answers, and `--do-func-name glimpse` does nothing else.
"""

import argparse
import os
from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run
from llava.eval.benchmarks import viscot
from llava.eval.files import box_counts, costs
from llava.eval.files.answer_lines import answers_among, read_lines
from llava.eval.files.records import read_json
from llava.eval.files.writing import write_json

#: what the release does with a question: answer it, or only choose tokens
FUNCTIONS = ("generate", "glimpse")


def add_viscot_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Visual-CoT")
    group.add_argument("--brief", action="store_true", help="ask for a single word or phrase")
    group.add_argument(
        "--do-func-name",
        choices=FUNCTIONS,
        default=FUNCTIONS[0],
        help="glimpse: choose tokens and compare them with the boxes, without answering",
    )
    group.add_argument(
        "--use-ref-masks",
        action="store_true",
        help="keep what the boxes cover, in place of what the method would choose (it needs the "
        "option ref_boxes)",
    )
    group.add_argument(
        "--use-zero-masks",
        dest="pruning_arg",
        action="append_const",
        const="reduce_threshold=1",
        help="keep no more than the method's minimum: reduce_threshold=1",
    )
    group.add_argument(
        "--num-samples", dest="limit", type=int, help="the release's word for --limit"
    )
    group.add_argument(
        "--measure-memory", action="store_true", help="note the memory of a GPU with every answer"
    )
    parser.set_defaults(measure=True)


def info(path: str) -> dict:
    """What `A_info.json` says of a complete answers file."""
    answers = answers_among(read_lines(path))
    settings = f"{os.path.splitext(path)[0]}.settings.json"
    found = {"args": read_json(settings), **costs.summarize(answers)}
    return found | (box_counts.summarize(answers) or {})


@errors_as_messages()
def main():
    parser = build_parser(__doc__, "benchmark/gqa.json")
    add_viscot_args(parser)
    args = parse_args(parser)
    args.only_masks = args.do_func_name == "glimpse"
    records = viscot.read(args.question_file, os.path.expanduser(args.image_folder))
    if run(args, records, partial(viscot.viscot_questions, brief=args.brief)):
        path = os.path.expanduser(args.answers_file)
        write_json(info(path), f"{os.path.splitext(path)[0]}_info.json", indent=2)


if __name__ == "__main__":
    main()
