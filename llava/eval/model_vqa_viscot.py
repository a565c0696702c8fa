"""Answers a set of the Visual-CoT benchmark: free-form questions, one image each.

python -m llava.eval.model_vqa_viscot --model-path llava-v1.5-7b --image-folder DIR \
    --question-file benchmark/gqa.json --answers-file A.jsonl [--brief]

A judge scores the answers: `python -m llava.eval.benchmarks.viscot`.
"""

import os
from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run
from llava.eval.benchmarks import viscot


@errors_as_messages()
def main():
    parser = build_parser(__doc__.splitlines()[0], "benchmark/gqa.json")
    parser.add_argument("--brief", action="store_true", help="ask for a single word or phrase")
    args = parse_args(parser)
    records = viscot.read(args.question_file, os.path.expanduser(args.image_folder))
    run(args, records, partial(viscot.viscot_questions, brief=args.brief))


if __name__ == "__main__":
    main()
