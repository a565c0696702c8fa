"""Finds the data of a benchmark, or says what is missing and where it comes from.

python -m llava.eval.benchmarks.data_files pope [--data-dir DIR]

Prints shell assignments for the scripts: SOURCE (data folder), QUESTIONS, IMAGES, PROGRAM (module
that asks the questions, and its options) and VARIANT (ending of the answers file). With --data-dir,
everything must be there. Without it, a benchmark that `playground/data/eval` does not hold is
replaced by the playground's questions of that kind, which is said.
"""

import os
import shlex
import sys
from pathlib import Path

from llava.errors import errors_as_messages
from llava.eval.answering.questions import Question, questions_of
from llava.eval.benchmarks import all_benchmarks, find_benchmark
from llava.eval.benchmarks.benchmark import SHARED_IMAGES, Benchmark
from llava.eval.files.records import Records
from llava.program_parser import ProgramParser

DEFAULT_DIR = "playground/data/eval"
#: questions of which at least one must have its images
SEEN = 20
#: played with when there is no real data: a benchmark, and samples of the other formats
PLAYGROUND_DIRS = ("playground/benchmark", "playground/samples")


def needed(benchmark: Benchmark, data_dir: str) -> list[str]:
    """Returns the files and folders a run needs below the data folder, questions first."""
    names = [benchmark.questions]
    if benchmark.images and not os.path.isdir(os.path.join(data_dir, SHARED_IMAGES)):
        names.append(benchmark.images)
    return names if benchmark.server_scored(data_dir) else [*names, *benchmark.truth]


def lacking(benchmark: Benchmark, data_dir: str, asked: Records | None = None) -> list[str]:
    """Returns the files and folders below the data folder that a run needs and that are not there;
    of the images, one that the first questions are about.

    asked: the records of the question file; None: they are read
    """
    names = needed(benchmark, data_dir)
    missing = [name for name in names if not os.path.exists(os.path.join(data_dir, name))]
    if benchmark.questions in missing or not benchmark.images:  # which are in the questions
        return missing
    first = first_questions(benchmark, data_dir, asked)
    if any(map(benchmark.asks_hidden, first)) and not benchmark.server_scored(data_dir):
        missing = [name for name in missing if name not in benchmark.truth]
        missing.append(str(benchmark.server_if))
    if benchmark.images not in missing:
        missing += images_missing(benchmark, data_dir, first)
    return missing


def check(benchmark: Benchmark, data_dir: str) -> None:
    """Raises FileNotFoundError that names everything that is missing, and where to get it."""
    if missing := lacking(benchmark, data_dir):
        line = "  {}\n    from {}\n".format
        places = (line(os.path.join(data_dir, n), benchmark.source_of(n)) for n in missing)
        raise FileNotFoundError(
            f"{benchmark.name} lacks:\n{''.join(places)}All folders: {DEFAULT_DIR}/README.md. "
            "Without DATA_DIR, the playground's questions are asked."
        )


def first_questions(
    benchmark: Benchmark, data_dir: str, asked: Records | None = None
) -> list[Question]:
    """The first questions of a benchmark; those that cannot be read are found when it is asked.

    asked: as in `lacking`
    """
    try:
        asked = asked or benchmark.read(os.path.join(data_dir, benchmark.questions))
    except ValueError:
        return []
    asked = benchmark.located(Records(asked.path, asked[:SEEN]), benchmark.image_folder(data_dir))
    return questions_of(asked, benchmark.to_questions, skip_bad=True)


def images_missing(benchmark: Benchmark, data_dir: str, first: list[Question]) -> list[str]:
    """The image of the first question, below the data folder, if none of them all is there."""
    folder = benchmark.image_folder(data_dir)
    paths = [os.path.join(folder, i) for q in first if not q.base64 for i in q.images]
    if not paths or any(map(os.path.exists, paths)):
        return []
    return [os.path.relpath(paths[0], data_dir)]


def find(benchmark: Benchmark, data_dir: str | None = None) -> tuple[str, str]:
    """Returns (data folder, image folder) for a run.

    data_dir: None looks in `playground/data/eval`, then among the playground's own. Raises
    FileNotFoundError when something is missing.
    """
    if data_dir or _has(DEFAULT_DIR, benchmark):
        folder = data_dir or DEFAULT_DIR
        check(benchmark, folder)
        return folder, benchmark.image_folder(folder)
    for folder in PLAYGROUND_DIRS:
        if _has(folder, benchmark):
            images = os.path.join(PLAYGROUND_DIRS[0], SHARED_IMAGES)
            print(
                f"{DEFAULT_DIR}/{benchmark.questions} is not there: using the playground's "
                f"questions ({Path(folder, benchmark.questions)})",
                file=sys.stderr,
            )
            return folder, images
    check(benchmark, DEFAULT_DIR)
    raise AssertionError("unreachable: the check has failed")


def present(data_dir: str | None = None) -> list[str]:
    """Names of the benchmarks with questions in a data folder, or in those `find` looks in."""
    known = [b for b in all_benchmarks().values() if not b.label]  # else the same in other words
    folders = [data_dir] if data_dir else [DEFAULT_DIR, *PLAYGROUND_DIRS]
    if not data_dir and any(_has(DEFAULT_DIR, benchmark) for benchmark in known):
        folders = [DEFAULT_DIR]
    return [b.name for b in known if any(_has(folder, b) for folder in folders)]


def _has(folder: str, benchmark: Benchmark) -> bool:
    return os.path.exists(os.path.join(folder, benchmark.questions))


def assignments(benchmark: Benchmark, data_dir: str | None = None) -> str:
    """Returns what the scripts need to know of a benchmark, as shell assignments."""
    folder, images = find(benchmark, data_dir)
    module, *options = benchmark.program
    values = {
        "SOURCE": shlex.quote(folder),
        "QUESTIONS": shlex.quote(os.path.join(folder, benchmark.questions)),
        "IMAGES": shlex.quote(images),
        "PROGRAM": f"({shlex.join([f'llava.eval.{module}', *options])})",
        "VARIANT": shlex.quote(benchmark.label),
    }
    return "\n".join(f"{name}={value}" for name, value in values.items())


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("benchmark", help="its name, or list: what there is data for")
    parser.add_argument(
        "--data-dir", help=f"folder of the data (default: {DEFAULT_DIR}, else the playground's)"
    )
    parser.add_argument("--sets", help="with list: the parts of this benchmark only")
    args = parser.parse_args()
    if args.benchmark == "list":
        start = f"{args.sets}_" if args.sets else ""
        names = [name for name in present(args.data_dir) if name.startswith(start)]
        for name in names:
            print(name.removeprefix(start))
    else:
        print(assignments(find_benchmark(args.benchmark), args.data_dir))


if __name__ == "__main__":
    main()
