"""The parsers of all programs of the project, as the programs make them."""

from __future__ import annotations

import io
import sys
from argparse import _SubParsersAction
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from llava.program_parser import ProgramParser
from tests.paths import ROOT

GUARD = '__name__ == "__main__"'


class Reached(BaseException):
    """A program has made its parser, and would read its command line now."""


def programs() -> Iterator[Path]:
    """The files of the package and of scripts/ that can be started."""
    for path in sorted([*ROOT.glob("llava/**/*.py"), *ROOT.glob("scripts/*.py")]):
        if path.name == "__main__.py" or GUARD in path.read_text(encoding="utf-8"):
            yield path.relative_to(ROOT)


def start(path: Path) -> None:
    """As `python -m` does it, or `python FILE`; pytest does not let `runpy` read every module."""
    package = ".".join(path.parent.parts) if path.parts[0] == "llava" else None
    code = compile((ROOT / path).read_text(encoding="utf-8"), str(ROOT / path), "exec")
    exec(code, {"__name__": "__main__", "__package__": package, "__file__": str(ROOT / path)})


@cache
def found() -> tuple[dict[str, ProgramParser], set[str]]:
    """(parsers by program, those of sub-commands beside them; files that made one)."""
    parsers: dict[str, ProgramParser] = {}
    makers: set[str] = set()
    init = ProgramParser.__init__

    def noted(self, *args, **kwargs):
        makers.add(sys._getframe(1).f_code.co_filename)
        init(self, *args, **kwargs)

    def stop(self, args=None, namespace=None):
        raise Reached(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramParser, "__init__", noted)
        patch.setattr(ProgramParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", ["program"])
        for path in programs():
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                try:
                    start(path)
                except Reached as reached:
                    parsers[str(path)] = reached.args[0]
                except (SystemExit, IndexError):
                    continue  # it reads its words in another way
    for name, parser in list(parsers.items()):
        for action in parser._actions:
            if isinstance(action, _SubParsersAction):
                parsers |= {f"{name} {word}": own for word, own in action.choices.items()}
    return parsers, makers
