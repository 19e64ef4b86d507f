"""A CUDA device that computes nothing: what would go wrong on a GPU is found without one.

Tensors are torch's fake ones: they have shapes, dtypes and a device, and no numbers. Every
operation of forward, backward and optimizer step is asked for as it would be on a GPU, kernels of
xformers included, and answered with a shape. What the host would wait for on a GPU is an
AssertionError, and so are tensors that lie on different devices.

What a fake device cannot tell: numbers, speed, memory, and what happens inside a kernel.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from frugal.common.contracts import Batch
from frugal.common.models import attention
from frugal.common.models.layout import Packed
from frugal.common.reduction.image import KeptPatches
from host_reads import ATEN, NoReadingOperation

CUDA = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""Of an H100 or H200."""
_COPIES = (ATEN._to_copy, ATEN.copy_, ATEN.copy)
_DEVICE_OF = torch.ops.prim.device.default


class _Event:
    """Of a stream of a device on which nothing takes time."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""

    def elapsed_time(self, later: _Event) -> float:
        """Milliseconds."""
        del later
        return 1.0


class _Watch(NoReadingOperation):
    """What torch asks of the device, operation by operation."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _DEVICE_OF:
            # Only torch's own code asks this way: to it the tensors are on the device "meta", for
            # which it needs no driver. So autograd, which would ask for a stream, can go backward.
            return torch.device("meta") if _is_here(args[0]) else args[0].device
        for listener in self._gpu.listeners:
            listener(func, args)
        if kwargs.get("device") == torch.device("meta"):
            kwargs |= {"device": CUDA}  # which such code then asks for more tensors on
        if func.overloadpacket is ATEN.upsample_bilinear2d:
            # what torch makes its fake of asks the driver
            size = args[1] or [
                round(s * f) for s, f in zip(args[0].shape[2:], args[3], strict=True)
            ]
            return args[0].new_empty((*args[0].shape[:2], *size))
        if not self._gpu.is_watched:
            return self._gpu.answer(func, args, kwargs)
        devices = {each.device.type for each in _tensors(args, kwargs) if each.ndim}
        onto = kwargs.get("device")
        if func.overloadpacket in _COPIES and not self._gpu.is_pinned_copy(func, args, kwargs):
            found = {each.device.type for each in _tensors(args, kwargs)}
            found |= {torch.device(onto).type} if onto is not None else set()
            assert len(found) < 2, f"{func} between {' and '.join(sorted(found))}: the host waits"
        assert "meta" not in devices, f"{func} takes numbers of the host, whose copy it waits for"
        assert len(devices) < 2, f"{func} has tensors on {' and '.join(sorted(devices))}"
        if not any(_is_here(each) for each in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Declared(TorchFunctionMode):
    """Answers the two reads that packed tokens declare, as there are no numbers to answer with.

    Pinned memory, which needs a driver, is remembered instead of asked for.
    """

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_declared = sys._getframe(1).f_code is KeptPatches.where.__func__.__code__
        if func is Tensor.nonzero and is_declared:
            return self._gpu.kept(args[0])
        if (kwargs or {}).get("pin_memory"):
            pinned = func(*args, **(kwargs | {"pin_memory": False}))
            self._gpu.pinned[pinned] = True
            return pinned
        if func is Tensor.new_tensor and _is_here(args[0]):
            return torch.tensor(args[1], dtype=args[0].dtype).to(CUDA)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            # made on the CPU and copied, as torch does it behind a call to the driver
            device = (kwargs or {}).get("device") or "cpu"
            return func(*args, **((kwargs or {}) | {"device": "cpu"})).to(device)
        if func is Tensor.numpy and not self._gpu.is_watched:
            kind = str(args[0].dtype).removeprefix("torch.")
            return np.ones(tuple(args[0].shape), kind)
        return func(*args, **(kwargs or {}))


class FakeCuda:
    """A GPU without one; opened by :func:`fake_cuda`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.is_watched = False
        self.declared: Counter[str] = Counter()
        """The reads that packed tokens declare, by who made them."""
        self.listeners: list[Callable[[Any, Any], None]] = []
        """Called with every operation and its arguments."""
        self.waits = 0
        """How often the device was waited for as a whole."""
        self.pinned = WeakTensorKeyDictionary()
        self._kept: list[int] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While open, what the host would wait for is an AssertionError."""
        before, self.is_watched = self.is_watched, True
        try:
            yield
        finally:
            self.is_watched = before

    def put(self, value: Tensor) -> Tensor:
        """A tensor of the CPU as one of this device."""
        before, self.is_watched = self.is_watched, False
        with torch.no_grad():
            moved = self.mode.from_tensor(value).to(CUDA)
        self.is_watched = before
        return moved

    def put_batch(self, batch: Batch) -> Batch:
        """A batch on this device."""
        parts = {name: self.put(v) for name, v in vars(batch).items() if isinstance(v, Tensor)}
        return replace(batch, **parts)

    def put_module(self, module: nn.Module) -> nn.Module:
        """Move a module here, in place."""
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None and not _is_here(value):
                    part._parameters[name] = nn.Parameter(
                        self.put(value), requires_grad=value.requires_grad
                    )
            for name, value in part._buffers.items():
                if value is not None and not _is_here(value):
                    part._buffers[name] = self.put(value)
        return module

    def is_pinned_copy(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a copy to the device goes on beside the host."""
        source = args[1] if func.overloadpacket is ATEN.copy_ else args[0]
        return source in self.pinned and bool(kwargs.get("non_blocking"))

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Where nothing is watched: numbers are ones, and the device may be waited for."""
        if func.overloadpacket is ATEN._local_scalar_dense:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        return func(*args, **kwargs)

    def kept(self, mask: Tensor) -> Tensor:
        """Which patches stay of (B, N): of the images in turn 1, 2, 3, ... of them."""
        self.declared["KeptPatches.where"] += 1
        self._kept = [1 + number % mask.shape[1] for number in range(len(mask))]
        return torch.zeros(sum(self._kept), 2, dtype=torch.long, device=mask.device)

    def lengths(self, lengths: Tensor) -> list[int]:
        """Of images that were masked and have a class token; or of captions: 1, 2, 3, 1, ..."""
        self.declared["Packed.of"] += 1
        kept, self._kept = self._kept, None
        if kept is not None:
            return [count + 1 for count in kept]
        return [1 + number % 3 for number in range(len(lengths))]


def _is_here(tensor: Tensor) -> bool:
    """Whether a tensor is on the fake device; ``is_cuda`` asks as torch's own code does."""
    return tensor.device.type == CUDA.type


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))


