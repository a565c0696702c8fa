"""Benchmarks x pruning methods x token budgets with one loaded model: table and plot.

python -m llava.eval.suite --tokens 576 192 128 64 --methods vispruner random --limit 100 --out DIR

Writes DIR/scores.json, DIR/table.md and DIR/plot.png; answers lie below DIR/answers, and a suite
that was interrupted continues with the answers it has. A budget of all patches or more is the
unpruned model. Without a model or data, the playground's are used.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

import shortuuid
from tqdm import tqdm

from llava.eval.answer_loop import AnswerLoop
from llava.eval.answers import AnswersFile, fingerprint
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.errors import errors_as_messages
from llava.eval.model_vqa_loader import DTYPES, resolve_conv_mode
from llava.eval.suite_report import DENSE, import_pyplot, plot, table
from llava.eval.tasks import read_jsonl
from llava.mm_utils import get_model_name_from_path
from llava.pruning import METHODS, Pruner, build_pruner
from llava.pruning.cli import pruner_from_args


@dataclass
class Run:
    """One method at one budget."""

    method: str
    tokens: int
    pruner: Pruner


@dataclass
class Score:
    """One cell of the table.

    percent:       the score, as a share of its maximum, in percent
    same_as_dense: share of answers that equal those of the unpruned model, in percent
    visual_tokens: image tokens of a prompt on average over the decoder's layers
    """

    method: str
    tokens: int
    task: str
    metric: str
    score: float
    percent: float
    count: int
    same_as_dense: float | None = None
    visual_tokens: float | None = None
    seconds: float | None = None


def plan(args, num_patches: int) -> list[Run]:
    """Returns the runs in the order of the table: the unpruned model once, then every method.

    num_patches: visual tokens of an image without pruning; budgets from there on are that run.
    Raises ValueError on an unknown option before anything has run.
    """
    runs = [Run(DENSE, num_patches, build_pruner())]
    for method in args.methods:
        prefix = f"{method}."
        own = [arg.removeprefix(prefix) for arg in args.pruning_arg if arg.startswith(prefix)]
        for tokens in sorted({n for n in args.tokens if n < num_patches}, reverse=True):
            named = argparse.Namespace(
                pruning_method=method, visual_token_num=tokens, pruning_arg=own
            )
            runs.append(Run(method, tokens, pruner_from_args(named)))
    return runs


def answer(
    loop: AnswerLoop, questions, images: str, path: str, settings: dict, overwrite: bool
) -> dict:
    """Answers what `path` does not hold yet; returns seconds and visual tokens of the new ones."""
    loop.visual_tokens, start = None, time.perf_counter()
    model_id = settings["model"]
    heads = [question.head for question in questions]
    with AnswersFile(path, heads, settings, overwrite) as answers:
        remaining = questions[answers.num_done :]
        bar = {"desc": os.path.basename(path), "unit": " answers", "leave": False}
        with tqdm(total=len(questions), initial=answers.num_done, **bar) as progress:
            for batch, texts in loop.answer(remaining, images):
                answers.write(
                    [
                        question.answer_line(text, shortuuid.uuid(), model_id)
                        for question, text in zip(batch, texts, strict=True)
                    ]
                )
                progress.update(len(batch))
    complete = len(remaining) == len(questions)  # otherwise the time is that of a part
    return {
        "seconds": time.perf_counter() - start if complete else None,
        "visual_tokens": loop.visual_tokens[1] if loop.visual_tokens else None,
    }


def run_task(loop, run: Run, benchmark: Benchmark, args, dense_texts: dict) -> Score:
    """Returns the score of one method at one budget on one benchmark."""
    question_file = os.path.join(args.data_dir, benchmark.questions)
    questions = benchmark.load_questions(question_file, args.limit)
    folder = os.path.join(args.out, "answers", run.method)
    path = os.path.join(folder, f"n_{run.tokens}", f"{benchmark.name}.jsonl")
    settings = {
        "model": args.model_name,
        "weights": fingerprint(args.model_path),
        "conv_mode": loop.conv_mode,
        "max_new_tokens": loop.max_new_tokens,
        "pruner": repr(run.pruner),
    }
    images = benchmark.image_folder(args.data_dir)
    measured = answer(loop, questions, images, path, settings, args.overwrite)
    answers = read_jsonl(path)
    texts = [record["text"] for record in answers]
    dense = dense_texts.setdefault(benchmark.name, texts)  # the unpruned model runs first
    result = benchmark.score(args.data_dir, question_file, answers, args.limit)
    return Score(
        run.method,
        run.tokens,
        benchmark.name,
        benchmark.metric,
        result["score"],
        result["percent"],
        result["count"],
        100 * sum(a == b for a, b in zip(texts, dense, strict=True)) / len(texts),
        **measured,
    )


def run_all(loop: AnswerLoop, runs: list[Run], benchmarks: list[Benchmark], args) -> list[Score]:
    """Runs everything, printing one line per method and budget; scores.json grows with it."""
    scores, dense_texts = [], {}
    for run in runs:
        loop.model.pruner = run.pruner
        for benchmark in benchmarks:
            scores.append(run_task(loop, run, benchmark, args, dense_texts))
            write_scores(scores, args)
        own = scores[-len(benchmarks) :]
        line = "  ".join(f"{score.task} {score.percent:.1f}" for score in own)
        print(f"{run.method} {run.tokens}: {line}", flush=True)
    return scores


def write_scores(scores: list[Score], args) -> None:
    names = ("model_path", "data_dir", "limit", "batch_size", "conv_mode")
    content = {
        "settings": {name: getattr(args, name) for name in names},
        "scores": [asdict(score) for score in scores],
    }
    path = os.path.join(args.out, "scores.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    os.replace(f"{path}.tmp", path)


def load_loop(args) -> AnswerLoop:
    """Returns the answer loop around the model that the options name."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        args.model_name,
        device=args.device,
        torch_dtype=DTYPES.get(args.dtype),
        vision_tower=args.vision_tower,
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} has no vision tower: it cannot look at images")
    return AnswerLoop(
        tokenizer,
        model,
        image_processor,
        args.conv_mode,
        args.batch_size,
        args.workers,
        args.max_new_tokens,
    )


