"""How fast answers grow, token by token: the unpruned model, a method, and its self-speculation.

    python -m llava.eval.efficiency --decode --method twigvlm --visual-token-num 64
    python -m llava.eval.efficiency.decode_speed --methods twigvlm --limit 20 \
        --json runs/decode.json
    python -m llava.eval.efficiency.decode_speed --methods twigvlm --compile
    python -m llava.eval.efficiency.decode_speed --methods twigvlm --tree-nodes 60
    python -m llava.eval.efficiency.decode_speed --config 7b --acceptance 0.8 \
        --num-speculations 3 --limit 3

Asks a trained model for long answers (the playground's descriptions of pictures, unless another
question file is given), or, with --config, a model of that size with random weights for answers of
a given length, chance deciding which guesses are right. One answer at a time, all variants in
turns on every question, so that a busy machine slows all of them alike. A streamer notes when
tokens arrive; time runs from the call of `generate`, pixels prepared. Rates are medians over the
questions. With --compile every way is measured twice, as it is and compiled; what the first
compiled answer took longer than a later one is `start_up`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict
from functools import partial

import torch

from llava.errors import errors_as_messages
from llava.eval.answering.program import load_loop
from llava.eval.answering.questions import Question
from llava.eval.efficiency.arguments import (
    add_clock_arg,
    add_question_args,
    add_shape_args,
    check_layers,
    clock_of,
    fill_in_questions,
    placed,
)
from llava.eval.efficiency.chance import ChanceChoice
from llava.eval.efficiency.decode_report import page, rows_of, table
from llava.eval.efficiency.decode_run import made_up, measure, variants_of
from llava.eval.efficiency.facts import facts_of
from llava.eval.efficiency.measure import make_pruner, with_budget
from llava.eval.efficiency.random_model import CONFIGS, build_random_model, shapes
from llava.eval.files.records import read_jsonl
from llava.eval.files.writing import write_json
from llava.eval.markdown import write_between_marks
from llava.model_args import PIXELS, add_length_arg, add_model_args
from llava.playground import default_model_path
from llava.program_parser import ProgramParser, Several, dashed
from llava.pruning import METHODS, can_draft
from llava.pruning.cli import add_args_of_methods, method_name, options_by_method

QUESTIONS = "describe/questions.jsonl"
#: the place of a page that the table is written into
MARK = "decoding"
#: options that only random weights have -> what holds of those where one is not given
OF_RANDOM = {"acceptance": 0.8, "prompt_length": 64, "layers": None, "image_size": None}
#: options that only a trained model has
OF_TRAINED = ("model_path", "model_base", "vision_tower", "load_8bit", "load_4bit", *PIXELS)
OF_TRAINED += ("attn_implementation", "question_file", "image_folder")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ProgramParser(__doc__)
    able = [name for name, cls in METHODS.items() if can_draft(cls)]
    parser.add_argument(
        "--methods",
        action=Several,
        default=able,
        type=method_name,
        metavar="METHOD",
        help="methods to measure",
    )
    parser.add_argument("--visual-token-num", type=int, default=64, help="token budget per image")
    parser.add_argument("--num-speculations", type=int, help="the most tokens guessed in a row")
    parser.add_argument(
        "--tree-nodes", type=int, metavar="N", help="measure trees of so many guesses as well"
    )
    parser.add_argument("--tree-depth", type=int, metavar="N", help="levels of such a tree")
    parser.add_argument(
        "--tree-width", type=int, metavar="N", help="guesses that may follow one guess in a tree"
    )
    add_args_of_methods(parser)
    parser.add_argument("--limit", type=int, default=20, help="questions that are asked")
    add_length_arg(parser, 128)
    parser.add_argument(
        "--warmup", type=int, default=3, help="answers that each way gives before measuring begins"
    )
    add_clock_arg(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the table into this page, between its marks"
    )
    trained = parser.add_argument_group("a trained model")
    add_question_args(trained, QUESTIONS)
    random = parser.add_argument_group("or random weights")
    random.add_argument("--config", choices=CONFIGS, help="sizes of a model of random weights")
    text = f"share of the guesses that are made right (default: {OF_RANDOM['acceptance']})"
    random.add_argument("--acceptance", type=float, help=text)
    text = f"text tokens of the prompt (default: {OF_RANDOM['prompt_length']})"
    random.add_argument("--prompt-length", type=int, help=text)
    add_shape_args(random)
    add_model_args(parser)
    args = parser.parse_args(argv)
    refuse_strangers(parser, args)
    for name, value in OF_RANDOM.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup < 0:
        parser.error(f"--warmup ({args.warmup}) must not be negative")
    if args.limit < 1 or args.max_new_tokens < 2 or args.prompt_length < 1:
        parser.error("--limit and --prompt-length must be at least 1, --max-new-tokens 2")
    if not 0 <= args.acceptance <= 1:
        parser.error(f"--acceptance ({args.acceptance}) must lie between 0 and 1")
    check_layers(args.layers)
    if args.config is None:
        args.model_path = default_model_path(args.model_path)
        fill_in_questions(args, QUESTIONS)
    return args


def refuse_strangers(parser: ProgramParser, args: argparse.Namespace) -> None:
    """Ends the program at an option of the other kind of model."""
    others, why = OF_RANDOM, f"is for random weights: choose --config from {', '.join(CONFIGS)}"
    if args.config is not None:
        others, why = OF_TRAINED, "has no place there: --config makes a model up"
    for name in others:
        value = getattr(args, name)
        if value is not None and value is not False:
            parser.error(f"{dashed(f'--{name}')} {why}")


def trained_model(args) -> tuple:
    """(model, pruners by name, prompts) of a checkpoint and a question file."""
    options, budget = options_by_method(args.pruning_arg, args.methods), args.visual_token_num
    pruners = {name: with_budget(name, budget, **options.get(name, {})) for name in args.methods}
    loop = load_loop(args)
    prompts = [
        partial(loop.inputs, Question({}, r["text"], [r["image"]]), args.image_folder)
        for r in read_jsonl(args.question_file)[: args.limit]
    ]
    return loop.model, pruners, prompts


def random_model(args) -> tuple:
    """The same with random weights of the sizes `args.config`."""
    options = options_by_method(args.pruning_arg, args.methods)
    model = build_random_model(*shapes(args.config, args.layers), **placed(args))
    model.token_choice = partial(ChanceChoice, acceptance=args.acceptance)
    pruners = {
        name: make_pruner(name, args.visual_token_num, model, **options.get(name, {}))
        for name in args.methods
    }
    prompt = partial(made_up, model, args.prompt_length, args.image_size)
    return model, pruners, [prompt] * args.limit


def about(args, model, tokens: float) -> dict:
    """What the numbers depend on besides the code."""
    chance = {} if args.config is None else {"acceptance": args.acceptance}
    facts = facts_of(model, args)
    return {
        "model": args.config or args.model_name,
        **{name: facts[name] for name in ("device", "dtype", "threads", "clock")},
        "questions": args.limit,
        "tokens_per_answer": tokens,
        "visual_token_num": args.visual_token_num,
    } | chance


@errors_as_messages()
@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict:
    """Measures, prints the table and, as the last line, the whole result as JSON."""
    args = parse_args(argv)
    torch.manual_seed(0)
    model, pruners, prompts = (trained_model if args.config is None else random_model)(args)
    args.limit = len(prompts)
    tree = {name: getattr(args, name) for name in ("tree_nodes", "tree_depth", "tree_width")}
    variants = variants_of(pruners, args.num_speculations, args.compile, tree)
    now = clock_of(args, model.device)
    measure(model, variants, prompts, args.max_new_tokens, now, args.warmup)
    rows = rows_of(variants, model, same_answers=args.config is None)
    facts = about(args, model, statistics.mean(clock.tokens for clock in variants[0].clocks))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(rows))
    result = {"about": facts, "rows": [asdict(row) for row in rows]}
    if args.json:
        write_json(result, args.json, indent=1)
    if args.markdown:
        words = ["python", "-m", "llava.eval.efficiency.decode_speed"]
        command = shlex.join(words + (sys.argv[1:] if argv is None else argv))
        write_between_marks(args.markdown, page(command, facts, rows), MARK)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
