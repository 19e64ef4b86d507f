"""Steps of virtual processes: the same bits on any number of processes.

With ``engine.virtual_processes`` V every step is that of V processes, whatever the number W of
those there are: each computes V / W of them, and gradients and metrics are added in the order of
the virtual processes. The idea is published as EasyScale (Li et al., SC'23).

In a step a virtual process has all that a process has of its own: a place among V, samples, random
states, buffers and a gradient. A thread computes for each, of which one runs at a time: until it
asks the others for something, or is done; then the next one has its turn. So whatever talks to
other processes by :mod:`frugal.common.distributed`, such as losses that compare samples and batch
norm, knows nothing of this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from frugal.common.contracts import Batch, Objective
from frugal.common.distributed import (
    broadcast,
    chained_sum,
    gather,
    in_place_of,
    mean_over_processes,
    place_in_world,
)
from frugal.common.engine.engine import Engine
from frugal.common.engine.watchdog import COMPUTING_THREAD
from frugal.common.randomness import random_states, seed_step, set_random_states
from frugal.common.recipe import Recipe

ResultT = TypeVar("ResultT")
_PIECE = 2**20
"""Numbers of a gradient that processes hand on at a time."""


class VirtualTrainer:
    """What an engine is to forward and backward passes, for one virtual process in one step."""

    def __init__(self, engine: Engine) -> None:
        self.objective = engine.objective
        self._engine = engine
        self._parameters = [parameter for _, parameter in engine.trainable()]
        self.gradients: list[Tensor | None] = [None] * len(self._parameters)
        """Of the trainable parameters, in their order; None where the loss does not know one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the objective; what wraps it would exchange gradients in an order of its own."""
        return self.objective(*args, **kwargs)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing: gradients are exchanged behind the last backward pass."""
        del last
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of this virtual process."""
        loss = self._engine.scaled(loss)
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for place, gradient in enumerate(found):
            before = self.gradients[place]
            if gradient is not None:
                # not in place: autograd may give one tensor as the gradient of two parameters
                self.gradients[place] = gradient if before is None else before + gradient

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the virtual processes of a small float tensor."""
        return mean_over_processes(values)


def step_of_virtual_processes(
    engine: Engine,
    recipe: Recipe,
    step: int,
    batches: Sequence[Batch],
    compute: Callable[[VirtualTrainer, Sequence[Batch]], ResultT],
) -> ResultT:
    """Leave the mean gradient of all virtual processes in an engine; every process calls this.

    Args:
        engine: around the objective.
        recipe: of the run.
        step: steps that were done before.
        batches: of this process; of every micro-batch those of its virtual processes in order.
        compute: forward and backward of the micro-batches of one virtual process; its result is
            the same for all of them.

    Returns:
        What ``compute`` gives.
    """
    rank, world_size = place_in_world()
    count = recipe.virtual_per_process(world_size)
    trainers = [VirtualTrainer(engine) for _ in range(count)]
    buffers = _copies_of_buffers(engine.objective, count)
    before = random_states(engine.run.device)
    turns = []
    for place, trainer in enumerate(trainers):
        number = rank * count + place
        # as in a process of its own: what is resumed drops out what it would have dropped out
        seed_step(recipe.run.seed, step, number)
        turn = _Turn(
            partial(compute, trainer, batches[place::count]),
            place=(number, world_size * count),
            own=_Own(engine.objective, buffers[place], engine.run.device),
        )
        turns.append(turn)
    _take_turns(turns)
    # as DDP has it: the statistics that the first process saw are those of all
    turns[0].own.enter()
    for buffer in engine.objective.buffers():
        broadcast(buffer, source=0)
    set_random_states(engine.run.device, before)
    engine.set_gradients(_mean_in_order([trainer.gradients for trainer in trainers]))
    return turns[0].result


