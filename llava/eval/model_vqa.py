"""Answers the questions of a JSON-lines file with long answers allowed (1024 tokens).

python -m llava.eval.model_vqa --model-path llava-v1.5-7b --question-file Q.jsonl \
    --image-folder DIR --answers-file A.jsonl

The same loop as `model_vqa_loader`, with another limit.
"""

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run, use_playground_questions
from llava.eval.answering.questions import jsonl_questions
from llava.eval.files.records import read_jsonl


@errors_as_messages()
def main():
    parser = build_parser(__doc__)
    args = parse_args(parser)
    use_playground_questions(parser, args, "textvqa/llava_textvqa_val_v051_ocr.jsonl", "images")
    run(args, read_jsonl(args.question_file), jsonl_questions)


if __name__ == "__main__":
    main()
