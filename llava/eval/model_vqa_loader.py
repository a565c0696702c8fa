"""Answers the questions of a benchmark, in batches; an interrupted run continues where it stopped.

python -m llava.eval.model_vqa_loader --model-path llava-v1.5-7b --question-file Q.jsonl \
    --image-folder DIR --answers-file A.jsonl --temperature 0 --conv-mode vicuna_v1

Without a model and a question file, the playground's are used.
"""

from llava.errors import errors_as_messages
from llava.eval.answering.program import build_parser, parse_args, run, use_playground_questions
from llava.eval.answering.questions import jsonl_questions
from llava.eval.files.records import read_jsonl


@errors_as_messages()
def main():
    parser = build_parser(__doc__, max_new_tokens=128)
    args = parse_args(parser)
    use_playground_questions(parser, args, "textvqa/llava_textvqa_val_v051_ocr.jsonl", "images")
    run(args, read_jsonl(args.question_file), jsonl_questions)


if __name__ == "__main__":
    main()