def available(names: list[str] | None, data_dir: str) -> list[Benchmark]:
    """Returns the benchmarks asked for, or all whose question file is in the data folder."""
    found = [
        benchmark
        for benchmark in BENCHMARKS.values()
        if os.path.exists(os.path.join(data_dir, benchmark.questions))
    ]
    if names:
        present = {benchmark.name for benchmark in found}
        if missing := [name for name in names if name not in present]:
            raise ValueError(f"{data_dir} has no questions of {', '.join(missing)}")
        return [BENCHMARKS[name] for name in names]
    if not found:
        raise ValueError(f"{data_dir} has the question file of no benchmark")
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[192, 128, 64])
    methods = sorted(METHODS.keys() - {DENSE})
    parser.add_argument(
        "--methods", nargs="+", default=methods, choices=methods, help="default: all"
    )
    parser.add_argument("--pruning-arg", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--tasks", nargs="+", choices=sorted(BENCHMARKS), help="default: all")
    parser.add_argument("--limit", type=int, help="about so many questions per task")
    parser.add_argument("--out", default="runs/suite", help="folder of all results")
    parser.add_argument("--overwrite", action="store_true", help="discard answers already there")
    parser.add_argument("--model-path", help="default: the playground checkpoint")
    parser.add_argument("--model-base")
    parser.add_argument("--vision-tower")
    parser.add_argument("--data-dir", help="default: the playground benchmark")
    parser.add_argument("--conv-mode", default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    args = parser.parse_args()
    if args.model_path is None or args.data_dir is None:
        from llava.playground import benchmark_dir, default_model_path

        args.model_path = args.model_path or default_model_path()
        args.data_dir = args.data_dir or benchmark_dir()
    if stray := [a for a in args.pruning_arg if a.partition(".")[0] not in args.methods]:
        parser.error(f"--pruning-arg {stray[0]} must start with one of the methods and a dot")
    args.model_name = get_model_name_from_path(args.model_path)
    args.conv_mode = resolve_conv_mode(args.conv_mode, args.model_name)
    return args


@errors_as_messages()
def main():
    args = parse_args()
    benchmarks = available(args.tasks, args.data_dir)
    import_pyplot()  # a missing extra should be known before hours of answering
    loop = load_loop(args)
    crops = loop.model.crops_in_budget(build_pruner())
    runs = plan(args, crops * loop.model.get_vision_tower().num_patches)
    os.makedirs(args.out, exist_ok=True)
    scores = run_all(loop, runs, benchmarks, args)
    text = table(scores)
    with open(os.path.join(args.out, "table.md"), "w", encoding="utf-8") as file:
        file.write(text)
    plot(scores, os.path.join(args.out, "plot.png"))
    print(text)
    print(f"written: {args.out}/scores.json table.md plot.png", file=sys.stderr)


if __name__ == "__main__":
    main()
