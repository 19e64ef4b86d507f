"""The engine on Accelerate: one process, DDP, FSDP2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from typing_extensions import override

from frugal.common.contracts import Objective
from frugal.common.engine.engine import Engine, GradientPart, check_world_size, fresh_moments
from frugal.common.errors import InputError
from frugal.common.optim.optimizers import set_learning_rate, skip_unless_finite
from frugal.common.recipe import Recipe
from frugal.common.run import Run


class AccelerateEngine(Engine):
    """``accelerate.Accelerator`` around the objective; precision and scaling stay ours."""

    def __init__(self, objective: Objective, recipe: Recipe, run: Run) -> None:
        super().__init__(objective, run, recipe)
        on_cpu = run.device.type == "cpu"
        # without cpu=True Accelerate ignores the launcher's ranks on a machine without GPU
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        check_world_size(self._accelerator.num_processes, "Accelerate")
        objective.to(run.device)
        self._clip_norm = recipe.optimizer.clip_norm
        self._optimizer = recipe.optimizer.build(objective)
        moments = self._moments_of_groups(self._optimizer)
        self._wrapped, prepared = self._accelerator.prepare(objective, self._optimizer)
        self._optimizer = prepared.optimizer
        for group, kinds in zip(self._optimizer.param_groups, moments, strict=True):
            for parameter in group["params"]:
                self._optimizer.state[parameter] = fresh_moments(parameter, kinds)
        self.objective = self._accelerator.unwrap_model(self._wrapped)
        self.name = _name(self._accelerator)
        if recipe.engine.virtual_processes is not None and self._sharded():
            raise InputError(
                "engine.virtual_processes adds whole gradients in order, but FSDP leaves each "
                "process a part of every weight; leave FSDP or engine.virtual_processes out"
            )

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    @override
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        # until the last backward gradients stay on this process
        return contextlib.nullcontext() if last else self._accelerator.no_sync(self._wrapped)

    @override
    def backward(self, loss: Tensor) -> None:
        self.scaled(loss).backward()

    @override
    def gradient_parts(self) -> Iterator[GradientPart]:
        if not any(isinstance(parameter, DTensor) for _, parameter in self.trainable()):
            yield from self._shared_gradients()
            return
        for number, (_, parameter) in enumerate(self.trainable()):
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                _, offset = compute_local_shape_and_global_offset(
                    gradient.shape, gradient.device_mesh, gradient.placements
                )
                # FSDP2 cuts the first dimension
                row = gradient.numel() // max(len(gradient), 1) if gradient.ndim else 1
                yield GradientPart(number, offset[0] * row, gradient.to_local())

    @override
    def _step(self, learning_rate: float) -> Tensor:
        parameters = [p for _, p in self.trainable() if p.grad is not None]
        if self._scale is not None:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(self._scale.scale)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        set_learning_rate(self._optimizer, learning_rate)
        skip_unless_finite(self._optimizer, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _tensor(self, kind: str, parameter: nn.Parameter) -> Tensor:
        if kind == "weight":
            return parameter.detach()
        return self._optimizer.state[parameter][kind]

    @override
    def read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        tensor = self._tensor(kind, parameter)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @override
    def write(self, kind: str, parameter: nn.Parameter, value: Tensor) -> None:
        target = self._tensor(kind, parameter)
        value = value.to(target.device)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        with torch.no_grad():
            target.copy_(value)

    @override
    def moments(self) -> Iterable[dict[str, Tensor]]:
        return self._optimizer.state.values()

    def _sharded(self) -> list[FSDPModule]:
        return [m for m in self.objective.modules() if isinstance(m, FSDPModule)]

    @override
    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        sharded = self._sharded()
        for module in sharded:
            module.unshard()
        yield
        for module in sharded:
            module.reshard()


def _name(accelerator: Accelerator) -> str:
    kind = str(accelerator.distributed_type.value).lower()
    return "accelerate" if kind == "no" else f"accelerate {kind.removeprefix('multi_')}"