@contextlib.contextmanager
def fake_cuda(*, xformers: bool = True) -> Iterator[FakeCuda]:
    """A process with a GPU that computes nothing; nothing is watched yet.

    Args:
        xformers: whether its kernels are there.
    """
    cpu_states = torch.get_rng_state()
    with contextlib.ExitStack() as stack:

        def patch(name: str, value: Any) -> None:
            stack.enter_context(mock.patch(name, value))

        gpu = FakeCuda(FakeTensorMode())  # which asks whether there is a driver
        patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)

        def synchronize(*_: Any) -> None:
            assert not gpu.is_watched, "torch.cuda.synchronize waits for the device"
            gpu.waits += 1

        known: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda device=None: CAPABILITY,
            "get_device_name": lambda device=None: "a fake GPU",
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": synchronize,
            "Event": _Event,
            "max_memory_allocated": lambda device=None: 0,
            "get_rng_state": lambda device=None: cpu_states,
            "set_rng_state": lambda state, device=None: None,
            "amp.common.amp_definitely_not_available": lambda: False,
        }
        for name, value in known.items():
            patch(f"torch.cuda.{name}", value)
        # whether a step is being captured is asked of the driver
        for name in vars(torch.optim.Optimizer):
            if name.endswith("graph_capture_health_check"):
                patch(f"torch.optim.Optimizer.{name}", lambda optimizer: None)
        patch("torch.nn.Module.to", _move(gpu))
        patch("torch._subclasses.fake_tensor.FakeTensor.tolist", _tolist(gpu))
        # its wheel is built for CUDA 12, and refuses every kernel, also those of torch that it
        # calls, beside a torch that is built for CUDA 13
        patch("xformers.ops.fmha.common._built_with_cuda", xformers)
        attention._xformers_runs.cache_clear()
        stack.callback(attention._xformers_runs.cache_clear)
        stack.enter_context(gpu.mode)
        stack.enter_context(_Watch(gpu))
        stack.enter_context(_Declared(gpu))
        yield gpu


def _move(gpu: FakeCuda) -> Callable[..., nn.Module]:
    """``nn.Module.to``, which cannot swap fake tensors."""

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None:
            assert device.type == "cuda", f"a module is moved to {device}"
            gpu.put_module(module)
        if dtype is not None:
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None and value.dtype != dtype:
                        part._parameters[name] = nn.Parameter(
                            value.detach().to(dtype), requires_grad=value.requires_grad
                        )
        return module

    return to


def _tolist(gpu: FakeCuda) -> Callable[[Tensor], Any]:
    """``Tensor.tolist``, which packed tokens declare."""

    def tolist(tensor: Tensor) -> Any:
        if sys._getframe(1).f_code is Packed.of.__func__.__code__:
            return gpu.lengths(tensor)
        assert not (gpu.is_watched and _is_here(tensor)), "tolist reads the device"
        return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")).tolist()

    return tolist


__all__ = ["CUDA", "FakeCuda", "fake_cuda", "fake_tensor"]
