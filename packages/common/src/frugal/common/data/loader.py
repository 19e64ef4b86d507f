"""Loader processes that are waited for with a limit, and whose end is noticed and explained."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import multiprocessing.queues
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_exhaustion, size_words

PREFETCHED = 2
"""Batches that each loader process keeps ready."""
WAIT = 600.0
"""Seconds that a batch is waited for."""
SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps what processes share."""
_ALONE = "--data.workers 0 (evaluate: --workers 0)"
_FIRST_WARNING = 60.0
"""Seconds of waiting after which it is said; then after twice as many, and so on."""
_GRACE = 2.0
"""Seconds that a loader process has to hear that it may end."""
_REASON = 0.5
"""Seconds after which a process is seen to have ended."""


class Loader:
    """What a data set makes of a sampler's items, made in loader processes or in this one.

    A data set may hand over a mistake of the user as ``{"mistake": sentence}``, or raise it. The
    processes end with this one, and with nothing else: signals that are sent to the whole group
    are this process's to obey.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        *,
        sampler: Iterable[Any] | None = None,
        workers: int,
        pin_memory: bool = False,
        limit: float = WAIT,
        finishes_alone: bool = False,
    ) -> None:
        """Prepare; nothing is read before the iteration begins.

        Args:
            dataset: from an item of the sampler to fields, or an iterable one.
            sampler: of items; None for an iterable data set.
            workers: loader processes; 0 reads in this process.
            pin_memory: put the tensors where a GPU can fetch them.
            limit: seconds to wait for an item.
            finishes_alone: where a loader process has ended, make the items that are still to come
                in this process, each with the reason as ``ends``, instead of raising; for a
                sampler that gives the same items whenever it is asked.
        """
        self._finishes_alone = finishes_alone
        self._sampler = sampler
        self._workers = workers
        self._pin_memory = pin_memory
        self._limit = limit
        iterable = isinstance(dataset, IterableDataset)
        self.dataset: Any = _GuardedRow(dataset) if iterable else _Guarded(dataset)
        options: dict[str, Any] = {}
        if not iterable:
            options["sampler"] = sampler
        if workers:
            # asked every second: torch would wait for ever, or end at the first pause
            options |= {"prefetch_factor": PREFETCHED, "timeout": 1, "worker_init_fn": _Begin()}
        self._loader = DataLoader(
            self.dataset,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=_own_generator(),
            **options,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Start the processes, at once; fields of one item after the other.

        Raises:
            InputError: for a mistake of the user, a loader process that has ended, or too long a
                wait.
        """
        return self._rows(*_start(self._loader))

    def _rows(
        self, items: Iterator[dict[str, Any]], processes: list[BaseProcess]
    ) -> Iterator[dict[str, Any]]:
        warned = False
        with _ended_afterwards(items, processes):
            for fields in self._items(items, processes):
                if "mistake" in fields:
                    raise InputError(fields["mistake"])
                if (reason := fields.pop(_UNSHARED, None)) is not None:
                    warned = warned or _warn_of_pipes(reason, self._workers)
                    yield _mapped(fields, self._to_tensor)
                else:
                    yield fields

    def _to_tensor(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(value)
        return tensor.pin_memory() if self._pin_memory else tensor

    def _items(
        self, items: Iterator[dict[str, Any]], processes: list[BaseProcess]
    ) -> Iterator[dict[str, Any]]:
        started, next_warning = time.monotonic(), _FIRST_WARNING
        num_given = 0
        while True:
            try:
                fields = next(items)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not processes:
                    raise
                try:
                    _explain(error, processes)
                except InputError as reason:
                    if not self._finishes_alone:
                        raise
                    yield from self._rest(num_given, str(reason))
                    return
                waited = time.monotonic() - started
                if waited > self._limit + 30:  # a reader that knows what it waits for says it first
                    raise InputError(
                        f"{_named(processes)} gave nothing for {waited:.0f} seconds; see whether "
                        "the storage of the data answers, or read in one process with "
                        f"{_ALONE}"
                    ) from None
                if waited > next_warning:
                    # as an error: every process says it, since the others may wait for this one
                    logging.getLogger("frugal").error(
                        "waiting for data: %s gave nothing for %.0f seconds",
                        _named(processes),
                        waited,
                    )
                    next_warning *= 2
                continue
            yield fields
            num_given += 1
            started, next_warning = time.monotonic(), _FIRST_WARNING

    def _rest(self, num_given: int, reason: str) -> Iterator[dict[str, Any]]:
        """The items after the first ones, made in this process."""
        # as an error: every process says it, since the others do not know
        logging.getLogger("frugal").error("%s; reading in this process until the run ends", reason)
        assert self._sampler is not None
        for item in itertools.islice(self._sampler, num_given, None):
            yield self.dataset[item] | {"ends": reason}


def _unchanged(fields: Any) -> Any:
    return fields


def _own_generator() -> torch.Generator:
    """For a loader, which otherwise draws a seed from the generator of the model's noise.

    It does so whenever an iteration begins, as where a run is continued.
    """
    return torch.Generator()


def _start(loader: DataLoader[Any]) -> tuple[Iterator[dict[str, Any]], list[BaseProcess]]:
    """An iteration and its loader processes; where they cannot all be started, none is left."""
    # torch's handler would raise in the middle of whatever this process does when a child ends
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True
    before = set(multiprocessing.active_children())
    try:
        items = iter(loader)
    except BaseException as error:
        # they leave SIGTERM to this process, which would wait for them at its end
        _kill([child for child in multiprocessing.active_children() if child not in before])
        if not isinstance(error, OSError):
            raise
        refuse_exhaustion(error)
        raise InputError(
            f"the {loader.num_workers} loader processes cannot be started ({reason_of(error)}); "
            f"see what {SHARED_MEMORY} has free, or read in one process with {_ALONE}"
        ) from None
    # not the active ones: one may have ended already
    return items, list(getattr(items, "_workers", ()))


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


@contextlib.contextmanager
def _ended_afterwards(items: Iterator[Any], processes: list[BaseProcess]) -> Iterator[None]:
    end = partial(_kill, processes)
    atexit.register(end)
    try:
        yield
    finally:
        _shut_down(items, processes)
        atexit.unregister(end)


def _shut_down(items: Iterator[Any], processes: list[BaseProcess]) -> None:
    """End the processes of an iteration: by torch's word, and by force where one does not hear it.

    A process that is killed while it looks at torch's event takes the lock of it along, and whoever
    sets the event then waits for ever. So those that listen are let go first; and where one was
    killed from outside, nobody but a thread that is left behind waits for it.
    """
    if sys.is_finalizing():  # after an error that nobody expected; no thread begins any more
        _kill(processes)
        return
    stop = getattr(items, "_shutdown_workers", None)
    if stop is None:  # of an iteration in this process
        return
    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    stopping.join(_GRACE)
    _kill(processes)
    stopping.join(_GRACE)


def _explain(error: Exception, processes: list[BaseProcess]) -> None:
    """Return if nothing is wrong but that nothing has come yet.

    Raises:
        InputError: naming the process that has ended, or what is used up.
    """
    refuse_exhaustion(error)
    if not isinstance(error, RuntimeError):  # a connection that broke: it takes a moment to end
        time.sleep(_REASON)
    dead = [(number, child) for number, child in enumerate(processes) if not child.is_alive()]
    if dead:
        number, child = dead[0]
        raise InputError(
            f"loader process {number + 1} of {len(processes)} (pid {child.pid}) {_end_of(child)}; "
            f"have fewer of them, or read in one process with {_ALONE}"
        ) from None
    words = str(error)
    if "Too many open files" in words or "ancdata" in words:
        raise InputError(
            "too many files are open; allow more with `ulimit -n 65536`, or have fewer loader "
            "processes (--data.workers)"
        ) from None
    if not (isinstance(error, RuntimeError) and "timed out" in words):
        raise error


def _end_of(child: BaseProcess) -> str:
    """How a process ended, in words."""
    code = child.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = {
            "SIGKILL": ", as by a machine that runs out of memory",
            "SIGBUS": f", as where {SHARED_MEMORY} is full",
        }
        return f"was ended by {name}{hint.get(name, '')}"
    return f"was ended by signal {-code}"


def _named(processes: list[BaseProcess]) -> str:
    pids = ", ".join(str(child.pid) for child in processes[:4])
    more = ", ..." if len(processes) > 4 else ""
    return f"the loader processes ({len(processes)}, pid {pids}{more})"


# ------------------------------------------------------------------------------------------------
# in a loader process

_UNSHARED = "why this came through a pipe"
_DESCRIPTORS = 64
"""Files that a process must still be allowed to open to hand tensors over in shared memory."""


class _Begin:
    """What a loader process does first."""

    def __init__(self) -> None:
        self._parent = os.getpid()

    def __call__(self, number: int) -> None:
        """Leave signals to the parent, end with it, and end where nothing can be handed over."""
        del number
        for sent in (signal.SIGINT, signal.SIGTERM):
            # not SIG_IGN, which commands that are started would inherit
            signal.signal(sent, _leave_to_the_parent)
        threading.Thread(target=self._watch, daemon=True).start()
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
            _cannot_hand_over
        )

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1)
        os._exit(1)


