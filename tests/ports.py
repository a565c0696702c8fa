"""A port for a test's own server; two test processes must not want the same."""

import random
import socket
from itertools import cycle

#: below those that systems give to connections: none takes the port before its server does
PORTS = range(15_000, 32_000)
_start = random.SystemRandom().randrange(len(PORTS))
_next = cycle([*PORTS[_start:], *PORTS[:_start]])


def free_port() -> int:
    """Another one at every call."""
    for port in _next:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
