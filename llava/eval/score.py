"""Scores the answers to a benchmark: prints the report, ends with one line of JSON.

python -m llava.eval.score pope --data-dir playground/data/eval --answers-file A.jsonl

The same object, with all details, is written beside the answers as `A.score.json`. Where a server
scores, its upload file is written; where a judge does, it is asked if the environment names one
(OPENAI_API_KEY or OPENAI_BASE_URL), and otherwise `score` is null, and `why` says the reason.
"""

import json
import os
from dataclasses import replace

from llava.errors import errors_as_messages
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.benchmark import Benchmark, JudgedRun
from llava.eval.files import box_counts, budgets
from llava.eval.files.answer_lines import failed_sentence, is_failed, read_lines
from llava.eval.files.records import Records
from llava.eval.scoring.judge import CACHE_NAME, add_judge_args, has_endpoint, judge_from_args
from llava.eval.scoring.units import Units
from llava.program_parser import ProgramParser

SUMMARY = ("benchmark", "metric", "score", "percent", "count")


def _split(answers_file: str) -> tuple[str, str] | None:
    """What is before and behind the folder `answers` in a path without its ending, or None."""
    parts = os.path.splitext(answers_file)[0].split(os.sep)
    folders = parts[:-1]
    if "answers" not in folders:
        return None
    last = len(folders) - 1 - folders[::-1].index("answers")
    return os.sep.join(parts[:last]), os.sep.join(parts[last + 1 :])


def elsewhere(answers_file: str, folder: str, ending: str) -> str:
    """Returns the answers' path with `folder` in place of its part `answers`, and that ending."""
    around = _split(answers_file)
    if around is None:
        return f"{os.path.splitext(answers_file)[0]}.{folder}{ending}"
    return os.path.join(around[0], folder, around[1]) + ending


def shared_cache(answers_file: str) -> str:
    """One file of verdicts per benchmark: many answers of two methods are the same."""
    folder = (_split(answers_file) or [os.path.dirname(answers_file)])[0]
    return os.path.join(folder, CACHE_NAME)


def ask_judge(benchmark: Benchmark, args, asked: Records, answers: Records) -> Units | None:
    """Returns what the judge says, or None (saying so) when there is no judge."""
    judged = benchmark.judge
    if not has_endpoint(args):
        print(
            f"{benchmark.name} is scored by a judge such as {judged.model}: set OPENAI_API_KEY, or "
            "OPENAI_BASE_URL to another endpoint, and run the same command again"
        )
        return None
    for name in ("model", "temperature"):
        if getattr(args, f"judge_{name}") is None:
            setattr(args, f"judge_{name}", getattr(judged, name))
    args.max_tokens = args.max_tokens or judged.max_tokens
    args.judge_cache = args.judge_cache or shared_cache(args.answers_file)
    output = elsewhere(args.answers_file, "reviews", ".jsonl")
    own = os.path.join(args.data_dir, judged.wording or "")
    wording = args.judge_wording or (own if os.path.isfile(own) else None)
    run = JudgedRun(args.data_dir, asked, answers, output, wording)
    return replace(judged.score(judge_from_args(args, output), run), name=benchmark.name)


def write_upload(benchmark: Benchmark, args, asked: Records, answers: list[dict]) -> str | None:
    """Writes the file for the benchmark's server; returns its path, or None (saying why)."""
    upload = benchmark.upload
    path = elsewhere(args.answers_file, upload.folder, upload.ending)
    try:
        upload.write(args.data_dir, asked, answers, path)
    except ImportError as error:
        print(f"no file for the server: {error}")
        return None
    print(f"for the server: {path}\n  {upload.server}")
    return path


def score(benchmark: Benchmark, args, asked: Records, records: list[dict]) -> dict:
    """Returns the result as `A.score.json` holds it; prints the reports on the way.

    asked:   the records of the question file
    records: lines of the answers file, questions that failed among them
    """
    units, report = None, benchmark.report
    if benchmark.scorable(args.data_dir) and not benchmark.judge:
        units = benchmark.score(args.data_dir, asked, records, args.limit)
    else:
        questions = benchmark.check_complete(asked, records, args.limit)
    answers = benchmark.counted(records)
    if benchmark.judge:
        units, report = ask_judge(benchmark, args, asked, answers), benchmark.judge.report
        units = units and units.about(questions)
    if units:
        print(report(units), end="")
        result = units.result() | {"interval": units.draws.range, "images": units.draws.images}
    else:
        why = "no judge" if benchmark.judge else "answers not public"
        result = {"score": None, "percent": None, "count": len(answers), "why": why}
    result = benchmark.head() | result | benchmark.failures(records, answers)
    if result.get("interval"):
        low, high = result["interval"]
        print(f"95 % interval: {low:.2f} to {high:.2f} % ({result['images']} images drawn anew)")
    result["visual_tokens"] = budgets.summarize(answers)
    if result["visual_tokens"]:
        print(budgets.report(result["visual_tokens"]), end="")
    if boxes := box_counts.summarize(answers):
        result["boxes"] = boxes
        print(box_counts.report(boxes), end="")
    if failed := [record for record in records if is_failed(record)]:
        print(f"Failed: {failed_sentence(failed, len(records))}")
        if result["left_out"]:
            print(f"  left out with them, as scored jointly: {result['left_out']} answers")
    if args.limit is None and benchmark.has_upload(args.data_dir):
        if failed:
            print("no file for the server, which wants an answer to every question")
        else:
            result["upload"] = write_upload(benchmark, args, asked, answers)
    elif result["score"] is None and not benchmark.judge:
        print(f"no score: the right answers are not public ({benchmark.name})")
    return result


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("benchmark", help="name of a benchmark, see llava/eval/benchmarks")
    parser.add_argument(
        "--data-dir", default="playground/data/eval", help="folder of the evaluation data"
    )
    parser.add_argument("--question-file", help="file of the questions (default: the benchmark's)")
    parser.add_argument("--answers-file", required=True, help="the answers to score")
    parser.add_argument(
        "--limit", type=int, help="the --limit with which the questions were answered"
    )
    parser.add_argument(
        "--judge-wording",
        help="the benchmark's own rule.json or few-shot prompt (default: that in the data folder, "
        "else ours)",
    )
    add_judge_args(parser)
    args = parser.parse_args()
    benchmark = find_benchmark(args.benchmark)
    asked = benchmark.read(args.question_file or os.path.join(args.data_dir, benchmark.questions))
    result = score(benchmark, args, asked, read_lines(args.answers_file))
    with open(f"{os.path.splitext(args.answers_file)[0]}.score.json", "w") as file:
        json.dump(result, file, indent=2)
    summary = {key: result[key] for key in SUMMARY} | {"answers_file": args.answers_file}
    if result["failed"]:
        summary["failed"] = result["failed"]
    if result["visual_tokens"]:
        summary["visual_tokens"] = round(result["visual_tokens"]["mean"], 1)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
