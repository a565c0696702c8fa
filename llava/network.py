"""Network addresses: which of them are this machine, and the entries of allow-lists."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or number."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def allowed_place(text: str, option: str) -> tuple[str, int | None]:
    """(host, port) of an entry HOST or HOST:PORT of an allow-list; None: every port.

    option: what it was given by, for the message of the ValueError about anything else
    """
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or "@" in text or parts.path:
        raise ValueError(f"{option} {text!r} must have the form HOST or HOST:PORT")
    return host, port
