"""Answers Q-Bench: questions on image quality with options.

python -m llava.eval.model_vqa_qbench --model-path llava-v1.5-7b --image-folder DIR \
    --question-file llvisionqa_dev.json --answers-file A.jsonl [--lang zh]

Lines hold the fields of the question, the answer as `response`.
"""

import argparse
from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run
from llava.eval.benchmarks.qbench import INSTRUCTION, qbench_questions
from llava.eval.files.records import read_json_list


@errors_as_messages()
def main():
    parser = build_parser(__doc__, "llvisionqa_dev.json")
    parser.add_argument(
        "--questions-file",
        dest="question_file",
        default=argparse.SUPPRESS,
        help="LLaVA's word for --question-file in this program",
    )
    parser.add_argument(
        "--lang", default="en", choices=sorted(INSTRUCTION), help="language of the prompt"
    )
    args = parse_args(parser)
    records = read_json_list(args.question_file)
    run(args, records, partial(qbench_questions, lang=args.lang))


if __name__ == "__main__":
    main()
