"""How fast answers grow, token by token: the unpruned model, a method, and its self-speculation.

    python -m llava.eval.efficiency --decode --method twigvlm --visual-token-num 64
    python -m llava.eval.decode_speed --methods twigvlm --limit 20 --json runs/decode.json

Asks a trained model for long answers (the playground's descriptions of pictures, unless another
question file is given), one at a time, all variants in turns on every question, so that a busy
machine slows all of them alike. A streamer notes when tokens arrive; time runs from the call of
`generate`, pixels prepared. Rates are medians over the questions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field

import torch

from llava.eval.errors import errors_as_messages
from llava.eval.loading import add_model_args, load_loop, resolve_conv_mode
from llava.eval.tasks import Question, read_jsonl
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.self_speculative import SpeculationLog
from llava.pruning import METHODS, Pruner, build_pruner
from llava.pruning.drafter import STRATEGIES, Drafter

DENSE = "dense"
QUESTIONS, IMAGES = "describe/questions.jsonl", "images"


class Clock:
    """A streamer that notes when how many tokens arrive."""

    def __init__(self):
        self.start, self.arrivals, self.prompt = time.perf_counter(), [], True

    def put(self, value) -> None:
        if not self.prompt:  # the first call shows the prompt
            self.arrivals.append((time.perf_counter() - self.start, value.numel()))
        self.prompt = False

    def end(self) -> None:
        """Nothing is left to show."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_seconds(self) -> float:
        return self.arrivals[0][0]

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first arrival; None when nothing came after it."""
        later = self.tokens - self.arrivals[0][1]
        span = self.arrivals[-1][0] - self.arrivals[0][0]
        return later / span if later else None


@dataclass
class Variant:
    """One way of answering, and what was seen of it.

    options: further arguments of `generate`
    """

    name: str
    pruner: Pruner
    strategy: str
    options: dict = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    logs: list[SpeculationLog] = field(default_factory=list)

    def run(self, model, inputs: dict) -> None:
        model.pruner, clock = self.pruner, Clock()
        output = model.generate(
            **inputs,
            **self.options,
            do_sample=False,
            generation_strategy=self.strategy,
            streamer=clock,
            return_dict_in_generate=True,
        )
        self.clocks.append(clock)
        self.answers.append(output.sequences[0].tolist())
        self.logs += getattr(output, "logs", None) or []


@dataclass
class Row:
    """One line of the report.

    first_ms:        until the first token or, when guesses come with it, tokens
    decode_rate:     tokens per second after that
    total_rate:      tokens per second of the whole call
    speed_up:        of `decode_rate` over the dense model on the same questions
    step_speed_up:   of `decode_rate` over the same loop without guesses
    predicted:       what the cost model says `step_speed_up` should be
    accepted, drafted: guesses per step
    acceptance:      accepted guesses per guess
    same_answers:    share of answers equal to those of the method one token at a time, in percent
    """

    name: str
    first_ms: float
    decode_rate: float
    total_rate: float
    speed_up: float
    step_speed_up: float | None = None
    predicted: float | None = None
    accepted: float | None = None
    drafted: float | None = None
    acceptance: float | None = None
    same_answers: float | None = None


def cost_model(drafter: Drafter, model, accepted: float, drafted: float) -> float:
    """Speed-up over one token at a time, in decoder layers run on one row.

    A token costs L + h, with L layers and a head that costs h of them; a step with g guesses
    g (K + T + h) + L + h and gives 1 + accepted tokens (arXiv 2503.14075, with the drafter's layers
    on the last guess of a step put off). Assumes that a layer costs on a few rows what it costs on
    one, as on GPUs, and for all tokens of the image, which the drafter reads, what it costs for
    those that are kept; on a CPU both make a step dearer than this.
    """
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head, depth = model.lm_head.weight.numel() / layer, len(model.model.layers)
    draft = drafter.shared_layers + len(drafter.layers) + head
    return (depth + head) * (1 + accepted) / (drafted * draft + depth + head)


def variants_of(methods: list[str], visual_token_num: int, options: dict) -> list[Variant]:
    """The dense model, and each method with and, where it can guess, also without guesses."""
    found = [Variant(DENSE, build_pruner(), STRATEGIES[0])]
    for name in methods:
        pruner = build_pruner(name, visual_token_num=visual_token_num, **options.get(name, {}))
        found.append(Variant(name, pruner, STRATEGIES[0]))
        if type(pruner).drafter is not Pruner.drafter:
            found.append(Variant(f"{name}, no guesses", pruner, STRATEGIES[1]))
            found[-1].options["num_speculations"] = 0
            found.append(Variant(f"{name}, guessing", pruner, STRATEGIES[1]))
    return found


def measure(loop, variants: list[Variant], questions: list[Question], folder: str, limit: int):
    """Runs every variant on every question, after one question to warm up."""
    for number, question in enumerate([questions[0], *questions]):
        pictures = [loop.prepare(question, image, folder) for image in question.images]
        model, ids = loop.model, None
        for variant in variants:
            model.pruner = variant.pruner
            ids = tokenizer_image_token(loop.prompt(question), loop.tokenizer, return_tensors="pt")
            place = {"device": model.device, "dtype": model.dtype}
            inputs = {
                "inputs": ids[None].to(model.device),
                "images": [picture.pixels.to(**place) for picture in pictures],
                "image_sizes": [picture.size for picture in pictures],
                "max_new_tokens": limit,
                "pad_token_id": loop.tokenizer.eos_token_id,
            }
            variant.run(model, inputs)
            if number == 0:
                variant.clocks, variant.answers, variant.logs = [], [], []


def rows_of(variants: list[Variant], model) -> list[Row]:
    """The report, the dense model first."""
    rates = {v.name: [clock.decode_rate for clock in v.clocks] for v in variants}
    by_name, rows = {v.name: v for v in variants}, []
    for variant in variants:
        row = Row(
            variant.name,
            1000 * statistics.median(clock.first_seconds for clock in variant.clocks),
            _median(rates[variant.name]),
            statistics.median(c.tokens / c.arrivals[-1][0] for c in variant.clocks),
            _ratio(rates[variant.name], rates[DENSE]),
        )
        method = variant.name.partition(",")[0]
        if method in by_name and method != variant.name:
            plain = by_name[method].answers
            same = sum(a == b for a, b in zip(variant.answers, plain, strict=True))
            row.same_answers = 100 * same / len(plain)
        if variant.logs and not variant.options:
            steps = [len(d) for log in variant.logs for d in log.drafts]
            accepted = [a for log in variant.logs for a in log.accepted]
            row.accepted, row.drafted = statistics.mean(accepted), statistics.mean(steps)
            row.acceptance = sum(accepted) / max(1, sum(steps))
            row.step_speed_up = _ratio(rates[variant.name], rates[f"{method}, no guesses"])
            drafter = variant.pruner.drafter(len(model.model.layers))
            row.predicted = cost_model(drafter, model, row.accepted, row.drafted)
        rows.append(row)
    return rows


def _median(rates: list[float | None]) -> float:
    return statistics.median(rate for rate in rates if rate is not None)


def _ratio(ours: list, theirs: list) -> float:
    """Median over the questions of how many times as fast."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return statistics.median(a / b for a, b in pairs)


