"""The command line of the scorers that need the answers and one file with the right ones."""

from collections.abc import Callable, Collection

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import say_missing
from llava.eval.files.records import as_int
from llava.eval.scoring.units import Units, accuracy_report
from llava.program_parser import ProgramParser


@errors_as_messages()
def run_scorer(
    doc: str,
    read_truth: Callable[[str], object],
    units: Callable[[object, list[dict]], Units],
    report: Callable[[Units], str] = accuracy_report,
    ids: Callable[[object], Collection] = list,
    fields: tuple[str, ...] = ("question_id", "text"),
    missing: str = "the score is that of the others",
) -> None:
    """Reads the files that the command line names, and prints the report.

    doc:        docstring of the program; its first line is what `--help` says
    read_truth: path -> the right answers, as `units` takes them
    ids:        right answers -> identifiers of the questions
    fields:     what every answer must have
    missing:    what becomes of questions without an answer
    """
    parser = ProgramParser(doc)
    parser.add_argument("--annotation-file", required=True, help="the right answers")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    answers = read_answers(args.result_file, fields)
    with broken_files_named((args.annotation_file,), args.result_file):
        truth = read_truth(args.annotation_file)
        found = units(truth, answers)
        asked = [as_int(key) for key in ids(truth)]
    say_missing(answers, asked, missing)
    print(report(found), end="")