def _leave_to_the_parent(number: int, frame: Any) -> None:
    del number, frame


def _cannot_hand_over(error: Exception, item: Any) -> None:
    """The item is lost, and the parent would wait for it for ever."""
    del item
    sys.stderr.write(f"a loader process cannot hand its data over ({reason_of(error)})\n")
    sys.stderr.flush()
    os._exit(1)


class _Guarded(Dataset[dict[str, Any]]):
    """Hands a user's mistake found in a loader process over as a value.

    The loader would wrap it into an exception whose message holds a whole stack trace.
    """

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self._dataset = dataset

    def __getitem__(self, item: Any) -> dict[str, Any]:
        return _guarded(lambda: self._dataset[item])


class _GuardedRow(IterableDataset[dict[str, Any]]):
    """The same of a data set that can only be read in its order."""

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self._dataset: Any = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._dataset)
        while "mistake" not in (fields := _guarded(lambda: next(rows, {_END: True}))):
            if _END in fields:
                return
            yield fields
        yield fields


_END = "the end"


def _guarded(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is read, ready to be handed over; or a mistake."""
    try:
        try:
            fields = read()
        except OSError as error:
            refuse_exhaustion(error)
            raise
    except InputError as error:
        return {"mistake": str(error)}
    worker = get_worker_info()
    return fields if worker is None else _handed_over(fields, worker.num_workers)


def _handed_over(fields: dict[str, Any], workers: int) -> dict[str, Any]:
    """Fields with their tensors in shared memory, or as arrays where that has no room for them.

    Arrays go through a pipe, which is slower. Beyond its room, shared memory ends the process or
    loses what it was to hold.
    """
    if not (reason := _no_sharing(fields, workers)):
        try:
            return _mapped(fields, _in_shared_memory)
        except (RuntimeError, OSError) as error:
            reason = reason_of(error)
    return _mapped(fields, _as_array) | {_UNSHARED: reason}


def _no_sharing(fields: dict[str, Any], workers: int) -> str:
    """Why fields cannot go through shared memory; usually nothing."""
    sizes: list[int] = []
    _mapped(fields, lambda value: sizes.append(value.nbytes) if _is_tensor(value) else None)
    # every loader process of this machine may write at this moment
    claims = workers * max(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)
    if (free := _free_shared_memory()) < claims * sum(sizes):
        return (
            f"{SHARED_MEMORY} has {size_words(free)} free, too little for batches of "
            f"{size_words(sum(sizes))}; give it more (docker run --shm-size=8g)"
        )
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if len(list(Path("/proc/self/fd").iterdir())) + _DESCRIPTORS > most:
        return f"no more than {most} files may be open; allow more with `ulimit -n 65536`"
    return ""


def _in_shared_memory(value: Any) -> Any:
    return value.share_memory_() if _is_tensor(value) else value


def _as_array(value: Any) -> Any:
    return value.numpy() if _is_tensor(value) else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _mapped(fields: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Fields with their values changed, those of lists one by one."""
    return {
        name: [change(item) for item in value] if isinstance(value, list) else change(value)
        for name, value in fields.items()
    }


def _free_shared_memory() -> int:
    """Bytes; 0 where there is no shared memory."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _warn_of_pipes(reason: str, workers: int) -> bool:
    logging.getLogger("frugal").warning(
        "the %d loader processes hand their data over through pipes, which is slower: %s, or read "
        "in one process with %s",
        workers,
        reason,
        _ALONE,
    )
    return True
