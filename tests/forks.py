"""Processes that start at once: forks of one that has imported everything.

Importing torch, DeepSpeed and Accelerate takes a process longer than the twenty steps that a test
trains. A fork is a process like any other: it has its own memory, ranks and signals, and runs a
module as ``python -m`` does. What launchers and scripts start is forked too, where
``tests/quick/python`` is their Python: a small process that asks for the fork, hands on signals
and ends as the fork ends. What belongs to starts (signals to a tree of processes, processes left
behind, the imports of a command) is tested with launchers and a Python that are nobody's forks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from quick.client import ask, line_from

_LIBRARIES = (
    "torch.distributed", "torch.utils.tensorboard", "torch._inductor.compile_fx", "torchvision",
    "torch._subclasses.schema_check_mode", "setuptools.dist",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.layer", "deepspeed.moe.ep_router", "deepspeed.launcher.runner",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.comm.mori",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.utils.pin_memory",
    "accelerate.commands.accelerate_cli", "torch.distributed.run",
    "safetensors.torch", "tyro.extras", "typeguard", "numpy.ma",
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.GifImagePlugin", "PIL.PpmImagePlugin",
    "PIL.BmpImagePlugin", "simplejpeg", "open_clip.tokenizer", "pyarrow.parquet",
)  # fmt: skip


def _modules() -> tuple[str, ...]:
    """Libraries, and every module of ours that no command starts with."""
    found = []
    for source in (Path(__file__).parents[1] / "packages").glob("*/src"):
        files = sorted((source / "frugal").rglob("*.py"))
        files = [file for file in files if "__main__" not in f"{file} {file.read_text()}"]
        parts = [file.relative_to(source).with_suffix("").parts for file in files]
        found += [".".join(part for part in name if part != "__init__") for name in parts]
    return (*_LIBRARIES, *found)


EVERYTHING = "TESTS_FORKS"
"""The variable with the address of the process that has imported all."""
TORCH = "TESTS_FORKS_OF_TORCH"
"""Of the one that has imported torch, and nothing else."""


@dataclass
class Forked:
    """The processes of one command, with what tests use of a ``subprocess.Popen``."""

    pids: list[int]
    connections: list[socket.socket]
    """With the server, for each: its exit code comes once it has ended; closed, it is killed."""
    codes: dict[int, int] = field(default_factory=dict)
    """Of those that are known to have ended, by number of process."""
    returncode: int | None = None

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self.pids[0]

    def send_signal(self, number: int) -> None:
        """Send a signal to every process that has not ended."""
        ended = self.ended()
        for pid in self.pids:
            if pid not in ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def poll(self) -> int | None:
        """The first exit code that is not 0, or 0, once all have ended; None before."""
        ended = self.ended()
        if any(ended.values()):  # as launchers do: one that failed takes the others along
            self.send_signal(signal.SIGKILL)
        if len(ended) < len(self.pids):
            return None
        self.returncode = next((ended[pid] for pid in self.pids if ended[pid]), 0)
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

    def ended(self) -> dict[int, int]:
        """The exit codes of those that have ended by now, by number of process."""
        for pid, connection in zip(self.pids, self.connections, strict=True):
            if pid not in self.codes and select.select([connection], [], [], 0)[0]:
                self.codes[pid] = int(line_from(connection))
                connection.close()
        return self.codes


def fork(
    module: str,
    words: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    environments: Sequence[dict[str, str]],
    errors: Path | None = None,
    address: str = EVERYTHING,
) -> Forked:
    """Run a module, or a script by its path, in one process per environment.

    ``{rank}`` among the words becomes the number of the process. All write to the same log; what
    they write to standard error goes to another file where one is given.
    """
    pids, connections = [], []
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for rank, environment in enumerate(environments):
        request = {
            "kind": "file" if module.endswith(".py") else "-m",
            "module": module, "words": [word.replace("{rank}", str(rank)) for word in words],
            "cwd": str(cwd), "environment": environment,
        }  # fmt: skip
        files = ((os.devnull, os.O_RDONLY), (log, append), (errors or log, append))
        descriptors = [os.open(name, mode) for name, mode in files]
        connection, pid = ask(os.environ[address], request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        pids.append(pid)
        connections.append(connection)
    return Forked(pids, connections)


def start_servers() -> None:
    """Start the processes that fork, for this process and all that it starts.

    They import nothing before the first request, and end when this process does, which closes
    their input.
    """
    for address, imported in ((EVERYTHING, _modules()), (TORCH, ("torch",))):
        with socket.socket(socket.AF_UNIX) as listener:
            path = str(Path(tempfile.mkdtemp(prefix="forks")) / "socket")
            listener.bind(path)
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), *imported],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=os.environ | {"DS_ACCELERATOR": "cpu"},
            )
        _SERVERS.append(server)
        os.environ[address] = path


_SERVERS: list[subprocess.Popen[bytes]] = []


def _serve(listener: socket.socket, imported: Sequence[str]) -> None:
    """Fork for every client; tell it the exit code of what ends."""
    if listener in select.select([sys.stdin, listener], [], [])[0]:
        _import(imported)
    clients: dict[int, socket.socket] = {}
    requests = selectors.DefaultSelector()
    requests.register(sys.stdin, selectors.EVENT_READ)
    requests.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in requests.select(timeout=0.01 if clients else None):
            if key.fileobj is sys.stdin:
                _end(clients, listener)
            if key.fileobj is listener:
                client, _ = listener.accept()
                if (pid := _forked_for(client)) is None:
                    client.close()
                    continue
                clients[pid] = client
                requests.register(client, selectors.EVENT_READ, data=pid)
            else:  # the client has ended, and says nothing more
                requests.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
        while clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with clients.pop(pid) as client:
                with contextlib.suppress(KeyError):
                    requests.unregister(client)
                with contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _forked_for(client: socket.socket) -> int | None:
    """The process that a client asks for; None where the client was killed before it had asked.

    One that is killed right behind that is noticed like one that is killed later.
    """
    descriptors: list[int] = []
    line = ""
    with contextlib.suppress(OSError):
        _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
        line = client.makefile().readline()
    pid = os.fork() if line.endswith("\n") else None
    if pid == 0:
        _become(json.loads(line), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    if pid is not None:
        with contextlib.suppress(OSError):
            client.sendall(f"{pid}\n".encode())
    return pid


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    if "frugal.flip.recipes" in names:
        _warm_up()
    gc.collect()
    gc.freeze()  # so that collections in forks do not copy these pages


def _warm_up() -> None:
    """Have done once what every process does and keeps."""
    import torch

    from frugal.common.cli import read_command_line
    from frugal.common.data.tokenizers import ClipBpe, WordPiece
    from frugal.common.engine.throughput import matmul_peak
    from frugal.common.installed import package_versions
    from frugal.flip.recipes import RECIPES

    read_command_line(RECIPES, program="test", arguments=["demo"])
    ClipBpe().load()
    WordPiece(vocab=Path(__file__).with_name("words.txt")).load().encode("a red circle")
    matmul_peak(torch.device("cpu"), torch.float32)
    package_versions()


def _end(running: Iterable[int], listener: socket.socket) -> NoReturn:
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(Path(listener.getsockname()).parent)
    os._exit(0)  # without the remarks of libraries on what they leave behind


def _become(request: dict, descriptors: Sequence[int]) -> NoReturn:
    """Turn this fork into the process that was asked for."""
    os.setsid()
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.executable = request.get("executable", sys.executable)
    random.seed()
    for stream in (sys.stdout, sys.stderr):
        # Several write to one log: whole lines, also where PYTHONUNBUFFERED has print() write every
        # word by itself.
        stream.reconfigure(write_through=False, line_buffering=True)
    # libraries remark on what they leave behind when the interpreter has ended
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)
    try:
        _run(request)
    except SystemExit as end:
        _leave(end)
    _leave(SystemExit())


def _run(request: dict) -> None:
    module = request["module"]
    sys.argv = [module, *request["words"]]
    if request["kind"] == "-c":
        sys.argv[0], sys.path[0] = "-c", ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(module, "<string>", "exec"), main.__dict__)
    elif request["kind"] == "file":
        sys.path.insert(0, str(Path(module).parent))
        runpy.run_path(module, run_name="__main__")
    else:
        sys.path[0] = request["cwd"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _leave(end: SystemExit) -> NoReturn:
    """End as Python does, but without taking every module apart.

    That takes half a second after a fork, as every page is copied. Where threads still run it is
    done, as a process can fail in it; but for the one that every bar of tqdm leaves behind.
    """
    others = {thread.name for thread in threading.enumerate()} - {"MainThread", "tqdm_monitor"}
    if others or isinstance(end.code, str):
        raise end
    threading._shutdown()  # what waits for it is run first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((end.code or 0) & 0xFF)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
