"""Processes that start at once: forks of one that has imported everything.

Importing torch, DeepSpeed and Accelerate takes a process longer than the twenty steps that a test
trains. A fork is a process like any other: it has its own memory, ranks and signals, and runs a
module as ``python -m`` does. What belongs to launchers (exit codes, signals handed on, processes
left behind) is tested with the launchers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

IMPORTED = (
    "torch.distributed", "torch.utils.tensorboard", "torch._inductor.compile_fx", "torchvision",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject", "deepspeed.moe.layer",
    "accelerate", "safetensors.torch", "tyro.extras", "PIL.JpegImagePlugin", "open_clip.tokenizer",
    "frugal.common.train", "frugal.common.engine.loop", "frugal.common.engine.deepspeed",
    "frugal.common.engine.accelerate", "frugal.common.data.config",
    "frugal.common.objectives.contrastive", "frugal.common.checkpoint.init_from",
    "pyarrow.parquet",
)  # fmt: skip


@dataclass
class Forked:
    """The processes of one command, with what tests use of a ``subprocess.Popen``."""

    pids: list[int]
    codes: list[Path]
    """A file for each, which holds its exit code once it has ended."""
    returncode: int | None = None

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self.pids[0]

    def send_signal(self, number: int) -> None:
        """Send a signal to every process that has not ended."""
        for pid, code in zip(self.pids, self.codes, strict=True):
            if _exit_code(code) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0, once all have ended; None before."""
        found = [_exit_code(file) for file in self.codes]
        if any(found):  # as launchers do: one that failed takes the others along
            self.send_signal(signal.SIGKILL)
        if None in found:
            return None
        self.returncode = next((code for code in found if code), 0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; raises ``TimeoutExpired``, with nothing left running, after a time."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(f"processes {self.pids}", timeout)
            time.sleep(0.01)
        return code


def _exit_code(file: Path) -> int | None:
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else None


def fork(
    module: str,
    words: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    environments: Sequence[dict[str, str]],
    errors: Path | None = None,
) -> Forked:
    """Run a module, or a script by its path, in one process per environment.

    ``{rank}`` among the words becomes the number of the process. All write to the same log; what
    they write to standard error goes to another file where one is given.
    """
    pids, codes = [], []
    for rank, environment in enumerate(environments):
        code = log.with_name(f"{log.name}.{rank}.exit")
        code.unlink(missing_ok=True)
        request = {
            "module": module, "words": [word.replace("{rank}", str(rank)) for word in words],
            "log": str(log), "code": str(code),
            "errors": str(errors or log), "cwd": str(cwd), "environment": environment,
        }  # fmt: skip
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        pids.append(int(server.stdout.readline()))
        codes.append(code)
    return Forked(pids, codes)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends when the tests do, which closes its input."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )


def _serve() -> None:
    """Fork for every line of the input; note the exit code of every fork that ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that collections in forks do not copy these pages
    running: dict[int, str] = {}
    requests = selectors.DefaultSelector()
    requests.register(sys.stdin, selectors.EVENT_READ)
    while True:
        if requests.select(timeout=0.01):
            line = sys.stdin.readline()
            if not line:
                break
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                _become(request)
            running[pid] = request["code"]
            print(pid, flush=True)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            Path(running.pop(pid)).write_text(f"{os.waitstatus_to_exitcode(status)}\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # without the remarks of libraries on what they leave behind


def _become(request: dict) -> NoReturn:
    """Turn this fork into the process that was asked for."""
    os.setsid()
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = ((os.devnull, os.O_RDONLY), (request["log"], append), (request["errors"], append))
    for target, (name, mode) in enumerate(files):
        os.dup2(os.open(name, mode), target)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed()
    # libraries remark on what they leave behind when the interpreter has ended
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)
    module = request["module"]
    sys.argv = [module, *request["words"]]
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        sys.path[0] = request["cwd"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    _serve()
