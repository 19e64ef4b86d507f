"""Which process of how many this is, how the processes meet, and all they say to each other.

Variables of launchers linger in shells, in batch scripts and in containers. They are believed
where they are whole, and wherever they are not believed that is said.

No other module asks ``torch.distributed`` for ranks or gathers by itself. Every function here is
called by all processes of its group alike, and does nothing where there is only one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.ports import free_port

MEETING = 10.0
"""Minutes in which all processes of a run must have come."""
_PATIENCE = timedelta(hours=2)
"""Of torch, which ends processes without a word of whom they wait for: a watchdog comes before. By
itself it would end those that wait for one that reads or computes alone, after 10 or 30 minutes."""
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
    """One process among those that work together; by default a process on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of its machine."""

    @classmethod
    def current(cls) -> Ranks:
        """This process among all of ``torch.distributed``, or on its own without it."""
        rank, world_size = place_in_world()
        return cls(rank, world_size, _number("LOCAL_RANK", 0) if world_size > 1 else 0)

    def turns(self, count: int, chunk: int) -> Iterator[slice]:
        """The rows of ``count`` that are this process's: chunks taken in turn, the last shorter."""
        for start in range(self.rank * chunk, count, self.world_size * chunk):
            yield slice(start, min(start + chunk, count))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place: a large table has no second copy.

        Exact for integers, and for tables in which only one process filled any one row.
        """
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def table(
        self,
        count: int,
        width: int,
        *,
        chunk: int,
        device: torch.device,
        fill: Callable[[slice], Tensor],
    ) -> Tensor:
        """(count, width) float32 on every process, filled ``chunk`` rows at a time.

        The chunks take turns among the processes, and the same rows share a chunk on any number
        of them: what ``fill`` computes does not depend on how many there are.
        """
        table = torch.zeros(count, width, device=device)
        for rows in self.turns(count, chunk):
            table[rows] = fill(rows)
        return self.sum(table)

    def same_data(self, data: Any, name: str) -> None:
        """Refuse to share out images that the processes see differently.

        Args:
            data: has ``len()`` and ``listing()``.
            name: of the evaluation.

        Raises:
            InputError: on every process, if one sees other data.
        """
        if self.world_size > 1:
            what, words = f"data of the evaluation {name!r}", f"{len(data):,} images"
            require_same((len(data), data.listing()), what, words=words)


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


def resolve_ranks(log: logging.Logger) -> Ranks:
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
    leftover = [names for names in _MPI if _number(names[0], 1) > 1]
    if _number("SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in os.environ:
        leftover.append(_SLURM)
    if leftover:
        names = [name for part in leftover for name in part]
        log.warning(
            "%s: these variables announce other processes, but no launcher started this one with "
            "them; it runs on its own (`unset %s` to be rid of this line)",
            _shown(*names),
            " ".join(name for name in names if name in os.environ),
        )
    _forget([name for part in _MPI for name in part])
    return ranks


def forget_launchers() -> None:
    """Forget every launcher: for commands that one process does, whatever the shell says."""
    _forget([*_ANNOUNCED, *_SLURM, "SLURM_STEP_NUM_TASKS", *(n for part in _MPI for n in part)])


def _forget(names: Any) -> None:
    for name in names:
        os.environ.pop(name, None)


def init_process_group(
    ranks: Ranks, backend: str, log: logging.Logger, *, limit: float = 60 * MEETING
) -> None:
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
    if ranks.rank == 0 and "EADDRINUSE" in meeting.failure:
        raise InputError(
            f"process 0 of {ranks.world_size} is to keep the meeting place {place} "
            "(MASTER_ADDR:MASTER_PORT), but another program listens at that port; start all "
            "with another port (--master_port of deepspeed and torchrun, --main_process_port of "
            f"accelerate), and {_way_out()}"
        )
    if meeting.store is None or not meeting.is_complete:
        why = f" ({meeting.failure})" if meeting.failure else ""
        raise InputError(
            f"process {ranks.rank} of {ranks.world_size} waited for {meeting.missing()} at {place} "
            f"(MASTER_ADDR:MASTER_PORT) for {meeting.waited:.0f} seconds{why}; see whether all "
            f"were started and can reach that place, and {_way_out()}"
        )
    dist.init_process_group(
        backend,
        store=meeting.store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_PATIENCE,
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


def _open_store(ranks: Ranks, limit: float) -> dist.Store:
    """As torch's ``env://``, but the process that keeps the store does not wait for all others."""
    # torchrun keeps the store itself, and starts processes that failed once more
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: dist.Store = dist.TCPStore(
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
        store = dist.PrefixStore(f"/worker/attempt_{attempt}", store)
    return store


def connect_to_store(*, timeout: float) -> dist.Store:
    """A connection of one's own to where the processes of a run have met.

    Args:
        timeout: seconds that one of its calls waits at most.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout),
    )
    # torchrun keeps it when it starts processes that failed once more
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"frugal/attempt_{attempt}", store)


class _Meeting:
    """The place where processes meet, and who has come."""

    def __init__(self, ranks: Ranks, limit: float) -> None:
        self._ranks = ranks
        self._limit = limit
        self._start = time.monotonic()
        self.store: dist.Store | None = None
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
        assert self.store is not None
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


# ------------------------------------------------------------------------------------------------
# What the processes of a group say to each other.

Group = dist.ProcessGroup | None
"""Some of the processes; None stands for all of them."""


class VirtualProcess(Protocol):
    """One of several processes in whose place a thread of this one computes a step."""

    rank: int
    world_size: int

    def exchange(self, local: Tensor) -> Tensor:
        """(W, ...): the tensor that every virtual process gives, in the order of the ranks."""
        ...


_VIRTUAL: ContextVar[VirtualProcess | None] = ContextVar("virtual process", default=None)


@contextlib.contextmanager
def in_place_of(process: VirtualProcess) -> Iterator[None]:
    """While open, this thread is a virtual process among all others, where no group is named."""
    token = _VIRTUAL.set(process)
    try:
        yield
    finally:
        _VIRTUAL.reset(token)


def _virtual(group: Group = None) -> VirtualProcess | None:
    return _VIRTUAL.get() if group is None else None


def place_in_world(group: Group = None) -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where there is only this process."""
    if (process := _virtual(group)) is not None:
        return process.rank, process.world_size
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def new_host_group() -> Group:
    """A group of all processes for tensors on the CPU; None where there is only this process.

    The group that exchanges gradients works in the order of the device, and is not to be used by
    two threads at a time. Whoever must not wait for it, or works beside it, takes one of its own.
    """
    if place_in_world()[1] == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every process belongs to it
    return group


def barrier() -> None:
    """Wait until every process is here."""
    if place_in_world()[1] > 1:
        dist.barrier()


def leave_process_group() -> None:
    """End what :func:`init_process_group` began, or an engine did; DeepSpeed ends badly without."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather(local: Tensor, group: Group = None) -> Tensor:
    """The rows of every process in the order of the ranks.

    Where ``local`` wants gradients, what any process computes from a row flows back to the process
    that the row came from, summed over the processes.

    Args:
        local: (B, ...), of the same shape on every process.
        group: the processes; all of them by default.

    Returns:
        (W B, ...); ``local`` itself where there is only this process.
    """
    if place_in_world(group)[1] == 1:
        return local
    return _Gather.apply(local, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.shape = local.shape
        if (process := _virtual(group)) is not None:
            return process.exchange(local).flatten(0, 1)
        rows = place_in_world(group)[1] * len(local)
        whole = local.new_empty((rows, *local.shape[1:]))
        dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if (process := _virtual(ctx.group)) is not None:
            return _sum_in_order(process.exchange(gradient))[_own_rows(process, ctx.shape)], None
        local = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None


def gather_objects(value: Any) -> list[Any]:
    """A small value of every process, in rank order, on all of them."""
    world_size = place_in_world()[1]
    values: list[Any] = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(local: Tensor) -> Tensor:
    """The sum of a small tensor over the processes; gradients are summed on their way back."""
    return local if place_in_world()[1] == 1 else _Sum.apply(local)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        del ctx
        return _all_reduced(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        del ctx
        return _all_reduced(gradient)


def _all_reduced(local: Tensor) -> Tensor:
    if (process := _virtual()) is not None:
        return _sum_in_order(process.exchange(local))
    total = local.clone()
    dist.all_reduce(total)
    return total


def _sum_in_order(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """The sum of rows, one added after the other."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def _own_rows(process: VirtualProcess, shape: torch.Size) -> slice:
    return slice(process.rank * shape[0], (process.rank + 1) * shape[0])


def chained_sum(rows: Sequence[Tensor]) -> Tensor:
    """The sum of the rows of this process and of all before it, one added after the other.

    The last process has the sum of all; its bits do not depend on which process brings which rows.
    """
    rank, world_size = place_in_world()
    if rank > 0:
        before = torch.empty_like(rows[0])
        dist.recv(before, src=rank - 1)
        rows = [before, *rows]
    total = _sum_in_order(rows)
    if rank + 1 < world_size:
        dist.send(total, dst=rank + 1)
    return total


def mean_over_processes(local: Tensor) -> Tensor:
    """The mean of a small float tensor over the processes."""
    return sum_over_processes(local) / place_in_world()[1]


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """A scalar whose mean over the processes is the mean of all valid values; any one shape."""
    world_size = place_in_world()[1]
    count = sum_over_processes(valid.sum()).clamp(min=1)
    return torch.where(valid, values, 0.0).sum() * (world_size / count)


def broadcast(tensor: Tensor, *, source: int) -> None:
    """Overwrite a tensor with that of one process."""
    if place_in_world()[1] > 1:
        dist.broadcast(tensor, src=source)


class Vote:
    """Whether any process says yes, known to all of them after the same step.

    The hosts tell each other without waiting, neither for the device nor for the slowest process:
    what is said before one step is heard before the next.
    """

    def __init__(self, device: torch.device) -> None:
        """Every process calls this; ``device`` is the one it trains on."""
        self._is_alone = place_in_world()[1] == 1
        self._group = new_host_group() if device.type == "cuda" else None
        self._said: tuple[dist.Work, Tensor] | None = None

    def any(self, *, yes: bool) -> bool:
        """Say yes or no; every process calls this before a step.

        Returns:
            True on all processes alike, once one of them said yes; alone, without delay.
        """
        if self._is_alone:
            return yes
        heard = False
        if self._said is not None:
            work, votes = self._said
            work.wait()
            heard = votes.item() > 0
        votes = torch.tensor(int(yes))
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        self._said = work, votes
        return heard


def require_same(
    value: Any,
    what: str,
    *,
    words: str = "",
    remedy: str = "give every machine the same files under the same path",
    gather: Callable[[Any], list[Any]] = gather_objects,
) -> None:
    """Refuse to work on something that the processes see differently.

    Args:
        value: compared; equal where the processes see the same.
        what: it stands for, such as ``data of the evaluation 'a'``.
        words: what a person is told of it.
        remedy: what to do about it.
        gather: collects the value of every process, in rank order, on all of them.

    Raises:
        InputError: on every process alike, naming those that differ from process 0.
    """
    found = gather((value, words, socket.gethostname()))
    first, first_words, first_host = found[0]
    odd = [rank for rank, (other, _, _) in enumerate(found) if other != first]
    if not odd:
        return
    _, odd_words, odd_host = found[odd[0]]
    listed = ", ".join(map(str, odd[:8])) + (" and others" if len(odd) > 8 else "")
    numbers = "of other names or bytes"
    if odd_words != first_words:
        numbers = f"{odd_words} where there are {first_words}"
    raise InputError(
        f"the {what} is not the same everywhere: process {listed} of {len(found)} "
        f"{'sees' if len(odd) == 1 else 'see'} another copy than process 0 ({numbers}; process "
        f"{odd[0]} is on {odd_host}, process 0 on {first_host}); {remedy}"
    )


def check_delivery(delivered: Tensor) -> None:
    """Refuse to count an image twice or not at all.

    Args:
        delivered: (N,) how often each image came, over all processes.
    """
    wrong = (delivered != 1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise RuntimeError(
            f"{len(wrong)} of {len(delivered)} images were not evaluated exactly once; image "
            f"{first} came {int(delivered[first])} times"
        )
