"""Scores the answers to a benchmark: prints the report, ends with one line of JSON.

python -m llava.eval.score pope --data-dir playground/data/eval --answers-file A.jsonl

The same object, with all details, is written beside the answers as `A.score.json`.
"""

import argparse
import json
import os

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.errors import errors_as_messages
from llava.eval.tasks import read_jsonl

SUMMARY = ("benchmark", "metric", "score", "percent", "count")


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--data-dir", default="playground/data/eval")
    parser.add_argument("--question-file", help="default: the benchmark's, in the data folder")
    parser.add_argument("--answers-file", required=True)
    parser.add_argument("--limit", type=int, help="as it was when the questions were answered")
    args = parser.parse_args()
    benchmark = BENCHMARKS[args.benchmark]
    questions = args.question_file or os.path.join(args.data_dir, benchmark.questions)
    answers = read_jsonl(args.answers_file, ("question_id", "text"))
    result = benchmark.score(args.data_dir, questions, answers, args.limit)
    print(benchmark.report(result), end="")
    with open(f"{os.path.splitext(args.answers_file)[0]}.score.json", "w") as file:
        json.dump(result, file, indent=2)
    print(json.dumps({key: result[key] for key in SUMMARY} | {"answers_file": args.answers_file}))


if __name__ == "__main__":
    main()
