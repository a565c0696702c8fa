"""The options of programs whose language model may be in a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from .vllm import VLLMEngine

VLLM = "vllm"
OF_A_SERVER = ("--engine-url", "--allow-engine", "--engine-key-file")


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `engine_from_args` reads; they belong to programs that load their model
    with `llava.model_args`."""
    group = parser.add_argument_group("language model in a server")
    add = group.add_argument
    add(
        "--engine",
        choices=(VLLM,),
        help="run the language model in a vLLM server; tower, projector and method run here",
    )
    add("--engine-url", metavar="URL", help="http://HOST:PORT; several with commas between them")
    add(
        "--allow-engine",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="a server that is not on this machine, repeatable",
    )
    add("--engine-key-file", metavar="FILE", help="file with the server's API key")


def engine_from_args(args) -> VLLMEngine | None:
    """The engine that the options ask for; None: the language model runs here.

    Raises ValueError where one option lacks another.
    """
    kind, url = getattr(args, "engine", None), getattr(args, "engine_url", None)
    if kind is None:
        for option in OF_A_SERVER:
            if getattr(args, option.strip("-").replace("-", "_"), None):
                raise ValueError(f"{option} is about a server, but --engine {VLLM} is missing")
        return None
    if not url:
        raise ValueError("--engine vllm needs the address of the server: --engine-url URL")
    key_file = args.engine_key_file
    key = Path(key_file).expanduser().read_text().strip() if key_file else None
    return VLLMEngine(url, args.allow_engine, key)
