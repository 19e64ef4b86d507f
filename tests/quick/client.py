"""Stand for one process: have it forked by ``tests/forks.py``, hand on its signals and its end."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


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
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["TESTS_FORKS"])
    socket.send_fds(server, [b"\n"], [0, 1, 2])
    server.sendall(json.dumps(request).encode() + b"\n")
    answers = server.makefile()
    pid = int(answers.readline())
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
