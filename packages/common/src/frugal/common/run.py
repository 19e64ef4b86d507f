"""One process of a run: rank, device, threads, folder, lock and log."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import torch

from frugal.common.distributed import (
    MEETING,
    Ranks,
    init_process_group,
    launcher_ranks,
    parent_of,
    resolve_ranks,
)
from frugal.common.errors import InputError
from frugal.common.files import cannot_write, raise_open_files_limit


@dataclass(frozen=True)
class Run:
    """What a process knows of its run."""

    dir: Path
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    log: logging.Logger

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and speaks."""
        return self.rank == 0


def open_run(folder: Path, device: str, *, threads: int | None = None) -> Run:
    """Rank, device, threads and log of this process, whose files go into a folder.

    Args:
        folder: the run directory.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: of this process on a CPU; without it the cores are divided among the processes.

    Raises:
        InputError: if the device is not there.
    """
    log = make_logger(launcher_ranks().rank)
    rank, world_size, local_rank = resolve_ranks(log)
    raise_open_files_limit()  # what loader processes hand over takes a file each
    chosen = _device(device, local_rank)
    if chosen.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        torch.set_num_threads(threads or _threads(on_this_machine))
    return Run(folder, rank, world_size, local_rank, chosen, log)


def process_began() -> float:
    """When this process was started, as :func:`time.time` counts; now where that is not known."""
    try:
        # the name of the program, in brackets, may hold anything
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def _threads(processes: int) -> int:
    """The cores divided among the processes of this machine; alone, what OMP_NUM_THREADS says.

    Launchers set that variable to 1 for their processes, which would leave cores idle.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if processes == 1 and chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "engine.device is cuda, but torch finds no CUDA device; use --engine.device cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(run: Run, *, minutes: float = MEETING) -> None:
    """Meet the other processes of a run, where there are any; Accelerate and DeepSpeed join them.

    Args:
        run: this process.
        minutes: to wait for them.

    Raises:
        InputError: if some do not come.
    """
    backend = "nccl" if run.device.type == "cuda" else "gloo"
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if run.device.type == "cuda" and shards:
        backend = "cuda:nccl,cpu:gloo"  # as Accelerate has it, where parts may be on the host
    ranks = Ranks(run.rank, run.world_size, run.local_rank)
    init_process_group(ranks, backend, run.log, limit=60 * minutes)


def make_logger(rank: int) -> logging.Logger:
    """A logger that speaks on the first process only, to standard error."""
    logger = logging.getLogger("frugal")
    logger.handlers.clear()
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    return logger


_LAUNCHERS = (b"deepspeed", b"torchrun", b"torch.distributed", b"accelerate")


class LauncherChain:
    """The launchers above this process, to notice when one of them is gone.

    A launcher that is killed, and the deepspeed launcher also where it is only told to stop,
    leaves its processes behind; they would train on beside the run that replaces them.
    """

    def __init__(self) -> None:
        self._links: list[tuple[int, int]] = []
        child = os.getpid()
        while (parent := parent_of(child)) > 1 and _is_launcher(parent):
            self._links.append((child, parent))
            child = parent

    @property
    def is_broken(self) -> bool:
        """True once a launcher has ended before its processes."""
        return any(parent_of(child) != parent for child, parent in self._links)


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(name in word for word in words[:4] for name in _LAUNCHERS)


def lock_run_dir(folder: Path, *, patience: float, log: logging.Logger) -> TextIOWrapper | None:
    """Keep a second run out of a run directory, for as long as what is returned stays open.

    The processes of a run that lost its launcher, and those that write its checkpoints, still write
    the last one; they are waited for, as long as it grows.

    Args:
        folder: the run directory, which must exist.
        patience: seconds to wait.
        log: told once that there is somebody to wait for.

    Returns:
        The open lock file, or None where the file system knows no locks.

    Raises:
        InputError: if another run still holds the lock after that.
    """
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise cannot_write(folder, error) from None
    deadline = time.monotonic() + patience
    is_told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline and not _is_being_saved(folder):
                raise InputError(
                    f"{folder} is being trained by another process; stop that one first, or "
                    "choose another --run.dir"
                ) from None
            if not is_told:
                log.info(
                    "waiting for the run in %s to end, or for its last checkpoint to be written: "
                    "at most %.0f minutes from when nobody writes to it", folder, patience / 60,
                )  # fmt: skip
                is_told = True
            time.sleep(0.2)
        except OSError:
            return None
        else:
            return file


def _is_being_saved(run_dir: Path) -> bool:
    """Whether a file of a checkpoint that is not whole was written to within three minutes."""
    files = list(run_dir.glob("checkpoints/.*.writing/*"))
    with contextlib.suppress(OSError):  # it has become whole meanwhile
        # a clock that was set back leaves files of the future, which nobody writes to
        return any(abs(time.time() - file.stat().st_mtime) < 180 for file in files)
    return True
