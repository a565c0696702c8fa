"""Mistakes of the user end a program with one line, not with a traceback."""

import os
import select
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager

from .clone_files import CLONE

PACKAGE = os.path.dirname(os.path.abspath(__file__))
INTERRUPTED = 128 + signal.SIGINT  # exit code
PIPE_CLOSED = 128 + 13  # exit code, SIGPIPE of shells


class UnavailableError(RuntimeError):
    """What was asked for is not possible on this machine; the message says what it lacks."""


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra of setup.py, here: in a clone, or beside
    an installed wheel."""
    package = "-e '." if (CLONE / "setup.py").is_file() else "'FILE.whl"
    return f"pip install {package}[{extra}]'"


@contextmanager
def errors_as_messages():
    """Ends the program with exit code 1 and the message of a ValueError, OSError, ImportError or
    UnavailableError; after Ctrl-C, and when whoever read the output has gone (`| head`), with the
    exit codes of shells for these, 130 and 141.

    Decorates `main` functions: `@errors_as_messages()`.
    """
    try:
        yield
        if sys.stdout is not None and not sys.stdout.closed:  # as it is where nobody reads at all
            sys.stdout.flush()
    except (ImportError, OSError, ValueError, UnavailableError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(PIPE_CLOSED)
        sys.exit(f"error: {_sentence(error)}")
    except KeyboardInterrupt:
        print("\nstopped (Ctrl-C)", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _nobody_reads() -> bool:
    """Whether the output is a pipe whose reader has gone; then nothing more is written to it."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):  # no output, or one that is not a file
        return False
    watch = select.poll()
    watch.register(output, 0)  # errors are always told
    if gone := bool(watch.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def one_line_warnings() -> None:
    """Makes Python print a warning of this package as "warning: MESSAGE", without the file and the
    line of code that it comes from."""
    python = warnings.formatwarning
    if getattr(python, "of_llava", False):
        return

    def formatted(message, category, filename, lineno, line=None):
        if os.path.abspath(filename).startswith(PACKAGE + os.sep):
            return f"warning: {message}\n"
        return python(message, category, filename, lineno, line)

    formatted.of_llava = True  # type: ignore[attr-defined] # it is put in place once
    warnings.formatwarning = formatted


def _sentence(error: Exception) -> str:
    """The message of an error; of one about a file that the system refused, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


@contextmanager
def broken_files_named(truth: Sequence[str], answers: str):
    """Makes one sentence of what a file of another form does to a scorer.

    truth:   files that the right answers are read from, at least one
    answers: the answers file, whose lines have been checked
    Raises ValueError that names the files of the truth, unless its message names a file itself.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{_either(truth)}: not of the form expected here ({reason})") from error
    except ValueError as error:
        names = [os.path.basename(os.path.normpath(path)) for path in (*truth, answers)]
        if any(name in str(error) for name in names):
            raise
        raise ValueError(f"{_either(truth)}: {error}") from error


def _either(paths: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(paths))
