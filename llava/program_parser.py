"""The parser of a program's command line: its usage and its errors name what the user typed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from .errors import one_line_warnings
from .spelling import unknown, with_hint

#: least and greatest value of numbers that mean the same in every program
RANGES = {
    "batch_size": (1, None),
    "limit": (1, None),
    "max_new_tokens": (1, None),
    "num_beams": (1, None),
    "num_chunks": (1, None),
    "port": (0, 65535),
    "temperature": (0, None),
    "top_p": (0, 1),
    "workers": (1, None),
}
#: environment variable with what the user typed, where that starts several programs
TYPED = "LLAVA_TYPED_COMMAND"


def typed_command() -> str:
    """How this program was started: `llava compare`, `python -m llava.eval.compare`, or the name
    of its file. (argparse knows only the file before Python 3.14.)"""
    if typed := os.environ.get(TYPED):
        return typed
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # Behind -m stands the whole path of a file; anything else was put there by `llava.command`.
    if spec is not None and os.path.isabs(sys.argv[0]):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


class Help(argparse.HelpFormatter):
    """Says the default of every option that has one."""

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        said = "default" in text.lower() or isinstance(default, bool)
        if said or default in (None, argparse.SUPPRESS, "", []):
            return text
        listed = default if isinstance(default, (list, tuple)) else [default]
        return f"{text} (default: {' '.join(map(str, listed)).replace('%', '%%')})"


class WholeHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The same below a text that keeps its lines."""


class ProgramParser(argparse.ArgumentParser):
    """Options of a program, with suggestions for words that it does not know; numbers outside
    `RANGES` are refused. Every long option may be written with dashes or underscores.

    about: text whose first line help begins with, such as the docstring of the program
    whole: help begins with all of the text, in the lines that it has
    """

    def __init__(self, about: str = "", whole: bool = False, **kwargs):
        kwargs = {"prog": typed_command(), **kwargs}  # a sub-command has a name of its own
        super().__init__(
            description=about if whole else about.split("\n")[0],
            formatter_class=WholeHelp if whole else Help,
            **kwargs,
        )

    def parse_known_args(self, args=None, namespace=None):
        one_line_warnings()
        words = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(self.spelled(words), namespace)
        for name, (least, most) in RANGES.items():
            value = getattr(found, name, None)
            if isinstance(value, (int, float)) and not _within(value, least, most):
                upper = "" if most is None else f" and at most {most}"
                self.error(
                    f"argument {dashed(f'--{name}')}: {value} must be at least {least}{upper}"
                )
        return found, rest

    def spelled(self, words: Sequence[str]) -> list[str]:
        """The words of a command line with dashes in the options that the program knows, up to a
        `--`."""
        known = self._option_string_actions
        for flag in [flag for flag in known if flag != dashed(flag)]:  # whoever added it
            action = known.pop(flag)
            known.setdefault(dashed(flag), action)
            action.option_strings = list(dict.fromkeys(map(dashed, action.option_strings)))
        end = words.index("--") if "--" in words else len(words)
        return [self._spelled(word) for word in words[:end]] + list(words[end:])

    def _spelled(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        known = any(own.startswith(dashed(flag)) for own in self._option_string_actions)
        return f"{dashed(flag)}{equals}{value}" if known and len(flag) > 2 else word

    def error(self, message: str):
        message = with_hint(message, self._option_string_actions)
        if self.prog == os.environ.get(TYPED):  # whose usage is another one
            self.exit(2, f"{self.prog}: error: {message}\n")
        super().error(message)


class Several(argparse.Action):
    """A list of words with spaces or commas between them: `add_argument(..., action=Several)`.
    Commas without a word are an error.

    type:    makes a value of each word, as that of argparse
    choices: the words there are, None: any
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        nargs: str = "+",
        type: Callable = str,
        choices: Sequence[str] | None = None,
        **kwargs,
    ):
        def values(text: str) -> list:
            words = [word.strip() for word in text.split(",") if word.strip()]
            if strange := [word for word in words if choices and word not in choices]:
                raise argparse.ArgumentTypeError(unknown("choice", strange[0], choices or ()))
            return [type(word) for word in words]

        values.__name__ = type.__name__  # argparse names it: "invalid int value"
        super().__init__(option_strings, dest, nargs=nargs, type=values, **kwargs)
        self.item = type

    def __call__(self, parser, namespace, values, option_string=None):
        found = [value for part in values for value in part]
        if values and not found:
            raise argparse.ArgumentError(self, "commas alone name nothing: expected a value")
        setattr(namespace, self.dest, found)


def dashed(flag: str) -> str:
    """A long option as help writes it: `--top-p` of `--top_p`."""
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _within(value: float, least: float, most: float | None) -> bool:
    return value >= least and (most is None or value <= most)