def table(rows: list[Row]) -> str:
    """The report as a Markdown table."""
    names = list(asdict(rows[0]))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [
            "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"
            for value in asdict(row).values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    able = [name for name, cls in METHODS.items() if cls.drafter is not Pruner.drafter]
    parser.add_argument("--methods", nargs="+", default=able, choices=sorted(METHODS))
    parser.add_argument("--visual-token-num", "--visual_token_num", type=int, default=64)
    parser.add_argument("--pruning-arg", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--question-file", help=f"default: the playground's {QUESTIONS}")
    parser.add_argument("--image-folder", help="default: the playground's pictures")
    parser.add_argument("--limit", type=int, default=20, help="so many questions (default: 20)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--conv-mode", default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    add_model_args(parser)
    args = parser.parse_args(argv)
    if args.limit < 1 or args.max_new_tokens < 2:
        parser.error("--limit must be at least 1 and --max-new-tokens at least 2")
    fill_in_playground(args)
    return args


def fill_in_playground(args) -> None:
    """Names the playground's checkpoint and questions where no others were given."""
    from llava.playground import benchmark_dir, default_model_path

    args.model_path = args.model_path or default_model_path()
    if args.question_file is None:
        args.question_file = os.path.join(benchmark_dir(), QUESTIONS)
        args.image_folder = args.image_folder or os.path.join(benchmark_dir(), IMAGES)
    args.image_folder = args.image_folder or os.path.dirname(args.question_file)
    args.model_name = get_model_name_from_path(args.model_path)
    args.conv_mode = resolve_conv_mode(args.conv_mode, args.model_name)


def options_by_method(pairs: list[str]) -> dict[str, dict]:
    """METHOD.KEY=VALUE pairs, sorted by method. Raises ValueError for another form."""
    from llava.pruning.cli import parse_pair

    options: dict[str, dict] = {}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if not dot or method not in METHODS:
            raise ValueError(f"--pruning-arg {pair!r} must have the form METHOD.KEY=VALUE")
        key, value = parse_pair(rest)
        options.setdefault(method, {})[key] = value
    return options


@errors_as_messages()
@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints the table and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    variants = variants_of(args.methods, args.visual_token_num, options_by_method(args.pruning_arg))
    records = read_jsonl(args.question_file)[: args.limit]
    questions = [
        Question({"question_id": r["question_id"]}, r["text"], [r["image"]]) for r in records
    ]
    loop = load_loop(args)
    measure(loop, variants, questions, args.image_folder, args.max_new_tokens)
    rows = rows_of(variants, loop.model)
    tokens = statistics.mean(clock.tokens for clock in variants[0].clocks)
    about = {
        "model": args.model_name,
        "device": str(loop.model.device),
        "dtype": str(loop.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "questions": len(questions),
        "tokens_per_answer": tokens,
        "visual_token_num": args.visual_token_num,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(rows))
    result = {"about": about, "rows": [asdict(row) for row in rows]}
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
