"""What the training loop asks of an engine, and what both engines share.

An engine owns devices, ranks, precision, backward, clipping, stepping and the reading and
writing of weights and optimizer moments by parameter name. It knows nothing of data or files.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frugal.common.contracts import Objective
from frugal.common.distributed import launcher_ranks, leave_process_group, mean_over_processes
from frugal.common.errors import InputError
from frugal.common.recipe import EngineOptions, Recipe
from frugal.common.run import Run


@dataclass(frozen=True)
class GradientPart:
    """A part of the gradient of one parameter, on this process."""

    parameter: int
    """Its place in :meth:`Engine.trainable`."""
    start: int
    """Place of the first element in the flat parameter."""
    values: Tensor
    """float32 of any shape."""


class Engine(ABC):
    """One process's handle on the model that all processes train together."""

    name: str
    """For the log and the report: ``deepspeed zero2``, ``accelerate``."""

    def __init__(self, objective: Objective, run: Run, recipe: Recipe) -> None:
        self.objective = objective
        prepare_towers(objective, recipe.engine)
        self.run = run
        self._moments = recipe.optimizer.moments_of(objective)
        self.dtype = compute_dtype(recipe.engine.precision, run.device)
        if self.dtype != torch.float32:
            # inside the module, so that every wrapper around it computes alike
            autocast = torch.autocast(run.device.type, self.dtype)
            objective.forward = autocast(objective.forward)  # type: ignore[method-assign]
        check_accelerate_environment(self.dtype)
        self._scale = LossScale(run.device) if self.dtype == torch.float16 else None
        self._updates = torch.zeros((), dtype=torch.int64, device=run.device)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the objective through whatever wraps it."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward; ``last`` marks the one before the step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss as it goes backward: times the loss scale of float16 training."""
        return loss if self._scale is None else loss * self._scale.scale

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Give every trainable parameter, in their order, the gradient of the next step.

        They are whole and the same on every process, as of ``engine.virtual_processes``.
        """
        for (_, parameter), gradient in zip(self.trainable(), gradients, strict=True):
            parameter.grad = gradient

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update and clear the gradients; nothing is read on the host.

        Returns:
            (): the norm of the whole gradient before clipping, on every process alike. If it is
            not finite the step was skipped: weights, moments and their counters are as before.
        """
        norm = self._step(learning_rate).to(self.run.device)
        is_finite = norm.isfinite()
        self._updates += is_finite
        if self._scale is not None:
            self._scale.update(is_finite)
        return norm

    @abstractmethod
    def _step(self, learning_rate: float) -> Tensor:
        """The same without what both engines count."""

    @abstractmethod
    def gradient_parts(self) -> Iterator[GradientPart]:
        """The summed gradient, between the last :meth:`backward` and :meth:`step`.

        Over all processes every element comes once, and on each of them a parameter once at most.
        Under float16 the loss scale is still in it.
        """

    def _shared_gradients(self) -> Iterator[GradientPart]:
        """The same where every process holds all of it: each gives some whole parameters."""
        sizes = [parameter.numel() for _, parameter in self.trainable()]
        total, before = max(sum(sizes), 1), 0
        for number, (_, parameter) in enumerate(self.trainable()):
            if (
                before * self.run.world_size // total == self.run.rank
                and parameter.grad is not None
            ):
                yield GradientPart(number, 0, parameter.grad)
            before += sizes[number]

    def state_kinds(self, name: str) -> tuple[str, ...]:
        """What a checkpoint holds of a trainable parameter."""
        return ("weight", *self._moments[name])

    def _moments_of_groups(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
        """What each group of the optimizer keeps; to be asked before anything wraps it."""
        names = {parameter: name for name, parameter in self.trainable()}
        return [self._moments[names[group["params"][0]]] for group in optimizer.param_groups]

    @abstractmethod
    def read(self, kind: str, parameter: nn.Parameter) -> Tensor:
        """The whole float32 tensor of one of :meth:`state_kinds`; every process must call it.

        Of a frozen parameter there are only weights, in their own dtype.
        """

    @abstractmethod
    def write(self, kind: str, parameter: nn.Parameter, value: Tensor) -> None:
        """The inverse of :meth:`read`; every process must call it with the same value."""

    @abstractmethod
    def moments(self) -> Iterable[dict[str, Tensor]]:
        """The optimizer's own state of each of its tensors, on this process."""

    @abstractmethod
    def whole_weights(self) -> AbstractContextManager[None]:
        """While open, ``objective`` holds all its weights on this process (for evaluation)."""

    @property
    def updates(self) -> int:
        """Optimizer steps applied so far, Adam's step counter; waits for the device."""
        return int(self._updates)

    def set_updates(self, updates: int) -> None:
        """Continue Adam's counting after ``updates`` steps."""
        self._updates.fill_(updates)
        for state in self.moments():
            state["step"].fill_(updates)

    def scale_state(self) -> dict[str, float]:
        """The loss scale of float16 training, for the checkpoint; waits for the device."""
        return {} if self._scale is None else self._scale.state()

    def load_scale_state(self, state: dict[str, float]) -> None:
        """The inverse of :meth:`scale_state`."""
        if self._scale is not None:
            self._scale.load(state)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters by name, in the same order on every process."""
        return ((n, p) for n, p in self.objective.named_parameters() if p.requires_grad)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The other parameters by name, in the same order on every process."""
        return ((n, p) for n, p in self.objective.named_parameters() if not p.requires_grad)

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of a parameter of which this process may hold a part."""
        return parameter.shape

    def clamp(self, bounds: dict[str, tuple[float, float]], *, stepped: Tensor) -> None:
        """Keep named parameters within bounds, in the master weights too.

        ``stepped``, (), is False on the device where nothing is to change.
        """
        for name, (low, high) in bounds.items():
            parameter = self.objective.get_parameter(name)
            weight = self.read("weight", parameter)
            clamped = weight.clamp(low, high).where(stepped.to(weight.device), weight)
            self.write("weight", parameter, clamped)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of a small float tensor."""
        return mean_over_processes(values)

    def close(self) -> None:
        """Leave the process group; DeepSpeed ends badly without it."""
        leave_process_group()


def prepare_towers(objective: Objective, options: EngineOptions) -> None:
    """Compile the towers of an objective, and have them recompute activations, as a recipe says."""
    for tower in objective.towers():
        tower.checkpoint_activations = options.checkpoint_activations
        if options.compile:
            tower.compile()


def fresh_moments(tensor: Tensor, moments: Sequence[str]) -> dict[str, Tensor]:
    """An optimizer's state of a tensor before its first step, with Adam's counter.

    Made at the start rather than at the first step, so that a checkpoint can be read into it;
    DeepSpeed 0.19.8 also fails to link states that appear at the first step of several groups.
    """
    return {
        # a fused kernel wants its counter on the tensor's device
        "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
        **{kind: torch.zeros_like(tensor) for kind in moments},
    }


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products that a recipe's precision means on a device."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """True if the processor multiplies bfloat16 matrices itself (AVX512-BF16, AMX, Arm BF16)."""
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123 - a file of the kernel, not a path
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def check_world_size(seen: int, engine: str) -> None:
    """Stop where processes that a launcher started would train apart without noticing.

    Raises:
        InputError: if the launcher announced another number of processes than the engine sees.
    """
    announced = launcher_ranks().world_size
    if seen != announced:
        raise InputError(
            f"the launcher announced {announced} processes but {engine} sees {seen}, so they would "
            "train apart from each other; on CPU start them with torchrun or deepspeed"
        )


def check_accelerate_environment(dtype: torch.dtype) -> None:
    """Refuse what ``accelerate launch`` was configured for and the recipe decides.

    Accelerate reads its configuration from the environment, where it would act, or be ignored,
    without a word.

    Raises:
        InputError: naming the setting and the flag that stands for it.
    """
    given = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in _DECIDED}
    precision = _PRECISIONS.get(given.pop("MIXED_PRECISION"), dtype)
    if precision != dtype:
        raise InputError(
            "accelerate is configured for mixed_precision="
            f"{os.environ['ACCELERATE_MIXED_PRECISION']}, but engine.precision decides and makes "
            f"it {str(dtype).removeprefix('torch.')}; make them agree"
        )
    for name, value in given.items():
        if value not in ("", "no", "0", "false", "1" if name.endswith("STEPS") else ""):
            raise InputError(
                f"accelerate is configured with ACCELERATE_{name}={value}, which the recipe "
                f"decides; leave it out of accelerate's configuration and use {_DECIDED[name]}"
            )


