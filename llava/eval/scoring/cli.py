"""The command line of the scorers that need the answers and one file with the right ones."""

import argparse
from collections.abc import Callable, Collection

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import say_missing
from llava.eval.files.records import as_int


@errors_as_messages()
def run_scorer(
    doc: str,
    read_truth: Callable[[str], object],
    evaluate: Callable[[object, list[dict]], dict],
    report: Callable[[dict], str],
    ids: Callable[[object], Collection] | None = None,
    fields: tuple[str, ...] = ("question_id", "text"),
) -> None:
    """Reads the files that the command line names, and prints the report.

    doc:        docstring of the program; its first line is what `--help` says
    read_truth: path -> the right answers, as `evaluate` takes them
    ids:        right answers -> identifiers of the questions, if those without an answer are to be
                named
    fields:     what every answer must have
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--annotation-file", required=True, help="the right answers")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    answers = read_answers(args.result_file, fields)
    with broken_files_named((args.annotation_file,), args.result_file):
        truth = read_truth(args.annotation_file)
        result = evaluate(truth, answers)
        asked = [as_int(key) for key in ids(truth)] if ids else []
    say_missing(answers, asked, "the score is that of the others")
    print(report(result), end="")
