"""Requests between the parts of the service, and where one may be or listen.

They go straight to the address that was named: no proxy of the environment (HTTP_PROXY), which may
not know this network and would read the token; no password from a .netrc, which would replace the
token; no redirect. As `httpx` is asked to elsewhere, with `trust_env=False`.
"""

from __future__ import annotations

import errno
import socket
from urllib.parse import urlsplit

import requests

SCHEMES = ("http", "https")


def post(url: str, **options) -> requests.Response:
    """`requests.post`, straight to `url`."""
    with requests.Session() as session:
        session.trust_env = False
        return session.post(url, allow_redirects=False, **options)


def checked_address(address: str, option: str, path: bool = True) -> str:
    """`address` without a slash at its end.

    option: what it was given by, for the message of the ValueError about anything else
    path:   whether a path may stand behind the port, as where a proxy is in front
    """
    try:
        parts = urlsplit(address)
        known = parts.scheme in SCHEMES and parts.hostname and parts.port != 0
        known = known and (path or parts.path in ("", "/"))
    except ValueError:  # the port is no number, or too large
        known = False
    plain = address.isascii() and address.isprintable() and not any(c in address for c in " ?#@\\")
    if not known or not plain:
        raise ValueError(f"{option} {address!r} must have the form http://HOST:PORT")
    return address.rstrip("/")


def check_place(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen at `host` and `port`, so that a program says so
    before it loads a model."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} must be within 0 and 65535")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ValueError(f"--host {host} is no address of this machine: {error.strerror}") from None
    refused = []
    for family, kind, _, _, place in places:
        try:
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} is in use, choose another one with --port") from None
            refused.append(error)
    if len(refused) == len(places):
        raise ValueError(f"cannot listen at {host}, port {port}: {refused[0].strerror}")


def page_port(text: str) -> int:
    """A port that browsers can be told, as a `type` of argparse: 0, any port, is none."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


page_port.__name__ = "port (1 to 65535)"  # argparse says: invalid port (1 to 65535) value
