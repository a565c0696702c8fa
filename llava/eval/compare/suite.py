"""Benchmarks x pruning methods x token budgets with one loaded model: table and plot.

python -m llava.eval.compare.suite --tokens 576 192 128 64 --methods vispruner random \
    --limit 100 --out DIR

Writes DIR/scores.json, DIR/table.md and DIR/plot.png; answers lie below DIR/answers, and a suite
that was interrupted continues with the answers it has. A budget of all patches or more is the
unpruned model. Without a model or data, the playground's are used.
"""

import argparse
import json
import os
import sys
from math import inf

from llava.conv_mode import resolve_conv_mode
from llava.errors import errors_as_messages
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.program import (
    add_image_args,
    add_speed_args,
    load_loop,
)
from llava.eval.answering.run import Task, answer_questions
from llava.eval.answering.settings import settings_of
from llava.eval.answering.workers import Workers
from llava.eval.benchmarks import data_files, scored_here
from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.compare.budget import Budget, budget_of
from llava.eval.compare.hard import HardQuestions
from llava.eval.compare.scores import DENSE, Run, Score
from llava.eval.compare.suite_report import not_run, plot, table
from llava.eval.files import budgets
from llava.eval.files.answer_lines import NothingAnswered, answers_among, read_lines
from llava.eval.files.records import Records
from llava.eval.plotting import import_pyplot
from llava.eval.scoring import paired
from llava.eval.scoring.units import Units
from llava.mm_utils import get_model_name_from_path
from llava.model.block_encoding import UnfitBudget
from llava.model_args import add_conv_mode_arg, add_length_arg, add_model_args
from llava.program_parser import ProgramParser, Several
from llava.pruning import METHODS, build_pruner, build_with_budget
from llava.pruning.base import option_names
from llava.pruning.cli import add_args_of_methods, method_name, options_by_method
from llava.weight_files import local_folder


def plan(args, num_tokens: int | None) -> list[Run]:
    """Returns the runs in the order of the table: the unpruned model once, then every method; those
    that make images smaller come first, as hard questions are what they get wrong.

    num_tokens: visual tokens of an image without pruning; a budget of as many is that run, larger
                ones are said not to be run. None: images differ in how many they have
    A budget that a method does not know is a run that says so. Raises ValueError on an unknown
    option before anything has run.
    """
    runs = [Run(DENSE, Budget(num_tokens), build_pruner())]
    budgets = {b for b in args.tokens if b != Budget() and (b.tokens or 0) != num_tokens}
    methods = [name for name in dict.fromkeys(args.methods) if name != DENSE]  # which runs anyway
    given = options_by_method(args.pruning_arg, methods)
    for method in sorted(methods, key=lambda name: name not in makes_images_smaller()):
        options = given[method]
        build_pruner(method, **options)  # without a budget: what is wrong now is an option
        for budget in sorted(budgets, key=lambda budget: budget.order, reverse=True):
            if (budget.tokens or 0) > (num_tokens or inf):
                runs.append(Run(method, budget, None, f"an image has {num_tokens} tokens"))
                continue
            try:
                pruner = build_with_budget(method, budget.options, **options)
                runs.append(Run(method, budget, pruner))
            except ValueError as error:
                runs.append(Run(method, budget, None, _reason(error, method, budget)))
    return runs


def makes_images_smaller() -> list[str]:
    """The methods that do."""
    return [name for name, method in METHODS.items() if method.makes_images_smaller]


def _reason(error: ValueError, method: str, budget: Budget) -> str:
    """Why a method does not run at a budget."""
    if "+" in method or budget.options.keys() <= set(option_names(METHODS[method])):
        return str(error)
    return "its budget is a number of tokens, it takes no share of them"


def try_out(model, runs: list[Run], model_path: str) -> None:
    """Assigns every method to the model once and marks those that refuse it, so that this is known
    before anything runs. model_path: folder that is called by its name alone in the reasons."""
    for run in runs:
        if run.refused is None:
            try:
                model.pruner = run.pruner
            except (OSError, ValueError) as error:
                run.refused = str(error)
                for path in (os.path.abspath(model_path), model_path):
                    run.refused = run.refused.replace(path, os.path.basename(model_path))


def check_some_run(runs: list[Run]) -> None:
    """Raises ValueError, with the reasons, where methods were asked for and none of them runs."""
    if len(runs) > 1 and all(run.refused for run in runs[1:]):
        reasons = dict.fromkeys(f"{run.method} {run.budget}: {run.refused}" for run in runs[1:])
        raise ValueError(f"none of the methods runs here: {'; '.join(reasons)}")


def answers_path(out: str, run: Run, benchmark: Benchmark) -> str:
    """Where the answers of one run to one benchmark lie."""
    return os.path.join(out, "answers", run.method, f"n_{run.budget}", f"{benchmark.name}.jsonl")


