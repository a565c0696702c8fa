"""One Markdown table of several `.score.json` files, which `llava.eval.score` writes.

python -m llava.eval.score_table A.score.json B.score.json ...

Where a benchmark comes twice, a column says which run a score is of: checkpoint, method and name of
the file, or its whole path. The last line is the scores as JSON, then by run.
"""

import json
from types import NoneType

from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.files.answer_places import runs_of
from llava.eval.files.records import kind_of, read_json
from llava.program_parser import ProgramParser

#: results that published means of their family leave out
NOT_IN_MEAN = ("viscot_emotic", "viscot_emotic_brief")
#: what a file must say; what else it says has changed from version to version
FIELDS = {"benchmark": str, "metric": str, "score": (int, float, NoneType), "count": int}
HEAD = ("benchmark", "metric", "score", "questions", "visual tokens")


def table(results: list[dict], runs: list[str] | None = None) -> str:
    """Returns the table; benchmarks of a family that is published as one number get their mean.

    runs: what each result is of; they get a column when a benchmark has several
    """
    with_runs = runs is not None and several(results)
    runs = runs if with_runs else [""] * len(results)
    pairs = list(zip(runs, results, strict=True))
    for run in dict.fromkeys(runs):
        own = [result for its, result in pairs if its == run]
        pairs += [(run, mean) for mean in _family_mean(own, "viscot_", "viscot, mean")]
    rows = [
        (run, r["benchmark"], r["metric"], _score(r), _count(r), _tokens(r)) for run, r in pairs
    ]
    if with_runs:
        return markdown.table(("run", *HEAD), rows, "lllr")
    return markdown.table(HEAD, [row[1:] for row in rows], "llr")


def several(results: list[dict]) -> bool:
    """Whether a benchmark has more than one result."""
    names = [result["benchmark"] for result in results]
    return len(set(names)) < len(names)


def _tokens(result: dict) -> str:
    kept = result.get("visual_tokens")
    tokens = kept.get("mean") if isinstance(kept, dict) else kept
    return f"{tokens:.1f}" if isinstance(tokens, int | float) else ""


def _score(result: dict) -> str:
    if result["score"] is not None:
        return f"{result['score']:.2f}"
    return "by its server" if "upload" in result else result.get("why", "not scored")


def _count(result: dict) -> str:
    failed = result.get("failed")
    return f"{result['count']} ({failed} failed)" if failed else str(result["count"])


def _family_mean(results: list[dict], prefix: str, name: str) -> list[dict]:
    """The plain mean over the scored members of a family, when there are several."""
    family = [
        r
        for r in results
        if r["benchmark"].startswith(prefix) and r["benchmark"] not in NOT_IN_MEAN
        if r["score"] is not None
    ]
    if len(family) < 2:
        return []
    score = sum(r["score"] for r in family) / len(family)
    sums = {key: sum(r.get(key, 0) for r in family) for key in ("count", "failed")}
    return [{"benchmark": name, "metric": family[0]["metric"], "score": score, **sums}]


def read_score(path: str) -> dict:
    """The content of a `.score.json`; ValueError names a file that is something else."""
    result = read_json(path)
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds {kind_of(result)}, not a score")
    if missing := [key for key in FIELDS if key not in result]:
        raise ValueError(f"{path}: no field {', '.join(map(repr, missing))}, so it is no score")
    wrong = (key for key, types in FIELDS.items() if not isinstance(result[key], types))
    if key := next(wrong, None):
        raise ValueError(f"{path}: {key!r} is {kind_of(result[key])}, so it is no score")
    return result


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("files", nargs="*", help=".score.json files")
    parser.add_argument("--list", help="file that names further ones, one per line")
    args = parser.parse_args()
    files = args.files
    if args.list:
        with open(args.list, encoding="utf-8") as file:
            files = [*files, *file.read().splitlines()]
    if not files:
        raise ValueError("no score to show: name .score.json files, or --list a file that does")
    results, runs = [read_score(path) for path in files], runs_of(files)
    print(table(results, runs))
    if not several(results):
        print(json.dumps({result["benchmark"]: result["score"] for result in results}))
        return
    by_run: dict[str, dict] = {run: {} for run in runs}
    for run, result in zip(runs, results, strict=True):
        by_run[run][result["benchmark"]] = result["score"]
    print(json.dumps(by_run))


if __name__ == "__main__":
    main()
