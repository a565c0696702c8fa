"""Reads the words behind `bash scripts/v1_5/eval/BENCHMARK.sh` for scripts/eval_common.sh.

python -m llava.eval.answering.script_args METHOD [TOKENS [NUMBER ...]] [KEY=VALUE ...] [options]

Prints assignments for the shell: METHOD, TOKENS ("" for the method's own budget), PAIRS (options of
the method as KEY=VALUE), REST (what belongs to the answering program) and, where it was given as
--limit N, LIMIT. TOKENS with a decimal point are a share of an image's tokens and become a pair. An
empty METHOD is the one that the options belong to. Numbers in front are the options that the
method's published scripts take by place, and its published environment variables count where the
words say nothing. Files and folders among the words are meant as seen from CALLED_FROM, a folder in
the environment.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from llava.errors import errors_as_messages
from llava.program_parser import ProgramParser, dashed
from llava.pruning import METHODS, Pruner, guess_method
from llava.pruning.choice import BUDGETS, translate
from llava.pruning.cli import add_pruning_args, parse_pair

NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+")
NEGATIVE = re.compile(r"-[\d.]+")
PAIR = re.compile(r"[a-zA-Z_]\w*=.+", re.DOTALL)
BUDGET, SHARE = BUDGETS
#: settings of the scripts that stand in front of the command
VARIABLES = ("METHOD", "CKPT", "CKPT_DIR", "DATA_DIR", "SPLIT", "NPROC", "LIMIT", "BATCH_SIZE")
VARIABLES += ("CONV_MODE", "EXTRA", "PYTHON", "CUDA_VISIBLE_DEVICES")
#: options of the answering program whose value is a file or folder
PLACES = ("--model-base", "--vision-tower", "--engine-key-file")
#: options of the answering program that are not for a script -> what is
OWN_WORDS = {
    "--num-chunks": "NPROC=2 in front of the command shares the questions among two processes",
    "--chunk-idx": "NPROC=2 in front of the command shares the questions among two processes",
    "--answers-file": "the file is named after checkpoint, method and options",
    "--question-file": "DATA_DIR in front of the command is the folder of the data",
    "--questions-file": "DATA_DIR in front of the command is the folder of the data",
    "--image-folder": "DATA_DIR in front of the command is the folder of the data",
    "--model-path": "CKPT in front of the command is the checkpoint",
    "--brief": "BRIEF=1 in front of viscot.sh asks for a single word or phrase",
    "--do-func-name": "DO_GLIMPSE=1 in front of viscot.sh chooses tokens without answering",
}


def read(words: list[str], method: str, environment: Mapping[str, str]) -> tuple:
    """(method, budget or None, KEY=VALUE pairs, other words) of the words behind a script's name.

    method: "" where none was named
    Raises ValueError on numbers that the method has no option for, on an option given by place and
    by name, and where `guess_method` does.
    """
    words, numbers = list(words), []
    while words and NUMBER.fullmatch(words[0]):
        numbers.append(words.pop(0))
    parser = ProgramParser(add_help=False, allow_abbrev=False)
    add_pruning_args(parser)
    parser.set_defaults(generation_strategy=None)
    args, rest = parser.parse_known_args(words)
    if args.generation_strategy:
        rest += ["--generation-strategy", args.generation_strategy]
    pairs = args.pruning_arg + [word for word in rest if PAIR.fullmatch(word)]
    options = dict(map(parse_pair, pairs))
    if args.visual_token_num is not None:
        options[BUDGET] = args.visual_token_num
    first = SHARE if numbers and "." in numbers[0] else BUDGET
    by_place(options, (first,), numbers[:1])
    name = args.pruning_method or method
    if not name:
        name, options = guess_method(options)
    places = METHODS[name].published.positional if name in METHODS else (BUDGET,)
    if len(numbers) > len(places):
        raise ValueError(f"{' '.join(numbers)}: {name} takes {' '.join(places)} by place, no more")
    by_place(options, places[1:], numbers[1:])
    if name == Pruner.name:  # of a budget, the unpruned model takes none
        options = {key: value for key, value in options.items() if key not in BUDGETS}
    if name in METHODS:
        options = translate(METHODS[name], options)
        options = {**from_environment(METHODS[name], environment), **options}
    budget = options.pop(BUDGET, None)
    rest = [word for word in rest if not PAIR.fullmatch(word)]
    return name, budget, [f"{key}={value}" for key, value in options.items()], rest


def refuse_misplaced(words: list[str]) -> None:
    """Raises ValueError where a word of a script stands where it means nothing: a setting that goes
    in front of the command, a budget behind an option, or something else in its place."""
    for before, word in zip(["", *words], words, strict=False):
        if word.partition("=")[0] in VARIABLES and "=" in word:
            raise ValueError(f"{word} goes in front of the command: {word} bash ...")
        if PAIR.fullmatch(before) and NUMBER.fullmatch(word):
            raise ValueError(f"{word} stands behind {before}: the budget is the first word")
    others = (word for word in words if not NUMBER.fullmatch(word))
    first = next(others, "-")
    if first in METHODS:
        raise ValueError(f"a method goes in front of the command: METHOD={first} bash ...")
    if not PAIR.fullmatch(first) and (not first.startswith("-") or NEGATIVE.fullmatch(first)):
        raise ValueError(
            f"{first!r} is neither a number of tokens (64) nor a share of them (0.222), neither an "
            "option (KEY=VALUE, --limit 20) nor a folder that is there; --help explains the words"
        )


def refuse_unknown(name: str) -> None:
    """Raises ValueError where `name` names a method that there is not: before anything is asked
    for, and once for all benchmarks and processes."""
    for part in filter(None, name.split("+")):
        if part not in METHODS:
            raise ValueError(METHODS.unknown(part))


def limit_among(words: list[str]) -> tuple[int | None, list[str]]:
    """The number behind `--limit`, or the release's word for it, which scoring must know as well;
    and the other words."""
    parser = ProgramParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--limit", "--num-samples", type=int)
    args, rest = parser.parse_known_args(words)
    return args.limit, rest


def refuse_own_words(words: list[str]) -> None:
    """Raises ValueError for options of the answering program that the scripts set themselves."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in OWN_WORDS:
            raise ValueError(f"{word} is set by the script itself: {OWN_WORDS[name]}")


