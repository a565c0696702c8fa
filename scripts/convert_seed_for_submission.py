"""Scores SEED-Bench answers per question type and writes the upload file."""

from llava.errors import errors_as_messages
from llava.eval.benchmarks import seed
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import by_id, say_missing, texts_by_id
from llava.eval.files.records import read_json
from llava.eval.files.writing import write_jsonl
from llava.program_parser import ProgramParser


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-file", required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument("--result-upload-file", required=True, help="file to write")
    args = parser.parse_args()
    annotation = read_json(args.annotation_file)
    answers = read_answers(args.result_file)
    print(seed.report(seed.units(annotation, answers)), end="")
    say_missing(answers, by_id(annotation["questions"]), "they count as wrong")
    lines = seed.upload(annotation["questions"], texts_by_id(answers))
    write_jsonl(lines, args.result_upload_file)


if __name__ == "__main__":
    main()
