"""Logging and small helpers of the demo and of model loading."""

import logging
import os
import sys
import threading
from pathlib import Path

import requests

from llava import constants
from llava.log_output import DailyFile, LineHandler, log_to_stderr

server_error_msg = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
moderation_msg = "YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES. PLEASE TRY AGAIN."

MODERATION_URL = "https://api.openai.com/v1/moderations"
MODERATION_SECONDS = 5

_file_handler = None  # one log file per process, shared by all loggers


def build_logger(
    logger_name: str, logger_filename: str, lines_per_minute: int | None = None
) -> logging.Logger:
    """The logger `logger_name`; everything logged or printed from now on also goes to a file.

    The file is `constants.LOGDIR`/`logger_filename`, a new one each day (UTC). The first call
    decides on the file, and replaces stdout and stderr by loggers of the same names. Where a line
    cannot be written, for example on a full disk, it is dropped and counted; see `log_output`.

    lines_per_minute: further ones are dropped and counted, too (default: any number is written)
    """
    global _file_handler
    log_to_stderr(lines_per_minute)
    if _file_handler is None:
        file = DailyFile(Path(constants.LOGDIR) / logger_filename)
        _file_handler = LineHandler(file, lines_per_minute)
        sys.stdout = StreamToLogger(logging.getLogger("stdout"), logging.INFO)
        sys.stderr = StreamToLogger(logging.getLogger("stderr"), logging.ERROR)
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    logging.getLogger().addHandler(_file_handler)
    for existing in logging.root.manager.loggerDict.values():
        # The others hand their records on to the root, and would write each line twice.
        if isinstance(existing, logging.Logger) and not existing.propagate:
            existing.addHandler(_file_handler)
    return logger


class StreamToLogger:
    """A text stream that logs every complete line; whatever else is asked of it, stdout does."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO):
        self.terminal = sys.stdout
        self.logger = logger
        self.log_level = log_level
        self.linebuf = ""
        self._inside = threading.local()

    def __getattr__(self, name):
        return getattr(self.terminal, name)

    def write(self, text: str) -> int:
        *lines, self.linebuf = (self.linebuf + text).split("\n")
        for line in lines:
            self._log(line)
        return len(text)

    def flush(self) -> None:
        line, self.linebuf = self.linebuf, ""
        if line:
            self._log(line)

    def _log(self, line: str) -> None:
        # A handler that fails may print that here: logging this, too, would never end.
        if getattr(self._inside, "logging", False):
            return
        self._inside.logging = True
        try:
            # A progress bar draws itself over and over; a terminal shows the last time.
            self.logger.log(self.log_level, line.rstrip().rpartition("\r")[2])
        finally:
            self._inside.logging = False


def disable_torch_init() -> None:
    """Skips the random initialisation of linear and norm layers, for weights loaded afterwards.

    Acts on the whole process: layers built later without loading weights hold arbitrary numbers.
    """
    import torch

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):
        layer.reset_parameters = lambda self: None


def violates_moderation(text: str, on_error: bool = False) -> bool:
    """Whether OpenAI's moderation service, asked with OPENAI_API_KEY, flags `text`.

    on_error: the answer when the service cannot be asked; True refuses what was not checked
    """
    try:
        response = requests.post(
            MODERATION_URL,
            headers={"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"},
            json={"input": text.replace("\n", "")},
            timeout=MODERATION_SECONDS,
        )
        return bool(response.json()["results"][0]["flagged"])
    except (requests.RequestException, KeyError, IndexError, TypeError) as error:
        logging.getLogger(__name__).warning("moderation failed: %s", type(error).__name__)
        return on_error


def pretty_print_semaphore(semaphore) -> str:
    """`semaphore` as "Semaphore(value=.., locked=..)", or "None"."""
    if semaphore is None:
        return "None"
    return f"Semaphore(value={semaphore._value}, locked={semaphore.locked()})"
