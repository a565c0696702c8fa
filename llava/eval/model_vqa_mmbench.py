"""Answers the multiple-choice table of MMBench; the images are inside the table.

python -m llava.eval.model_vqa_mmbench --model-path llava-v1.5-7b --question-file dev.tsv \
    --answers-file A.jsonl --single-pred-prompt
"""

from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run, use_playground_questions
from llava.eval.benchmarks.mmbench import (
    LETTER_PROMPT,
    mmbench_question,
    mmbench_questions,
    read_mmbench,
)


@errors_as_messages()
def main():
    parser = build_parser(__doc__)
    parser.add_argument(
        "--all-rounds", action="store_true", help="ask with every rotation of the options"
    )
    parser.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the letter of the option alone"
    )
    parser.add_argument(
        "--lang", default="en", choices=sorted(LETTER_PROMPT), help="language of the prompt"
    )
    args = parse_args(parser)
    use_playground_questions(parser, args, "mmbench/mmbench_dev_20230712.tsv", "images")
    to_questions = partial(
        mmbench_questions,
        all_rounds=args.all_rounds,
        single_pred_prompt=args.single_pred_prompt,
        lang=args.lang,
    )
    run(args, read_mmbench(args.question_file), to_questions, mmbench_question)


if __name__ == "__main__":
    main()