_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
_DECIDED = {
    "MIXED_PRECISION": "--engine.precision",
    "DYNAMO_BACKEND": "--engine.compile",
    "GRADIENT_ACCUMULATION_STEPS": "--engine.accumulate",
    "USE_DEEPSPEED": "--engine.deepspeed-config",
    "USE_MEGATRON_LM": "--engine.deepspeed-config",
}
"""Variables of Accelerate without their prefix, and the flags that do the same."""


class LossScale:
    """Dynamic loss scaling for float16: halve on overflow, double after a quiet while.

    The rule and its numbers are those of torch.amp.GradScaler (Micikevicius et al., 2018). The
    scale stays on the device, where it is decided whether a step can be taken.
    """

    growth_interval = 2000

    def __init__(self, device: torch.device, initial: float = 2.0**16) -> None:
        self.scale = torch.full((), initial, device=device)
        self._quiet_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, is_finite: Tensor) -> None:
        """Adapt the scale after a step whose gradient was finite, (), or not."""
        quiet = torch.where(is_finite, self._quiet_steps + 1, 0)
        grows = quiet == self.growth_interval
        larger = torch.where(grows, 2 * self.scale, self.scale)
        self.scale = torch.where(is_finite, larger, (self.scale / 2).clamp(min=1.0))
        self._quiet_steps = quiet.masked_fill(grows, 0)

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"scale": self.scale.item(), "quiet_steps": self._quiet_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """The inverse of :meth:`state`."""
        if state:
            self.scale = torch.full_like(self.scale, state["scale"])
            self._quiet_steps = torch.full_like(self._quiet_steps, int(state["quiet_steps"]))
