"""Mistakes of the user end a program with one line, not with a traceback."""

import sys
from contextlib import contextmanager


@contextmanager
def errors_as_messages():
    """Ends the program with exit code 1 and the message of a ValueError, OSError or ImportError.

    Decorates `main` functions: `@errors_as_messages()`.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