def _mean_in_order(gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The mean over all virtual processes of the gradients of this one's, (V / W, parameters)."""
    world_size = place_in_world()[1]
    flat = [torch.cat([g.flatten() for g in row if g is not None]) for row in gradients]
    pieces = list(zip(*(row.split(_PIECE) for row in flat), strict=True))
    # piece by piece: while the next process adds one, this one adds the one behind it
    totals = [chained_sum(rows) for rows in pieces]
    for total in totals:
        broadcast(total, source=world_size - 1)
    numbers = iter(torch.cat(totals).div_(world_size * len(gradients)).split(_sizes(gradients[0])))
    return [None if g is None else next(numbers).view_as(g) for g in gradients[0]]


def _sizes(gradients: Sequence[Tensor | None]) -> list[int]:
    return [gradient.numel() for gradient in gradients if gradient is not None]


def _copies_of_buffers(objective: Objective, count: int) -> list[dict[int, Tensor]]:
    """For each of some virtual processes its buffers, by the identity of those that are there.

    The first one has these themselves.
    """
    there = {id(buffer): buffer for buffer in objective.buffers()}
    copies = [{key: buffer.clone() for key, buffer in there.items()} for _ in range(1, count)]
    return [there, *copies]


class _Own:
    """Random states and buffers of a virtual process, while another one has its turn."""

    def __init__(
        self, objective: Objective, buffers: dict[int, Tensor], device: torch.device
    ) -> None:
        self._device = device
        self._random = random_states(device)
        self._buffers = [
            (module, name, buffers[id(buffer)])
            for module in objective.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def enter(self) -> None:
        """Give this process what is this virtual one's."""
        set_random_states(self._device, self._random)
        for module, name, buffer in self._buffers:
            # another tensor rather than other numbers in it: a backward pass may still need those
            module._buffers[name] = buffer

    def leave(self) -> None:
        """Remember what this process has now."""
        self._random = random_states(self._device)
        self._buffers = [(m, n, m.get_buffer(n)) for m, n, _ in self._buffers]


class _AbandonedError(BaseException):
    """Ends a thread whose step has failed elsewhere."""


class _Turn(threading.Thread, Generic[ResultT]):
    """The thread of a virtual process, which computes while it has its turn."""

    result: ResultT

    def __init__(
        self, compute: Callable[[], ResultT], *, place: tuple[int, int], own: _Own
    ) -> None:
        super().__init__(daemon=True, name=f"{COMPUTING_THREAD} {place[0]}")
        self.rank, self.world_size = place
        self.own = own
        self.given: Tensor | None = None
        """What the others are to know, where this turn ended with a question to them."""
        self.received: Tensor | None = None
        self._compute = compute
        self._error: BaseException | None = None
        self._may_run, self._has_run = threading.Semaphore(0), threading.Semaphore(0)
        self._is_abandoned = False
        self._device = own._device

    def run(self) -> None:
        """Compute, from the first turn on."""
        self._may_run.acquire()
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of each thread
            # on a GPU too this thread goes backward itself: it may have to ask the others
            with in_place_of(self), torch.autograd.set_multithreading_enabled(False):
                self.result = self._compute()
        except BaseException as error:  # noqa: BLE001 - raised where the turn was given
            self._error = error
        self._has_run.release()

    def take(self) -> None:
        """Have the thread compute until it asks the others something, or is done."""
        self.own.enter()
        if not self.is_alive():
            self.start()
        self._may_run.release()
        self._has_run.acquire()
        self.own.leave()
        if self._error is not None:
            raise self._error

    def exchange(self, local: Tensor) -> Tensor:
        """(V, ...): what every virtual process gives, in order; called by the thread."""
        self.given = local
        self._has_run.release()
        self._may_run.acquire()
        if self._is_abandoned:
            raise _AbandonedError
        assert self.received is not None
        received, self.received = self.received, None
        return received

    def abandon(self) -> None:
        """End the thread."""
        self._is_abandoned = True
        self._may_run.release()


def _take_turns(turns: Sequence[_Turn[Any]]) -> None:
    """Give every thread its turn until all are done."""
    try:
        while True:
            for turn in turns:
                turn.take()
            given = [turn.given for turn in turns if turn.given is not None]
            if not given:
                return
            assert len(given) == len(turns), "virtual processes are out of step"
            with torch.no_grad():
                everything = gather(torch.stack(given))
            for turn in turns:
                turn.given = None
                turn.received = everything.clone()  # each may write into what it has
    except BaseException:
        for turn in turns:
            turn.abandon()
        raise
