"""The parser of a program's command line: its usage and its errors name what the user typed."""

from __future__ import annotations

import argparse
import os
import sys

from .spelling import option_hint

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
    "workers": (0, None),
}


def typed_command() -> str:
    """How this program was started: `llava compare`, `python -m llava.eval.compare`, or the name
    of its file. (argparse knows only the file before Python 3.14.)"""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # Behind -m stands the whole path of a file; anything else was put there by `llava.command`.
    if spec is not None and os.path.isabs(sys.argv[0]):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


class ProgramParser(argparse.ArgumentParser):
    """Options of a program, with suggestions for words that it does not know; numbers outside
    `RANGES` are refused.

    about: text whose first line help begins with, such as the docstring of the program
    whole: help begins with all of the text, in the lines that it has
    """

    def __init__(self, about: str, whole: bool = False, **kwargs):
        plain = argparse.RawDescriptionHelpFormatter if whole else argparse.HelpFormatter
        super().__init__(
            prog=typed_command(),
            description=about if whole else about.split("\n")[0],
            formatter_class=plain,
            **kwargs,
        )

    def parse_known_args(self, *args, **kwargs):
        found, rest = super().parse_known_args(*args, **kwargs)
        for name, (least, most) in RANGES.items():
            value = getattr(found, name, None)
            if isinstance(value, (int, float)) and not _within(value, least, most):
                upper = "" if most is None else f" and at most {most}"
                flag = f"--{name.replace('_', '-')}"
                self.error(f"argument {flag}: {value} must be at least {least}{upper}")
        return found, rest

    def error(self, message: str):
        super().error(message + option_hint(message, self._option_string_actions))


def _within(value: float, least: float, most: float | None) -> bool:
    return value >= least and (most is None or value <= most)
