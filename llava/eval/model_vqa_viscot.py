"""Answers a set of the Visual-CoT benchmark: free-form questions, one image each.

python -m llava.eval.model_vqa_viscot --model-path llava-v1.5-7b --image-folder DIR \
    --question-file benchmark/gqa.json --answers-file A.jsonl [--brief]

A judge scores the answers: `python -m llava.eval.eval_viscot`.
"""

import os
from functools import partial

from llava.eval import viscot
from llava.eval.errors import errors_as_messages
from llava.eval.model_vqa_loader import build_parser, parse_args, run


@errors_as_messages()
def main():
    parser = build_parser(__doc__.splitlines()[0], "benchmark/gqa.json")
    parser.add_argument("--brief", action="store_true", help="ask for a single word or phrase")
    args = parse_args(parser)
    records = viscot.read(args.question_file, os.path.expanduser(args.image_folder))
    run(args, records, partial(viscot.viscot_questions, brief=args.brief))


if __name__ == "__main__":
    main()
