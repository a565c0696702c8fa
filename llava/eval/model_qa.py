"""Answers text questions with a LLaVA checkpoint that is shown no image.

python -m llava.eval.model_qa --model-name llava-v1.5-7b --question-file Q.jsonl \
    --answers-file A.jsonl

An image that a question names is left out: what the text alone gives away is the baseline of a
benchmark. Answers are drawn at a temperature of 0.7, as in LLaVA, unless `--temperature` says
otherwise.
"""

import argparse
from collections.abc import Iterator

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run, use_playground_questions
from llava.eval.answering.questions import Question
from llava.eval.files.records import read_jsonl


def text_questions(record: dict) -> Iterator[Question]:
    """`{question_id, text}`, whatever else there is."""
    head = {"question_id": record["question_id"], "prompt": record["text"]}
    yield Question(head, record["text"])


@errors_as_messages()
def main():
    parser = build_parser(__doc__)
    parser.add_argument(
        "--model-name",
        dest="model_path",
        default=argparse.SUPPRESS,
        help="LLaVA's word for --model-path in this program",
    )
    parser.set_defaults(temperature=0.7)
    args = parse_args(parser)
    use_playground_questions(parser, args, "textvqa/llava_textvqa_val_v051_ocr.jsonl", "images")
    run(args, read_jsonl(args.question_file), text_questions)


if __name__ == "__main__":
    main()
