"""Sends one question without an image, and shows the answer as it comes.

    python -m llava.serve.test_message --controller http://localhost:10000 \
        --model-name llava-v1.5-7b --message "Tell me a story."
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial

import requests

from ..conversation import SeparatorStyle, conv_templates
from ..errors import errors_as_messages
from ..mm_utils import infer_conv_mode
from ..program_parser import ProgramParser
from .auth import add_token_arg, read_token
from .direct import checked_address
from .register_worker import ask_controller, post, said


def find_worker(args, token: str | None) -> str:
    """Address of a worker for the model. Raises ValueError when there is none."""
    if args.worker_address:
        return checked_address(args.worker_address, "--worker-address")
    checked_address(args.controller_address, "--controller-address")
    ask = partial(ask_controller, args.controller_address, token=token)
    ask("/refresh_all_workers", None)
    models = sorted(map(str, said(ask("/list_models", None), "models", list)))
    print(f"Models: {models}")
    address = said(ask("/get_worker_address", {"model": args.model_name}), "address", str)
    if not address:
        raise ValueError(f"no worker serves {args.model_name!r}, choose from {models}")
    print(f"worker_addr: {address}")
    return address


def template_at(address: str, token: str | None) -> str | None:
    """The template that the worker says its model has; None for a worker that says nothing. Raises
    ValueError where no worker answers."""
    try:
        status = post(address, "/worker_get_status", None, token)
    except requests.RequestException as error:
        raise ValueError(
            f"no worker answers at {address} ({type(error).__name__}): is it running? See "
            "python -m llava.serve.model_worker --help"
        ) from error
    said(status, "model_names", list)
    name = status.json().get("conv_mode")
    return name if isinstance(name, str) and name in conv_templates else None


def request_body(
    model_name: str, message: str, max_new_tokens: int, conv_mode: str | None = None
) -> dict:
    """The request; conv_mode: template of the model, None: by its name."""
    conversation = conv_templates[conv_mode or infer_conv_mode(model_name)].copy()
    conversation.append_message(conversation.roles[0], message)
    conversation.append_message(conversation.roles[1], None)
    single = conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
    return {
        "model": model_name,
        "prompt": conversation.get_prompt(),
        "max_new_tokens": max_new_tokens,
        "temperature": 0.7,
        "stop": conversation.sep if single else conversation.sep2,
    }


def answer_texts(address: str, body: dict, token: str | None, timeout: float = 60) -> Iterator[str]:
    """The text so far, prompt included, with every chunk of an answer. Raises ValueError where the
    worker refuses, fails, goes away or sends something else.

    timeout: longest silence in seconds
    """
    try:
        path = "/worker_generate_stream"
        reply = post(address, path, body, token, timeout=timeout, stream=True)
        for piece in filter(None, reply.iter_lines(chunk_size=1024, delimiter=b"\0")):
            yield text_of(piece, address)
    except requests.RequestException as error:
        raise ValueError(
            f"no answer from {address}, or not all of it ({type(error).__name__})"
        ) from error


def text_of(piece: bytes, address: str) -> str:
    """The text in one chunk. Raises ValueError with the reason where it says that all failed."""
    try:
        chunk = json.loads(piece)
        text, code = chunk["text"], chunk["error_code"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{address} sends what is no answer of a worker") from error
    if code:
        raise ValueError(f"{address}: {text} (error_code: {code})")
    return text


def show_answer(address: str, body: dict, token: str | None) -> str:
    """Prints the stream as it grows and returns the whole text."""
    text = ""
    for grown in answer_texts(address, body, token):
        print(grown.removeprefix(text), end="", flush=True)
        text = grown
    print()
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--controller-address", default="http://localhost:21001", help="where the controller is"
    )
    parser.add_argument(
        "--worker-address",
        help="address of the worker (default: the one that the controller names)",
    )
    parser.add_argument("--model-name", default="llava-v1.5-playground", help="model that is asked")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="the most tokens of its answer"
    )
    parser.add_argument(
        "--message", default="Tell me a story with more than 1000 words.", help="what it is asked"
    )
    add_token_arg(parser)
    return parser


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    token = read_token(args.token_file)
    address = find_worker(args, token)
    known = template_at(address, token)
    body = request_body(args.model_name, args.message, args.max_new_tokens, known)
    show_answer(address, body, token)


if __name__ == "__main__":
    main()
