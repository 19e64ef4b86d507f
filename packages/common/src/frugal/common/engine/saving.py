"""Weights, moments and averages of a run to and from a checkpoint, by name, over any engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from frugal.common.checkpoint.store import Checkpoint, owners
from frugal.common.distributed import broadcast
from frugal.common.engine.engine import Engine
from frugal.common.errors import InputError


class WeightAverage:
    """Exponential moving average of the weights, spread over the processes by name.

    Each process keeps the averages of the parameters that it also writes to checkpoints, so the
    whole average exists once however many processes there are.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        owner = ownership(engine)
        self.owned: dict[str, Tensor] = {}
        for name, parameter in engine.trainable():
            whole = engine.read("weight", parameter)
            if owner[name] == engine.run.rank:
                self.owned[name] = whole.detach().clone()

    def update(self, stepped: Tensor) -> None:
        """Move the averages towards the weights; every process calls this after a step.

        ``stepped``, (), is False on the device where the step was skipped.
        """
        share = torch.where(stepped, 1.0 - self.decay, 0.0)
        for name, parameter in self._engine.trainable():
            whole = self._engine.read("weight", parameter)
            if name in self.owned:
                # times nothing, a weight that is not finite would still spoil its average
                owned = self.owned[name]
                owned.lerp_(torch.where(stepped.to(whole.device), whole, owned), share.to(whole))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the model computes with the averages; its weights must be whole then."""
        owner = ownership(self._engine)
        kept = {}
        with torch.no_grad():
            for name, parameter in self._engine.trainable():
                kept[name] = parameter.clone()
                if name in self.owned:
                    parameter.copy_(self.owned[name])
                broadcast(parameter.data, source=owner[name])
            yield
            for name, parameter in self._engine.trainable():
                parameter.copy_(kept[name])


def ownership(engine: Engine) -> dict[str, int]:
    """Which process keeps and writes which trainable parameter."""
    sizes = (
        (name, engine.whole_shape(parameter).numel()) for name, parameter in engine.trainable()
    )
    return owners(sizes, engine.run.world_size)


def layout(engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    """Tensors of the types and shapes of this process's share of a checkpoint, by ``kind/name``."""
    owner = ownership(engine)
    found: dict[str, Tensor] = {}
    for name, parameter in engine.trainable():
        if owner[name] == engine.run.rank:
            like = torch.empty(engine.whole_shape(parameter), dtype=torch.float32, device="meta")
            found |= {f"{kind}/{name}": like for kind in engine.state_kinds(name)}
    for name, tensor in (average.owned if average else {}).items():
        found[f"ema/{name}"] = tensor
    if engine.run.is_main:
        for name, parameter in engine.frozen():
            shape = engine.whole_shape(parameter)
            found[f"buffer/{name}"] = torch.empty(shape, dtype=parameter.dtype, device="meta")
        for name, buffer in _persistent_buffers(engine):
            found[f"buffer/{name}"] = buffer
    return found


@torch.no_grad()
def collect(engine: Engine, average: WeightAverage | None, into: Mapping[str, Tensor]) -> None:
    """Copy this process's share of a checkpoint; every process must call this.

    Args:
        engine: whose weights and moments are copied, as float32.
        average: of the weights, where the run keeps one.
        into: CPU tensors as :func:`layout` has them.
    """

    def keep(name: str, tensor: Tensor) -> None:
        if name in into:
            assert into[name].shape == tensor.shape, name
            into[name].copy_(tensor)

    for name, parameter in engine.trainable():
        for kind in engine.state_kinds(name):
            keep(f"{kind}/{name}", engine.read(kind, parameter))  # every process takes part
    for name, tensor in (average.owned if average else {}).items():
        keep(f"ema/{name}", tensor)
    for name, parameter in engine.frozen():
        keep(f"buffer/{name}", engine.read("weight", parameter))
    for name, buffer in _persistent_buffers(engine):
        keep(f"buffer/{name}", buffer)


def _persistent_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    saved = engine.objective.state_dict(keep_vars=True).keys()
    return [(n, b) for n, b in engine.objective.named_buffers() if n in saved]


def check_names(checkpoint: Checkpoint, engine: Engine) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        InputError: naming the first tensor that is missing, unexpected or of another shape.
    """
    shapes = {f"weight/{name}": engine.whole_shape(p) for name, p in engine.trainable()}
    found = {name for name in checkpoint.names() if name.startswith("weight/")}
    if odd := sorted(found ^ shapes.keys()):
        where = "has no" if odd[0] in shapes else "has an unexpected"
        raise InputError(
            f"the checkpoint {checkpoint.folder} {where} {odd[0]}: it is of another architecture "
            "than the recipe's model"
        )
    read = checkpoint.reader()
    for name, shape in shapes.items():
        if (saved := read(name).shape) != shape:
            raise InputError(
                f"the checkpoint {checkpoint.folder} holds {name} of shape {tuple(saved)}, the "
                f"recipe's model needs {tuple(shape)}: it is of another architecture"
            )


def restore(engine: Engine, checkpoint: Checkpoint, average: WeightAverage | None) -> None:
    """Put a checkpoint back into an engine, whatever wrote it."""
    checkpoint.refuse_to_continue()
    check_names(checkpoint, engine)
    read = checkpoint.reader()
    engine.set_updates(checkpoint.state["updates"])
    engine.load_scale_state(checkpoint.state["loss_scale"])
    for name, parameter in engine.trainable():
        for kind in engine.state_kinds(name):
            engine.write(kind, parameter, read(f"{kind}/{name}"))
    for name, owned in (average.owned if average else {}).items():
        owned.copy_(read(f"ema/{name}"))
    for name, parameter in engine.frozen():
        engine.write("weight", parameter, read(f"buffer/{name}"))
    for name, buffer in _persistent_buffers(engine):
        buffer.copy_(read(f"buffer/{name}"))
