"""Which process of how many this is, as launchers announce it; and how the processes meet.

Variables of launchers linger in shells, in batch scripts and in containers. They are believed
where they are whole, and wherever they are not believed that is said.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from frugal.common.errors import InputError

MEETING = 600.0
"""Seconds in which all processes of a run must have come."""
_VOICE = 60.0
"""Seconds after which it is said who is waited for; then after twice as many, and so on."""

_ANNOUNCED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, deepspeed and accelerate tell their processes."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""Number of processes, rank and local rank of Open MPI, MPICH with Intel MPI, and MVAPICH."""
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_MPI_LAUNCHERS = (b"mpirun", b"mpiexec", b"orterun", b"orted", b"prted", b"prterun", b"hydra")


class Ranks(NamedTuple):
    """Which process this is."""

    rank: int
    world_size: int
    local_rank: int


def launcher_ranks() -> Ranks:
    """This process as deepspeed, torchrun, accelerate or SLURM announce it; on its own without.

    Raises:
        InputError: if the variables contradict each other, or announce other processes without
            saying where to meet them.
    """
    if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
        return _announced()
    if _is_slurm_step():
        return _of_slurm()
    if (size := _mpi_size()) and _has_mpi_launcher():
        raise InputError(
            f"{_shown(size)}, and MPI's launcher started this process, which Frugal does not use; "
            "start it with torchrun or deepspeed (see launch/)"
        )
    return Ranks(0, 1, 0)


def _announced() -> Ranks:
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, _ = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if rank >= size:
        raise InputError(
            f"the environment announces process {rank} of {size} ({_shown('RANK', 'WORLD_SIZE')}), "
            f"and there is none; {_way_out()}"
        )
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if size > 1 and missing:
        raise InputError(
            f"the environment announces {size} processes ({_shown(*_ANNOUNCED)}) but not where "
            f"they meet ({', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set), so "
            f"no launcher started this one; {_way_out()}"
        )
    if size > 1:
        _number("MASTER_PORT", 0)
    return Ranks(rank, size, local_rank)


