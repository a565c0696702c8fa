"""Turns VizWiz answers into the upload of the evaluation server."""

from llava.errors import errors_as_messages
from llava.eval.benchmarks import vizwiz
from llava.eval.files.answer_lines import read_answers_tolerantly
from llava.eval.files.records import read_jsonl
from llava.eval.files.writing import write_json
from llava.program_parser import ProgramParser


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-file", required=True, help="question file")
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument("--result-upload-file", required=True, help="file to write")
    args = parser.parse_args()
    texts, num_broken = read_answers_tolerantly(args.result_file)
    questions = read_jsonl(args.annotation_file, ("question_id", "image"))
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {num_broken}")
    write_json(vizwiz.upload(questions, texts), args.result_upload_file)


if __name__ == "__main__":
    main()
