"""The command-line options every program of the project takes to choose a pruning method."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable

from ..constants import STRATEGIES
from ..program_parser import dashed
from . import METHODS, Pruner, all_option_names, build_pruner, can_draft, guess_method, no_drafter
from .choice import all_names


def add_pruning_args(parser: argparse.ArgumentParser) -> None:
    """Adds --pruning-method, --visual-token-num, --pruning-arg and a flag for every option of every
    method. `--methods`, which programs have that run several, is answered with what to write."""
    group = parser.add_argument_group(
        "pruning",
        "Every option of a method (docs/Methods.md) is a flag, such as --important-ratio 0.5. A "
        "flag that only one method has chooses that method.",
    )
    group.add_argument(
        "--pruning-method",
        metavar="NAME",
        help=f"how visual tokens are pruned: {names_in_words()} (default: none, or the method "
        "whose options are given)",
    )
    group.add_argument("--methods", action=OneMethod, nargs="*", help=argparse.SUPPRESS)
    add_option_args(parser, group)
    group.add_argument(
        "--generation-strategy",
        choices=STRATEGIES,
        default=STRATEGIES[0],
        help="how answers are generated; self_speculative: a method that can guess tokens does so, "
        "for the same answers in less time",
    )


class OneMethod(argparse.Action):
    """Says how to name one method, or which program runs several."""

    def __call__(self, parser, namespace, values, option_string=None):
        names = ",".join(values).replace(",", " ").split() or ["NAME"]
        parser.error(
            f"argument {option_string}: one method runs here, --pruning-method {names[0]}; "
            f"llava compare --methods {' '.join(names)} compares several"
        )


def names_in_words() -> str:
    """What a method may be called on a command line."""
    wrappers = [name for name, method in METHODS.own.items() if method.wraps]
    around = "".join(f", {name}+METHOD for one that works around another" for name in wrappers)
    return f"{', '.join(sorted(METHODS))}, METHOD+METHOD for two in a row{around}"


def add_option_args(parser: argparse.ArgumentParser, group=None) -> None:
    """Adds all of these but --pruning-method and --generation-strategy, for programs that take the
    method elsewhere. group: of the parser, where they stand in its help"""
    group = group or parser
    group.add_argument(
        "--visual-token-num",
        type=int,
        metavar="N",
        help="token budget per image (default: the method's own)",
    )
    group.add_argument(
        "--visual-token-ratio",
        action="append",
        dest="pruning_arg",
        type=lambda text: f"visual_token_ratio={text}",
        default=argparse.SUPPRESS,
        metavar="SHARE",
        help="in place of a number, a share of the tokens that an image has (LLaVA-NeXT: one of "
        "five crops): above 0, at most 1",
    )
    group.add_argument(
        "--pruning-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of the method, repeatable; in METHOD+METHOD the name of the method "
        "stands before it, as in fastv_layer=3",
    )
    for name in all_names(METHODS.own):
        add_flag(group, name)
    parse = parser.parse_known_args

    def parse_known_args(*arguments, **more):
        # Other packages come last: a flag that the program adds after these is its own.
        for name in all_option_names():
            add_flag(group, name)
        return parse(*arguments, **more)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign] # of this parser


def method_name(text: str) -> str:
    """The type of options that take names of methods: one of `METHODS`, or two as METHOD+METHOD."""
    try:
        build_pruner(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_flag(parser, option: str) -> None:
    """Adds `--option VALUE` as another way to say `--pruning-arg option=VALUE`, unless the program
    has such a flag of its own."""
    flags = [dashed(f"--{option}"), *([f"-{option}"] if len(option) == 1 else [])]
    if not any(flag in parser._option_string_actions for flag in flags):
        parser.add_argument(
            *flags,
            action="append",
            dest="pruning_arg",
            type=lambda text: f"{option}={text}",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def pruner_from_args(args: argparse.Namespace) -> Pruner:
    """The method that the options of `add_pruning_args` describe; one that was not named is said.

    Raises ValueError on an unknown method or option, on options without a method that belong to
    several, on a KEY=VALUE without "=", and on a generation strategy that the method cannot serve.
    """
    options = dict(parse_pair(pair) for pair in args.pruning_arg)
    if args.visual_token_num is not None:
        options["visual_token_num"] = args.visual_token_num
    name = args.pruning_method
    if name is None:
        name, options = guess_method(options)
        if options:
            print(f"pruning method: {name} (the options given are its own)", file=sys.stderr)
    pruner = build_pruner(name, **options)
    strategy = getattr(args, "generation_strategy", None) or STRATEGIES[0]
    if strategy != STRATEGIES[0] and not can_draft(type(pruner.decoder)):
        raise ValueError(no_drafter(strategy, pruner))
    return pruner


def add_args_of_methods(parser) -> None:
    """Adds --pruning-arg METHOD.KEY=VALUE, for programs that run several methods."""
    parser.add_argument(
        "--pruning-arg",
        action="append",
        default=[],
        metavar="METHOD.KEY=VALUE",
        help="an option of one of the methods, repeatable",
    )


def options_by_method(pairs: list[str], methods: Iterable[str]) -> dict[str, dict]:
    """The options of every method that --pruning-arg METHOD.KEY=VALUE names. Raises ValueError for
    another form, and for a method that is none of `methods`, which are run."""
    options: dict[str, dict] = {name: {} for name in methods}
    for pair in pairs:
        method, dot, rest = pair.partition(".")
        if not dot or method not in options:
            raise ValueError(
                f"--pruning-arg {pair} must have the form METHOD.KEY=VALUE with one of the methods "
                f"that are run ({', '.join(options)})"
            )
        key, value = parse_pair(rest)
        options[method][key] = value
    return options


def parse_pair(pair: str) -> tuple[str, object]:
    """KEY and value of KEY=VALUE; a value that is no Python literal is a string, and so is a number
    with underscores (2024_05), which may be the name of a folder."""
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise ValueError(f"--pruning-arg {pair!r} must have the form KEY=VALUE")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text  # a bare word is a string
    if "_" in text and isinstance(value, (int, float)):
        value = text
    return key.replace("-", "_"), value


def pairs_in(args: object) -> list[str]:
    """The KEY=VALUE of every attribute of `args` that is not None and an option of a method, except
    the budget, which programs have an option of their own for. What other packages call an option
    may be something else to a program, so theirs do not count."""
    values = {name: getattr(args, name, None) for name in all_names(METHODS.own)}
    values.pop("visual_token_num")
    return [f"{name}={value!r}" for name, value in values.items() if value is not None]
