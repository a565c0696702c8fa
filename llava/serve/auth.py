"""The shared secret of controller, workers and web page."""

from __future__ import annotations

import argparse
import hmac
import os
from pathlib import Path

from ..network import is_loopback

TOKEN_VARIABLE = "LLAVA_SERVE_TOKEN"
LEAST_CHARS = 16


def add_token_arg(parser: argparse.ArgumentParser) -> None:
    """Adds --token-file. The token itself is no option: everybody can read command lines."""
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the secret that controller, workers and web page share (default: the "
        f"variable {TOKEN_VARIABLE}); needed to listen on anything but loopback",
    )


def read_token(token_file: str | None = None) -> str | None:
    """The shared secret from a file, or else the environment; None when there is none.

    Raises ValueError when it is too short, or could not be sent in a header.
    """
    if token_file == "":  # as of a variable that is not set: without a token, anybody may call
        raise ValueError("--token-file is empty: name a file, or leave the option out")
    text = Path(token_file).read_text() if token_file else os.environ.get(TOKEN_VARIABLE, "")
    token = text.strip()
    if not token and not token_file:
        return None
    if len(token) < LEAST_CHARS or not (token.isascii() and token.isprintable()):
        raise ValueError(
            f"the token must have at least {LEAST_CHARS} printable ASCII characters, for example "
            "from: openssl rand -hex 32"
        )
    return token


def token_headers(token: str | None = None) -> dict[str, str]:
    """The headers that carry the secret (default: that of the environment); {} without one."""
    token = token or read_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def is_authorized(header: str | None, token: str | None) -> bool:
    """Whether an `Authorization` header carries the secret, compared in constant time."""
    if token is None:
        return True
    return hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


def check_exposure(host: str, token: str | None) -> None:
    """Raises ValueError when the service would be open to a network without a secret."""
    if token is None and not is_loopback(host):
        raise ValueError(
            f"--host {host} opens the service to a network: give it a token (--token-file FILE or "
            f"the variable {TOKEN_VARIABLE}), the same for controller, workers and web page"
        )