def run_task(
    loop,
    run: Run,
    benchmark: Benchmark,
    asked: Records,
    args,
    dense: dict[str, Units],
    hard: HardQuestions,
    workers: Workers,
    label: str = "",
) -> Score | None:
    """Returns the score of one method at one budget on one benchmark; None in processes that only
    help to answer.

    asked: the records of the benchmark's question file
    dense: units of the unpruned model, which runs first, by benchmark
    hard:  what the runs on smaller images left, which come next
    label: what the progress bar says in front of the benchmark's name
    """
    questions = benchmark.select(asked, args.limit, getattr(args, "skip_bad", False))
    path = answers_path(args.out, run, benchmark)
    images = benchmark.image_folder(args.data_dir)
    settings = settings_of(args, run.pruner)
    bar = f"{label}, {benchmark.name}" if label else ""
    task = Task(questions, images, path, args.model_name, settings, bar)
    done = answer_questions(
        task, lambda: loop, args.batch_size, args.reuse, args.overwrite, workers
    )
    if not workers.main:
        return None
    records = read_lines(path)
    units = benchmark.score(args.data_dir, asked, records, args.limit)
    result = units.result()
    full = dense.setdefault(benchmark.name, units)
    change = paired.compare(units, full)
    smaller = type(run.pruner).makes_images_smaller
    if smaller:
        hard.add(run.budget, units)
    answers = answers_among(records)
    kept = budgets.summarize(answers)
    seen = kept["mean"] if kept else done.visual_tokens and done.visual_tokens[1]
    return Score(
        run.method,
        run.budget,
        benchmark.name,
        result["metric"],
        result["score"],
        result["percent"],
        result["count"],
        change.same,
        seen,
        done.seconds,
        result["failed"],
        len(answers),
        change.percent,
        None if smaller else hard.score(run.budget, units, full),
        units.draws,
        change.draws,
    )


def run_all(
    loop: AnswerLoop,
    runs: list[Run],
    benchmarks: dict[Benchmark, Records],
    args,
    workers: Workers | None = None,
) -> list[Score]:
    """Runs everything, printing one line per method and budget; scores.json grows with it.

    benchmarks: with the records of their question files
    workers:    processes that share the answering; the first one scores, writes and prints
    """
    workers = workers or Workers()
    scores, dense, hard = [], {}, HardQuestions()
    settings = [run for run in runs if run.refused is None]
    if workers.main:
        print(extent(settings, benchmarks, args), flush=True)
    for run in runs:
        if run.refused is not None:
            if workers.main:
                print(f"{run.method} {run.budget}: not run: {run.refused}", flush=True)
            continue
        loop.model.pruner = run.pruner
        number = settings.index(run) + 1
        label = f"setting {number} of {len(settings)}: {run.method} {run.budget}"
        own: list[Score] = []
        try:
            for benchmark, asked in benchmarks.items():
                try:
                    score = run_task(loop, run, benchmark, asked, args, dense, hard, workers, label)
                except NothingAnswered as error:
                    if run.method == DENSE:
                        raise
                    # The other processes know nothing of it, and go on to the next benchmark.
                    run.refused = run.refused or f"{benchmark.name}: {error}"
                    continue
                if workers.main:
                    own.append(score)
                    write_scores([*scores, *own], args)
        except ValueError as error:
            if not isinstance(error.__cause__, UnfitBudget):
                raise
            run.refused = str(error.__cause__)  # without the question, a line of a file
        if run.refused is not None:
            if workers.main:
                write_scores(scores, args)
                print(f"{run.method} {run.budget}: stopped: {run.refused}", flush=True)
            continue
        if workers.main:
            scores += own
            line = "  ".join(f"{score.task} {score.percent:.1f}{failures(score)}" for score in own)
            print(f"{run.method} {run.budget}: {line}", flush=True)
    return scores


def extent(settings: list[Run], benchmarks: dict[Benchmark, Records], args) -> str:
    """Returns a line on how much there is to do."""
    skip_bad = getattr(args, "skip_bad", False)
    questions = sum(len(b.select(r, args.limit, skip_bad)) for b, r in benchmarks.items())
    return (
        f"{len(settings)} settings x {questions} questions of {len(benchmarks)} tasks: "
        f"{len(settings) * questions} answers, less those already there"
    )


def failures(score: Score) -> str:
    """What is said beside a score that some questions are missing in."""
    return f" ({score.failed} failed)" if score.failed else ""


