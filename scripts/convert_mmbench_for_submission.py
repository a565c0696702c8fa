"""Turns MMBench answers into the spreadsheet that the evaluation server takes."""

import os

from llava.errors import errors_as_messages
from llava.eval.benchmarks import mmbench
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.records import read_table
from llava.eval.files.writing import write_xlsx
from llava.program_parser import ProgramParser


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-file", required=True, help="the benchmark's table (.tsv)")
    parser.add_argument("--result-dir", required=True, help="folder of the answers file")
    parser.add_argument("--upload-dir", required=True, help="folder of the spreadsheet")
    parser.add_argument("--experiment", required=True, help="name of both files, without ending")
    args = parser.parse_args()
    answers = read_answers(os.path.join(args.result_dir, f"{args.experiment}.jsonl"))
    table = mmbench.upload(read_table(args.annotation_file, ("index",)), answers)
    write_xlsx(table, os.path.join(args.upload_dir, f"{args.experiment}.xlsx"))


if __name__ == "__main__":
    main()
