"""Turns an answers file into the prediction list of the official GQA scorer."""

from llava.errors import errors_as_messages
from llava.eval.benchmarks import gqa
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.writing import write_json
from llava.program_parser import ProgramParser


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--src", required=True, help="answers file")
    parser.add_argument("--dst", required=True, help="prediction file to write")
    args = parser.parse_args()
    answers = read_answers(args.src)
    write_json(gqa.predictions_of(answers), args.dst)


if __name__ == "__main__":
    main()