def _of_slurm() -> Ranks:
    """A task that srun started beside others."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"srun announces {os.environ['SLURM_NTASKS']} processes ({_shown(*_SLURM)}), but "
            f"{' and '.join(missing)} are not set, where they would meet; start them with "
            "launch/slurm.sh, or one alone with `env -u SLURM_NTASKS -u SLURM_STEP_NUM_TASKS`"
        )
    ranks = Ranks(
        _number("SLURM_PROCID", 0), _number("SLURM_NTASKS", 1), _number("SLURM_LOCALID", 0)
    )
    # as every engine reads them
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), ranks, strict=True):
        os.environ[name] = str(value)
    return ranks


def _is_slurm_step() -> bool:
    """Whether srun started this process as one of several; a batch script is no such step."""
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    return tasks > 1 and "SLURM_PROCID" in os.environ and _number("SLURM_NTASKS", 1) > 1


def _mpi_size() -> str:
    """The variable by which MPI announces several processes; empty without one."""
    return next((names[0] for names in _MPI if _number(names[0], 1) > 1), "")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}, no number; {_way_out()}")
    return int(text)


def _shown(*names: str) -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _way_out() -> str:
    names = [name for name in _ANNOUNCED if name in os.environ]
    return (
        f"if these variables are left over from another command, `unset {' '.join(names)}`; to "
        "use several processes, start them with torchrun or deepspeed (see launch/)"
    )


def _has_mpi_launcher() -> bool:
    process = os.getppid()
    while process > 1:
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]
            if any(name in program.rpartition(b"/")[2] for name in _MPI_LAUNCHERS):
                return True
        process = parent_of(process)
    return False


def parent_of(pid: int) -> int:
    """The process that started a process, or 0 where that is not known."""
    try:
        # the name of the program, in brackets, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def settle(log: logging.Logger) -> Ranks:
    """This process among those that run together, with an environment in which all agree on it.

    A process on its own forgets what is left over of launchers, which libraries would believe, and
    says so where several processes were announced.

    Raises:
        InputError: as :func:`launcher_ranks`.
    """
    ranks = launcher_ranks()
    if ranks.world_size > 1:
        return ranks
    if all(os.environ.get(name) for name in _NEEDED):
        # a launcher of one process; where it would meet others, nobody else comes
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(address, TORCHELASTIC_USE_AGENT_STORE="False")
    else:
        _forget(_ANNOUNCED)
    left = [names for names in _MPI if _number(names[0], 1) > 1]
    if _number("SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in os.environ:
        left.append(_SLURM)
    if left:
        names = [name for part in left for name in part]
        log.warning(
            "%s: these variables announce other processes, but no launcher started this one with "
            "them; it runs on its own (`unset %s` to be rid of this line)",
            _shown(*names),
            " ".join(name for name in names if name in os.environ),
        )
    _forget([name for part in _MPI for name in part])
    return ranks


def work_alone() -> None:
    """Forget every launcher: for commands that one process does, whatever the shell says."""
    _forget([*_ANNOUNCED, *_SLURM, "SLURM_STEP_NUM_TASKS", *(n for part in _MPI for n in part)])


def _forget(names: Any) -> None:
    for name in names:
        os.environ.pop(name, None)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(ranks: Ranks, backend: str, log: logging.Logger, *, limit: float = MEETING) -> None:
    """Bring up ``torch.distributed`` with all processes; it says for whom it waits, and where.

    Nothing happens where this process is on its own, or has met the others already.

    Args:
        ranks: this process.
        backend: of ``torch.distributed``.
        log: told who has not come after a minute.
        limit: seconds to wait.

    Raises:
        InputError: if some do not come.
    """
    import torch.distributed as dist

    if ranks.world_size == 1 or dist.is_initialized():
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    meeting = _Meeting(ranks, limit)
    # in the background: signals would not be heard in the middle of torch's own waiting
    thread = threading.Thread(target=meeting.gather, daemon=True)
    thread.start()
    for seconds in _voices(thread, limit):
        log.error(  # every process says it: the one whose log is read may be the one that is missed
            "waiting for %s at %s (MASTER_ADDR:MASTER_PORT) for %.0f seconds; %s",
            meeting.missing(),
            place,
            seconds,
            _shown("RANK", "WORLD_SIZE"),
        )
    if meeting.store is None or not meeting.is_complete:
        why = f" ({meeting.failure})" if meeting.failure else ""
        raise InputError(
            f"process {ranks.rank} of {ranks.world_size} waited for {meeting.missing()} at {place} "
            f"(MASTER_ADDR:MASTER_PORT) for {meeting.waited:.0f} seconds{why}; see whether all "
            f"were started and can reach that place, and {_way_out()}"
        )
    dist.init_process_group(
        backend, store=meeting.store, rank=ranks.rank, world_size=ranks.world_size
    )


def _voices(thread: threading.Thread, limit: float) -> Iterator[float]:
    """Seconds waited whenever it is time to say so, until a thread ends or the limit is reached."""
    start, voice = time.monotonic(), min(_VOICE, limit / 2)
    while (waited := time.monotonic() - start) < limit + 5:
        thread.join(min(1.0, voice))
        if not thread.is_alive():
            return
        if waited > voice:
            yield waited
            voice *= 2


def _open_store(ranks: Ranks, limit: float) -> Any:
    """As torch's ``env://``, but the process that keeps the store does not wait for all others."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    # torchrun keeps the store itself, and starts processes that failed once more
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Any = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks.world_size,
        is_master=ranks.rank == 0 and not kept,
        timeout=timedelta(seconds=limit),
        wait_for_workers=False,
        multi_tenant=True,
    )
    if kept:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"/worker/attempt_{attempt}", store)
    return store


class _Meeting:
    """The place where processes meet, and who has come."""

    def __init__(self, ranks: Ranks, limit: float) -> None:
        self._ranks = ranks
        self._limit = limit
        self._start = time.monotonic()
        self.store: Any = None
        self.is_complete = False
        self.failure = ""

    @property
    def waited(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    def gather(self) -> None:
        """Come, and wait until all have."""
        try:
            store = _open_store(self._ranks, self._limit)
            store.set(f"frugal/came/{self._ranks.rank}", "")
            self.store = store
            while self.waited < self._limit:
                if not self._absent():
                    self.is_complete = True
                    return
                time.sleep(0.05)
        except Exception as error:  # noqa: BLE001 - told by who waits for this thread
            self.failure = str(error).strip().partition("\n")[0]

    def _absent(self) -> list[int]:
        rank, size, _ = self._ranks
        others = (other for other in range(size) if other != rank)
        return [other for other in others if not self.store.check([f"frugal/came/{other}"])]

    def missing(self) -> str:
        """Who has not come, in words."""
        if self.store is None:
            return "process 0, which keeps the meeting place"
        try:
            absent = self._absent()
        except Exception:  # noqa: BLE001 - the one that kept the place has gone
            return "the other processes"
        listed = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        of = f"of the {self._ranks.world_size}"
        return f"{len(absent)} {of} processes ({listed})" if absent else "nobody"
