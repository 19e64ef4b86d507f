"""Stand for one process: have it forked by ``tests/forks.py``, hand on its signals and its end."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(address: str, request: dict, descriptors: list[int]) -> tuple[socket.socket, int]:
    """Have a process forked that has these files open; the connection, and its number.

    Its exit code comes by the connection; where that is closed before, it is killed.
    """
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"\n"], descriptors)
    server.sendall(json.dumps(request).encode() + b"\n")
    return server, int(line_from(server))


def line_from(server: socket.socket) -> bytes:
    """The next line of what comes; nothing that comes after it is taken."""
    line = b""
    while not line.endswith(b"\n"):
        line += server.recv(1) or b"\n"
    return line


def main() -> None:
    """Ask for the fork and wait for its exit code; where this process is killed, so is the fork."""
    words = [word for word in sys.argv[1:2] if word != "-u"] + sys.argv[2:]
    if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
        os.execv(os.environ["TESTS_PYTHON"], [os.environ["TESTS_PYTHON"], *sys.argv[1:]])
    kind = words.pop(0) if words[0] in ("-m", "-c") else "file"
    request = {
        "kind": kind, "module": words[0], "words": words[1:], "cwd": str(Path.cwd()),
        "environment": dict(os.environ), "executable": str(Path(__file__).with_name("python")),
    }  # fmt: skip
    server, pid = ask(os.environ["TESTS_FORKS"], request, [0, 1, 2])
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(line_from(server))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
