"""The command-line options every program of the project takes to choose a pruning method."""

from __future__ import annotations

import argparse
import ast

from . import METHODS, Chain, Pruner, build_pruner, no_drafter
from .drafter import STRATEGIES


def add_pruning_args(parser: argparse.ArgumentParser) -> None:
    """Adds --pruning-method, --visual-token-num and --pruning-arg (underscores work as well)."""
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--pruning-method",
        "--pruning_method",
        default="none",
        metavar="NAME",
        help=f"how visual tokens are pruned: {', '.join(sorted(METHODS))}, or two in a row as "
        "METHOD+METHOD (default: none)",
    )
    add_option_args(group)
    group.add_argument(
        "--generation-strategy",
        "--generation_strategy",
        choices=STRATEGIES,
        default=STRATEGIES[0],
        help="self_speculative lets a method that can guess tokens do so: the same answers, sooner",
    )


def add_option_args(parser) -> None:
    """Adds --visual-token-num and --pruning-arg, for programs that take the method elsewhere."""
    parser.add_argument(
        "--visual-token-num",
        "--visual_token_num",
        type=int,
        metavar="N",
        help="token budget per image (default: the method's own)",
    )
    parser.add_argument(
        "--pruning-arg",
        "--pruning_arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of the method, repeatable; of METHOD+METHOD with the method's name "
        "as a prefix: fastv_layer=3",
    )


def pruner_from_args(args: argparse.Namespace) -> Pruner:
    """The method that the options of `add_pruning_args` describe.

    Raises ValueError on an unknown method or option, on a KEY=VALUE without "=", and on a
    generation strategy that the method cannot serve.
    """
    options = dict(parse_pair(pair) for pair in args.pruning_arg)
    if args.visual_token_num is not None:
        options["visual_token_num"] = args.visual_token_num
    pruner = build_pruner(args.pruning_method, **options)
    strategy = getattr(args, "generation_strategy", None) or STRATEGIES[0]
    inner = pruner.second if isinstance(pruner, Chain) else pruner
    if strategy != STRATEGIES[0] and type(inner).drafter is Pruner.drafter:
        raise ValueError(no_drafter(strategy, pruner))
    return pruner


def parse_pair(pair: str) -> tuple[str, object]:
    """KEY and value of KEY=VALUE; a value that is no Python literal is a string."""
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise ValueError(f"--pruning-arg {pair!r} must have the form KEY=VALUE")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text  # a bare word is a string
    return key.replace("-", "_"), value
