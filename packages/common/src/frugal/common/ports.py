"""Ports for processes to meet at."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST, _LAST = 10_000, 65_535
_LENT = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Where Linux says which ports it lends to connections that name none (``man 7 ip``)."""
_USUAL = (32_768, 60_999)


def free_port() -> int:
    """A TCP port that nothing listens on now, for a process that starts in a moment.

    It is none of those that the system lends to outgoing connections: such a port, found free, may
    be lent before the process that is to listen on it has started.
    """
    try:
        first, last = (int(word) for word in _LENT.read_text().split())
    except (OSError, ValueError):  # a container may hide it
        first, last = _USUAL
    ports = [port for port in range(_FIRST, _LAST + 1) if not first <= port <= last]
    # the system's randomness: commands that start together must not find the same port
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:  # nothing outside; one that the system would lend
        probe.bind(("", 0))
        return probe.getsockname()[1]
