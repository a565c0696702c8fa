"""Sends one question without an image, and shows the answer as it comes.

    python -m llava.serve.test_message --controller http://localhost:10000 \
        --model-name llava-v1.5-7b --message "Tell me a story."
"""

from __future__ import annotations

import argparse
import json

import requests

from ..conversation import SeparatorStyle, conv_templates
from ..errors import errors_as_messages
from ..mm_utils import infer_conv_mode
from ..program_parser import ProgramParser
from .auth import add_token_arg, read_token
from .direct import checked_address
from .register_worker import post


def find_worker(args, token: str | None) -> str:
    """Address of a worker for the model. Raises ValueError when there is none."""
    if args.worker_address:
        return checked_address(args.worker_address, "--worker-address")
    checked_address(args.controller_address, "--controller-address")
    try:
        post(args.controller_address, "/refresh_all_workers", None, token)
    except requests.ConnectionError as error:
        raise ValueError(
            f"no controller at {args.controller_address}: start python -m llava.serve.controller, "
            "or name another with --controller-address"
        ) from error
    models = post(args.controller_address, "/list_models", None, token).json()["models"]
    print(f"Models: {sorted(models)}")
    body = {"model": args.model_name}
    address = post(args.controller_address, "/get_worker_address", body, token).json()["address"]
    if not address:
        raise ValueError(f"no worker serves {args.model_name!r}, choose from {sorted(models)}")
    print(f"worker_addr: {address}")
    return address


def template_at(address: str, token: str | None) -> str | None:
    """The template that the worker says its model has; None for a worker that says nothing. Raises
    ValueError where no worker answers."""
    try:
        name = post(address, "/worker_get_status", None, token).json().get("conv_mode")
    except requests.RequestException as error:
        raise ValueError(
            f"no worker answers at {address} ({type(error).__name__}): is it running? See "
            "python -m llava.serve.model_worker --help"
        ) from error
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


def show_answer(address: str, body: dict, token: str | None) -> str:
    """Prints the stream as it grows and returns the whole text."""
    reply = post(address, "/worker_generate_stream", body, token, timeout=60, stream=True)
    text = ""
    for piece in reply.iter_lines(chunk_size=8192, decode_unicode=False, delimiter=b"\0"):
        if piece:
            chunk = json.loads(piece)
            if chunk["error_code"]:
                raise ValueError(f"{chunk['text']} (error_code: {chunk['error_code']})")
            grown = chunk["text"]
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
