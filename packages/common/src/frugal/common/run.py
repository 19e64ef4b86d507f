"""One process of a run: rank, device, folders and the log."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from frugal.common.distributed import parent_of
from frugal.common.errors import InputError
from frugal.common.files import cannot_write

if TYPE_CHECKING:
    import torch


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

    The processes of a run that lost its launcher still write their last checkpoint; they are
    waited for.

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
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{folder} is being trained by another process; stop that one first, or "
                    "choose another --run.dir"
                ) from None
            if not said:
                log.info("waiting for the run in %s to end", folder)
                said = True
            time.sleep(0.2)
        except OSError:
            return None
        else:
            return file