def write_scores(scores: list[Score], args) -> None:
    names = ("model_path", "data_dir", "limit", "batch_size", "conv_mode")
    content = {
        "settings": {name: getattr(args, name) for name in names},
        "scores": [score.as_dict() for score in scores],
    }
    path = os.path.join(args.out, "scores.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    os.replace(f"{path}.tmp", path)


def available(names: list[str] | None, data_dir: str) -> dict[Benchmark, Records]:
    """Returns the benchmarks asked for, or all that can be asked and scored with the data folder,
    with the records of their question files. One that nobody asked for and whose images are not
    there is named on stderr. Raises ValueError where something else is missing."""
    if not os.path.isdir(data_dir):
        raise ValueError(f"--data-dir {data_dir}: there is no such folder")
    place = lambda benchmark: os.path.join(data_dir, benchmark.questions)  # noqa: E731
    found = [b for b in scored_here().values() if os.path.exists(place(b)) and b.scorable(data_dir)]
    if names:
        present = {benchmark.name for benchmark in found}
        if missing := [name for name in names if name not in present]:
            names = ", ".join(missing)
            raise ValueError(f"{data_dir} has no questions of {names} with their right answers")
        found = [scored_here()[name] for name in names]
    if not found:
        raise ValueError(
            f"{data_dir} has no questions of any benchmark (for example "
            f"{scored_here()['pope'].questions}): see playground/data/eval/README.md"
        )
    asked = {benchmark: benchmark.read(place(benchmark)) for benchmark in found}
    lost = {b: data_files.lacking(b, data_dir, records) for b, records in asked.items()}
    lost = {b: os.path.join(data_dir, missing[0]) for b, missing in lost.items() if missing}
    if lost and (names or len(lost) == len(found)):
        places = ", ".join(f"{benchmark.name} lacks {path}" for benchmark, path in lost.items())
        raise ValueError(f"{places}: see playground/data/eval/README.md")
    for benchmark, path in lost.items():
        print(f"note: {benchmark.name} is left out, as it lacks {path}", file=sys.stderr)
        del asked[benchmark]
    return asked


def add_suite_args(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds the options that say what is run; out: folder of the results by default."""
    parser.add_argument(
        "--tokens",
        "--visual-token-num",
        type=budget_of,
        action=Several,
        metavar="N",
        default=[Budget(192), Budget(128), Budget(64)],
        help="budgets: tokens of an image (64), or a share of those it has (0.222)",
    )
    methods = sorted(METHODS.keys() - {DENSE})
    parser.add_argument(
        "--methods",
        action=Several,
        default=methods,
        type=method_name,
        metavar="METHOD",
        help="methods, or two in a row as METHOD+METHOD (the budget is what the second one leaves, "
        "and the first leaves twice as many unless --pruning-arg says otherwise); the unpruned "
        f"model is always run (default: all, {', '.join(methods)})",
    )
    add_args_of_methods(parser)
    parser.add_argument(
        "--tasks",
        action=Several,
        choices=(tasks := sorted(scored_here())),
        metavar="TASK",
        help=f"benchmarks, of {', '.join(tasks)} (default: those there is data for)",
    )
    parser.add_argument(
        "--limit", type=int, help="about so many questions of each task, evenly spread"
    )
    parser.add_argument("--out", default=out, help=f"folder of all results (default: {out})")
    parser.add_argument(
        "--overwrite", action="store_true", help="discard the answers that are there and begin anew"
    )
    add_model_args(parser)
    parser.add_argument(
        "--data-dir", help="folder of the evaluation data (default: the playground's)"
    )
    add_conv_mode_arg(parser, "auto")
    add_speed_args(parser, batch_size=8)
    add_image_args(parser)
    add_length_arg(parser, 128)


def parse_suite_args(parser: argparse.ArgumentParser, argv: list[str] | None = None):
    """Returns the options of `add_suite_args`, those left open filled in."""
    args = parser.parse_args(argv)
    if args.model_path is None or args.data_dir is None:
        from llava.playground import benchmark_dir, default_model_path

        args.model_path = default_model_path(args.model_path)
        args.data_dir = args.data_dir or benchmark_dir()
    try:
        options_by_method(args.pruning_arg, args.methods)
    except ValueError as error:
        parser.error(str(error))
    args.model_name = get_model_name_from_path(args.model_path)
    args.conv_mode = resolve_conv_mode(
        args.conv_mode, args.model_name, args.model_path, args.model_base
    )
    return args


def prepare(args) -> tuple[AnswerLoop, list[Run], dict[Benchmark, Records], Workers]:
    """Everything a suite needs, loaded and checked."""
    benchmarks = available(args.tasks, args.data_dir)
    import_pyplot()  # a missing extra should be known before hours of answering
    workers = Workers.from_environment()
    args.device = args.device or workers.device()
    args.model_path = local_folder(args.model_path)
    loop = load_loop(args)
    loop.count_tokens = True
    runs = plan(args, tokens_of_an_image(loop.model))
    try_out(loop.model, runs, args.model_path)
    check_some_run(runs)
    os.makedirs(args.out, exist_ok=True)
    return loop, runs, benchmarks, workers


def tokens_of_an_image(model) -> int | None:
    """Visual tokens of every image without pruning, as budgets count them; None where images have
    grids of their own."""
    tower = model.get_vision_tower()
    if tower.grid is None:
        return None
    return model.crops_in_budget(build_pruner()) * tower.num_patches


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    add_suite_args(parser, out="runs/suite")
    args = parse_suite_args(parser)
    loop, runs, benchmarks, workers = prepare(args)
    scores = run_all(loop, runs, benchmarks, args, workers)
    if not workers.main:
        return
    text = "\n".join([table(scores), *not_run(runs)])
    with open(os.path.join(args.out, "table.md"), "w", encoding="utf-8") as file:
        file.write(text)
    plot(scores, os.path.join(args.out, "plot.png"))
    print(text)
    print(f"written: {args.out}/scores.json table.md plot.png", file=sys.stderr)


if __name__ == "__main__":
    main()
