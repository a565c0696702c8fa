"""Tells a controller about a worker that did not register itself.

    python -m llava.serve.register_worker --controller http://localhost:10000 \
        --worker-name http://localhost:40000
"""

from __future__ import annotations

import argparse
import json

import requests

from ..errors import errors_as_messages
from ..program_parser import ProgramParser
from . import direct
from .auth import add_token_arg, read_token, token_headers

SECONDS = 30


def post(address: str, path: str, body: dict | None, token: str | None = None, **options):
    """The reply of controller or worker. Raises ValueError with its reason when it refuses."""
    reply = direct.post(
        address.rstrip("/") + path,
        json=body,
        headers={"User-Agent": "LLaVA Client", **token_headers(token)},
        timeout=options.pop("timeout", SECONDS),
        **options,
    )
    if reply.status_code != 200:
        raise ValueError(f"{path} was refused ({reply.status_code}): {reason(reply)}")
    return reply


def ask_controller(address: str, path: str, body: dict | None, token: str | None = None):
    """`post` to a controller. Raises ValueError where there is none, too."""
    try:
        return post(address, path, body, token)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ValueError(
            f"no controller at {address}: start python -m llava.serve.controller, or name another "
            "with --controller-address"
        ) from error


def said(reply, name: str, kind: type):
    """What a JSON reply says under `name`, a `kind`. Raises ValueError where it does not: something
    else listens there."""
    try:
        value = json.loads(reply.content)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise ValueError(
            f"{reply.url} answers without {name!r}: is that a controller or worker of llava.serve?"
        )
    return value


def reason(reply) -> str:
    try:
        return json.loads(reply.content.rstrip(b"\0"))["text"]
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("--controller-address", required=True, help="where the controller is")
    parser.add_argument("--worker-name", required=True, help="address of the worker")
    parser.add_argument(
        "--check-heart-beat",
        action="store_true",
        help="forget the worker when it sends no heart beat",
    )
    add_token_arg(parser)
    return parser


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    body = {
        "worker_name": args.worker_name,
        "check_heart_beat": args.check_heart_beat,
        "worker_status": None,
    }
    controller = direct.checked_address(args.controller_address, "--controller-address")
    ask_controller(controller, "/register_worker", body, read_token(args.token_file))


if __name__ == "__main__":
    main()
