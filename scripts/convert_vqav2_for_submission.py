"""Turns VQAv2 answers into the upload of the evaluation server.

The server wants an answer to every question of the full test set; those that were not asked get
an empty one. Reads `DIR/answers/SPLIT/CKPT/merge.jsonl` and writes
`DIR/answers_upload/SPLIT/CKPT.json`, unless `--src` and `--dst` name other places inside DIR.
"""

import os

from llava.errors import errors_as_messages
from llava.eval.benchmarks import vqav2
from llava.eval.files.answer_lines import read_answers_tolerantly
from llava.eval.files.records import read_jsonl
from llava.eval.files.writing import write_json
from llava.program_parser import ProgramParser


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--dir", default="./playground/data/eval/vqav2", help="data of the benchmark"
    )
    parser.add_argument("--ckpt", help="folder of the answers, below answers/SPLIT")
    parser.add_argument("--split", help="split that was asked")
    parser.add_argument("--src", help="answers file below DIR, instead of --split and --ckpt")
    parser.add_argument("--dst", help="upload file below DIR, instead of --split and --ckpt")
    args = parser.parse_args()
    if not (args.src and args.dst) and not (args.ckpt and args.split):
        parser.error("give --ckpt and --split, or --src and --dst")
    src = args.src or os.path.join("answers", args.split, args.ckpt, "merge.jsonl")
    dst = args.dst or os.path.join("answers_upload", args.split, f"{args.ckpt}.json")
    texts, num_broken = read_answers_tolerantly(os.path.join(args.dir, src))
    questions = read_jsonl(
        os.path.join(args.dir, os.path.basename(vqav2.FULL_TEST_SET)), ("question_id",)
    )
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {num_broken}")
    write_json(vqav2.upload(questions, texts), os.path.join(args.dir, dst))


if __name__ == "__main__":
    main()
