"""Answers ScienceQA: questions with options, about half of them with an image.

python -m llava.eval.model_vqa_science --model-path llava-v1.5-7b --image-folder images/test \
    --question-file llava_test_CQM-A.json --answers-file A.jsonl --single-pred-prompt
"""

from functools import partial

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run
from llava.eval.benchmarks.sqa import science_questions
from llava.eval.files.records import read_json_list


@errors_as_messages()
def main():
    parser = build_parser(__doc__, "tables/question.json")
    parser.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the letter of the option alone"
    )
    parser.add_argument("--answer-prompter", action="store_true", help="accepted, no effect")
    args = parse_args(parser)
    records = read_json_list(args.question_file)
    run(args, records, partial(science_questions, single_pred_prompt=args.single_pred_prompt))


if __name__ == "__main__":
    main()
