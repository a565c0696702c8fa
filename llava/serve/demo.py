"""The whole demo with one command: controller, one worker and the web page.

    python -m llava.serve.demo

Serves the playground checkpoint unless --model-path names another, on this machine only, with a
token made up for this run. Ctrl-C stops all three. The options of the worker are taken as well, for
example --device cpu or --pruning-method vispruner.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import requests

from ..errors import errors_as_messages, how_to_install
from ..log_output import protect_standard_streams
from ..playground import default_model_path
from ..program_parser import ProgramParser
from . import direct
from .auth import TOKEN_VARIABLE, add_token_arg, check_exposure, read_token, token_headers

HERE = "127.0.0.1"
POLL_SECONDS = 0.2
READY_SECONDS = 600  # of a part without a model
STOP_SECONDS = 8  # what is left then is killed


class Demo:
    """The three processes.

    environment: theirs, the token in it
    """

    def __init__(self, environment: dict[str, str]):
        self.environment, self.processes = environment, {}

    def start(self, name: str, *arguments) -> None:
        """Runs `python -m llava.serve.NAME ARGUMENTS`."""
        command = [sys.executable, "-m", f"llava.serve.{name}", *map(str, arguments)]
        # Ctrl-C reaches all of a terminal's processes. Those that are still starting leave it to
        # `stop`, which ends them without a word.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.processes[name] = subprocess.Popen(command, env=self.environment)
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Raises ValueError when one of the processes has ended."""
        for name, process in self.processes.items():
            if (code := process.poll()) is not None:
                raise ValueError(f"{name} ended (exit code {code}); what it printed says why")

    def wait_until(self, ready, seconds: float = READY_SECONDS) -> None:
        """Returns once `ready()`; ValueError when a process ends before, or it takes too long."""
        end = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise ValueError(f"the demo is not ready after {seconds} s")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Ends all processes at the same time; kills what does not end within `STOP_SECONDS`."""
        left = [process for process in self.processes.values() if process.poll() is None]
        for process in left:
            process.terminate()  # a second SIGINT would cut answers short
        end = time.monotonic() + STOP_SECONDS
        while left and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 4)
            left = [process for process in left if process.poll() is None]
        for process in left:
            process.kill()
        for process in left:
            process.wait()


def free_ports(count: int) -> list[int]:
    """Numbers of ports on loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HERE, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def answers(url: str, token: str, ready=lambda reply: True) -> bool:
    """Whether a POST to `url` succeeds and its JSON reply is `ready`."""
    try:
        reply = direct.post(url, headers=token_headers(token), timeout=2)
        return reply.status_code == 200 and ready(reply.json())
    except (requests.RequestException, ValueError):
        return False


def is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


#: of the extra `serve`, as they are imported
PACKAGES = ("gradio", "fastapi", "uvicorn", "httpx", "python_multipart", "pydantic")


def check_parts(model_path: str | None) -> None:
    """Raises ImportError, FileNotFoundError or ValueError where packages, or a model, are missing:
    the parts would find that out one after the other, some after minutes."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(
            f"the demo needs {', '.join(missing)} of the extra `serve`: {how_to_install('serve')}"
        )
    default_model_path(model_path)


#: options of the worker that the demo sets
SET_HERE = ("--help", "--host", "--port", "--controller-address", "--model-path", "--token-file")


class Parser(ProgramParser):
    """Its help has the options of the worker, too."""

    def format_help(self) -> str:
        sections = worker_parser().format_help().partition("\n\n")[2]
        return f"{super().format_help()}\nof the worker, which answers:\n\n{sections}"


def worker_parser() -> argparse.ArgumentParser:
    """The options of the worker, those of `SET_HERE` hidden. Imports what it needs, which takes
    seconds: only for help, and where there are further options."""
    from .model_worker import build_parser

    parser = build_parser()
    parser.description = None
    for action in parser._actions:
        if set(SET_HERE) & set(action.option_strings):
            action.help = argparse.SUPPRESS
    return parser


def check_worker_args(words: list[str]) -> None:
    """Ends the program, or raises ValueError, on options that the worker would refuse, before
    anything is started."""
    if words:
        from ..pruning.cli import pruner_from_args

        args = worker_parser().parse_args(words)
        if args.no_register:
            raise ValueError("--no-register: the page would never hear of its worker")
        pruner_from_args(args)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, allow_abbrev=False)
    parser.add_argument("--host", default=HERE, help="address of the web page")
    parser.add_argument("--port", type=direct.page_port, default=7860, help="port of the web page")
    parser.add_argument(
        "--model-path", help="folder, or name on the hub (default: the playground's)"
    )
    add_token_arg(parser)
    return parser


def run(args, worker_args: list[str]) -> None:
    """Starts everything, prints the address, and waits until it is stopped."""
    token = read_token(args.token_file)
    check_exposure(args.host, token)
    token = token or secrets.token_hex(32)
    direct.check_place(args.host, args.port)
    folder = tempfile.mkdtemp(prefix="llava-demo-")  # of whoever is killed, nothing is left
    demo = Demo({**os.environ, TOKEN_VARIABLE: token, "TMPDIR": folder})
    controller_port, worker_port = free_ports(2)
    controller = f"http://{HERE}:{controller_port}"
    model = ["--model-path", args.model_path] if args.model_path else []
    try:
        demo.start("controller", "--host", HERE, "--port", controller_port)
        demo.wait_until(lambda: answers(f"{controller}/list_models", token))
        where = ["--host", HERE, "--port", worker_port, "--controller-address", controller]
        demo.start("model_worker", *where, *model, *worker_args)
        # A model that is downloaded or large takes its time; one that cannot be loaded ends.
        there = partial(answers, f"{controller}/list_models", token, has_models)
        demo.wait_until(there, seconds=math.inf)
        page = ["--host", args.host, "--port", args.port, "--controller-url", controller]
        demo.start("gradio_web_server", *page, "--model-list-mode", "reload")
        demo.wait_until(lambda: is_listening(args.host, args.port))
        print(f"The demo is at http://{args.host}:{args.port} (Ctrl-C stops it)", flush=True)
        while True:
            demo.check()
            time.sleep(POLL_SECONDS)
    finally:
        # Whoever is impatient and asks again must not leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        demo.stop()
        shutil.rmtree(folder, ignore_errors=True)


def has_models(reply: dict) -> bool:
    return bool(reply["models"])


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@errors_as_messages()
def main() -> None:
    args, worker_args = build_parser().parse_known_args()
    protect_standard_streams()
    check_parts(args.model_path)
    check_worker_args(worker_args)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run(args, worker_args)
    except KeyboardInterrupt:
        print("The demo has stopped.")


if __name__ == "__main__":
    main()