def from_everywhere(text: str, folder: str) -> str:
    """A path without regard to where a program runs, if there is something of that name in
    `folder`, and that is another folder than that of this program; else the text as it is."""
    path = os.path.join(folder, text)
    there = bool(text) and os.path.exists(path) and not os.path.samefile(folder, os.curdir)
    return os.path.abspath(path) if there else text


def pairs_from_everywhere(pairs: list[str], folder: str) -> list[str]:
    """KEY=VALUE pairs, the values that are texts as `from_everywhere` has them."""
    found = []
    for pair in pairs:
        key, _, text = pair.partition("=")
        own = isinstance(parse_pair(pair)[1], str)
        found.append(f"{key}={from_everywhere(text, folder)}" if own else pair)
    return found


def words_from_everywhere(words: list[str], folder: str) -> list[str]:
    """Words for the program, the values of `PLACES` as `from_everywhere` has them."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if equals and dashed(flag) in PLACES:
            found.append(f"{flag}={from_everywhere(value, folder)}")
        else:
            found.append(from_everywhere(word, folder) if dashed(before) in PLACES else word)
    return found


def by_place(options: dict, names: Sequence[str], numbers: Sequence[str]) -> None:
    """Puts numbers that were given without a name into `options`."""
    for name, number in zip(names, numbers, strict=False):
        if name in options:
            raise ValueError(f"{name} is given twice: {number} in front, and {options[name]}")
        options[name] = parse_pair(f"{name}={number}")[1]


def from_environment(method: type[Pruner], environment: Mapping[str, str]) -> dict:
    """The options that the method's published environment variables set."""
    variables = method.published.environment.items()
    pairs = [f"{option}={environment[name]}" for name, option in variables if environment.get(name)]
    return dict(map(parse_pair, pairs))


@errors_as_messages()
def main(arguments: list[str] | None = None) -> None:
    method, *words = sys.argv[1:] if arguments is None else arguments
    refuse_misplaced(words)
    method, budget, pairs, rest = read(words, method, os.environ)
    refuse_unknown(method)
    limit, rest = limit_among(rest)
    refuse_own_words(rest)
    folder = os.environ.get("CALLED_FROM") or os.curdir
    pairs, rest = pairs_from_everywhere(pairs, folder), words_from_everywhere(rest, folder)
    tokens = "" if budget is None else str(budget)
    print(f"METHOD={shlex.quote(method)} TOKENS={shlex.quote(tokens)}")
    if limit is not None:
        print(f"LIMIT={limit}")
    print(f"PAIRS=({shlex.join(pairs)}) REST=({shlex.join(rest)})")


if __name__ == "__main__":
    main()
