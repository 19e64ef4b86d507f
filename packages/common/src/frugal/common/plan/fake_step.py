"""The memory of a step, found by taking it on tensors that have sizes and no numbers.

The objective of a recipe goes forward and backward under torch's ``FakeTensorMode``, with the code
that trains and as one of any number of processes; a dispatch mode follows every storage that
operators make until it is freed. What an optimizer, ZeRO and DDP keep beside that is counted in
:mod:`frugal.common.plan.partition`.

Seen are the outputs of operators. What a kernel needs for itself while it runs is not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frugal.common.contracts import Batch, Objective
from frugal.common.data.config import StoredData
from frugal.common.distributed import in_place_of
from frugal.common.engine.engine import prepare_towers
from frugal.common.models.attention import as_on_gpu
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import NoiseSource, SampleNoise
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.transfer.segmentation_data import SegmentationData


@dataclass(frozen=True)
class Moment:
    """The fullest moment between two gradients of parameters."""

    gradients: int
    """Numbers of gradients that were there before it."""
    activations: int
    """Bytes that operators have made and that are still there."""
    loss: int
    """Bytes among them of the loss itself, beyond what the towers left behind."""


@dataclass(frozen=True)
class StepMemory:
    """What forward and backward of one micro-batch keep on one process."""

    weights: int
    """Bytes of parameters and buffers, of frozen towers too."""
    trainable: tuple[int, ...]
    """Numbers of every parameter that is trained, in order."""
    frozen: int
    """Numbers of all others."""
    batch: int
    """Bytes of one micro-batch of inputs."""
    moments: tuple[Moment, ...]
    """From the beginning of the forward pass to the end of the backward pass."""
    tokens: dict[str, float]
    """``image_tokens`` and ``text_tokens`` of one sample, as objectives report them."""
    exchanged: int
    """Bytes that the loss receives from other processes."""

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        return sum(self.trainable)


def step_memory(
    recipe: Recipe,
    *,
    samples: int,
    world_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    text_tokens: int | None = None,
    on_gpu: bool = True,
    beside: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 - it has no state
) -> StepMemory:
    """Take one micro-batch of a recipe forward and backward on fake tensors.

    Args:
        recipe: whose ``engine.checkpoint_activations`` and ``engine.cache_chunk`` count.
        samples: of the micro-batch of this process.
        world_size: processes that compare their samples.
        dtype: of the matrix products.
        text_tokens: of a caption, where the text tower computes captions without their padding; by
            default as many as there may be.
        on_gpu: keep what is kept on a GPU; otherwise what is kept on a CPU.
        beside: is entered for the step, such as torch's counter of FLOPs, which keeps tensors
            itself, so that the memory is not that of the step then.

    Returns:
        What it keeps. Reductions that keep another number of patches of every image count as if
        every image kept the expected number.
    """
    recipe, text_tokens = countable(recipe), _text_tokens(recipe, text_tokens)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    objective = recipe.objective.outline(recipe)
    outside = _outside(objective)
    prepare_towers(objective, replace(recipe.engine, compile=False))
    world = _World(world_size)
    objective.reduction = kept = _WatchedReduction(objective.reduction)
    with mode, _as_on(on_gpu=on_gpu), in_place_of(world):
        for module in (objective, *outside):
            _give_sizes(module)
        objective.train()
        batch = _batch(recipe, samples, text_tokens)
        trainer = _Trainer(objective, dtype)
        if outside:  # frozen towers take on the dtype of their products the first time
            with torch.no_grad():
                trainer.forward(batch)
        ledger = _Ledger(objective, static=_tensors(objective, *outside), batch=batch)
        exchanged = world.received
        with beside, ledger, torch.autograd.set_multithreading_enabled(False):
            trainer.ledger = ledger
            chunk = recipe.engine.cache_chunk
            if chunk is not None:
                cached_backward(trainer, batch, chunk, 1.0, last=True)
            else:
                trainer.backward(trainer.forward(batch)[0])
        return StepMemory(
            weights=ledger.weights,
            trainable=tuple(p.numel() for p in objective.parameters() if p.requires_grad),
            frozen=sum(t.numel() for t in _tensors(*outside))
            + sum(p.numel() for p in objective.parameters() if not p.requires_grad),
            batch=ledger.batch,
            moments=ledger.close(),
            tokens=_tokens(recipe, kept, text_tokens),
            exchanged=world.received - exchanged,
        )


def countable(recipe: Recipe) -> Recipe:
    """A recipe whose shapes do not depend on what is in its samples.

    An image reduction that keeps another number of patches of every image, or looks for its
    settings first, becomes one that keeps the expected number; captions without padding become
    captions of one length.
    """
    image = recipe.reduction.image
    if image.is_uneven or image.calibration_images:
        same = RandomMasking(mask_ratio=image.expected_mask_ratio)
        recipe = replace(recipe, reduction=replace(recipe.reduction, image=same))
    model = recipe.model
    if isinstance(model, DualEncoderConfig) and isinstance(model.text, TextTower):
        recipe = replace(recipe, model=replace(model, text=replace(model.text, packed=False)))
    return recipe


def tokens_of(recipe: Recipe, *, text_tokens: int | None = None) -> dict[str, float]:
    """``image_tokens`` and ``text_tokens`` of one sample of a recipe, without taking a step."""
    recipe, text_tokens = countable(recipe), _text_tokens(recipe, text_tokens)
    kept = _WatchedReduction(recipe.reduction.image)
    inputs = recipe.model.inputs()
    if inputs.grid is not None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            view = PatchView.of(
                torch.empty(2, 3, *inputs.height_width, dtype=torch.uint8),
                recipe.model.image,  # type: ignore[arg-type]
                importance=torch.empty(2, inputs.grid[0] * inputs.grid[1]),
            )
            kept.keep(view, noise=SampleNoise(0, torch.empty(2, dtype=torch.int64)))
    return _tokens(recipe, kept, text_tokens)


def _text_tokens(recipe: Recipe, given: int | None) -> int | None:
    """Slots of a caption that are computed."""
    captions, reduction = recipe.model.inputs().captions, recipe.reduction.text
    if captions is None or reduction is None:
        return None
    most = reduction.most_tokens(captions.length)
    return most if given is None else min(given, most)


def _tokens(recipe: Recipe, kept: _WatchedReduction, text_tokens: int | None) -> dict[str, float]:
    tower, inputs = recipe.model.image, recipe.model.inputs()
    rows, columns = inputs.grid or (1, 1)
    patches = rows * columns if kept.count is None else kept.count
    patches += isinstance(tower, ImageTower) and tower.class_token != "none"
    if has_stored_vectors(recipe):
        patches = 0
    if has_stored_texts(recipe):
        return {"image_tokens": float(patches), "text_tokens": 0.0}
    captions = inputs.captions
    is_positioned = captions is not None and (text_tokens or 0) < captions.length
    if isinstance(captions, TextTower) and captions.padding_matters and not is_positioned:
        text_tokens = captions.length
    return {
        "image_tokens": float(patches),
        **({} if text_tokens is None else {"text_tokens": float(text_tokens)}),
    }


def has_stored_vectors(recipe: Recipe) -> bool:
    """Whether vectors that are stored stand in the place of images."""
    return isinstance(recipe.data, StoredData) and recipe.data.stored is not None


def has_stored_texts(recipe: Recipe) -> bool:
    """Whether vectors that are stored stand in the place of captions."""
    return isinstance(recipe.data, StoredData) and recipe.data.stored_texts is not None


def _batch(recipe: Recipe, samples: int, text_tokens: int | None) -> Batch:
    """A micro-batch of nothing in the shapes of the data."""
    inputs = recipe.model.inputs()
    is_stored = has_stored_vectors(recipe)
    size = (0, 0) if is_stored else inputs.height_width
    fields: dict[str, Any] = {
        "images": torch.empty(samples, 3, *size, dtype=torch.uint8),
        "sample_numbers": torch.empty(samples, dtype=torch.int64),
        "valid": torch.empty(samples, dtype=torch.bool),
    }
    if is_stored:
        fields["features"] = torch.empty(samples, recipe.model.image.pooled_width)  # type: ignore[attr-defined]
    if has_stored_texts(recipe):
        fields["text_features"] = torch.empty(samples, recipe.model.text_tower().width)  # type: ignore[union-attr]
    elif text_tokens is not None and inputs.captions is not None:
        fields["token_ids"] = torch.empty(samples, text_tokens, dtype=torch.int64)
        fields["text_lengths"] = torch.empty(samples, dtype=torch.int64)
        most = recipe.reduction.text and recipe.reduction.text.most_tokens(inputs.captions.length)
        if most == text_tokens < inputs.captions.length:
            fields["text_positions"] = torch.empty(samples, text_tokens, dtype=torch.int64)
    if recipe.objective.groups_by is not None:
        fields["groups"] = torch.empty(samples, dtype=torch.int64)
    if isinstance(recipe.data, SegmentationData):
        fields["labels"] = torch.empty(samples, *inputs.height_width, dtype=torch.uint8)
    elif inputs.num_classes is not None:
        fields["labels"] = torch.empty(samples, dtype=torch.int64)
    return Batch(**fields)


def _outside(objective: Objective) -> list[nn.Module]:
    """Modules that towers hold and the objective does not own, such as a teacher's."""
    owned = {id(module) for module in objective.modules()}
    held = [
        value
        for tower in objective.towers()
        if id(tower) not in owned
        for value in vars(tower).values()
    ]
    return [value for value in held if isinstance(value, nn.Module) and id(value) not in owned]


def _give_sizes(module: nn.Module) -> None:
    """Put a tensor of the mode that is open in the place of every parameter and buffer."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    like: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        like = nn.Parameter(like, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = like
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _tensors(*modules: nn.Module) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


class _WatchedReduction(ImageReduction):
    """An image reduction of which it is known how many patches it kept."""

    def __init__(self, reduction: ImageReduction) -> None:
        self._reduction = reduction
        self.count: int | None = None
        """Patches of an image; None where all stayed."""

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches | None:
        """What the other one keeps."""
        kept = self._reduction.keep(view, noise=noise)
        self.count = None if kept is None else kept.index.shape[1]
        return kept


class _World:
    """The first of some processes of which the others are not there."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.received = 0
        """Bytes."""

    def exchange(self, local: Tensor) -> Tensor:
        """(W, ...): room for what every process would give."""
        self.received += (self.world_size - 1) * local.nbytes
        return local.new_empty((self.world_size, *local.shape))


class _Trainer:
    """What an engine is to forward and backward passes."""

    ledger: _Ledger | None = None

    def __init__(self, objective: Objective, dtype: torch.dtype) -> None:
        self.objective = objective
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the objective in the precision of the run."""
        if self.ledger is not None:
            self.ledger.begin()
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            return self.objective(*args, **kwargs)

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing."""
        del last
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients."""
        loss.backward()


@contextlib.contextmanager
def _as_on(*, on_gpu: bool) -> Iterator[None]:
    if not on_gpu:
        yield
        return
    with as_on_gpu(), _GpuAutocast():
        yield


_PRECISE = {F.layer_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax}
_PRECISE |= {Tensor.softmax, Tensor.log_softmax}


class _GpuAutocast(TorchFunctionMode):
    """What autocast computes in float32 on CUDA and not on CPUs, among what towers call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRECISE and torch.is_autocast_enabled("cpu"):
            args = [_widened(item) for item in args]
            kwargs = {name: _widened(item) for name, item in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(item: Any) -> Any:
    is_narrow = isinstance(item, Tensor) and item.dtype in (torch.bfloat16, torch.float16)
    return item.float() if is_narrow else item


class _Ledger(TorchDispatchMode):
    """Follows what operators make until it is freed."""

    def __init__(self, objective: Objective, *, static: Sequence[Tensor], batch: Batch) -> None:
        super().__init__()
        self.live = 0
        """Bytes that operators have made and that are still there."""
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        """Bytes of storages that count, by the same keys."""
        self.weights = self._know(static)
        self.batch = self._know([v for v in vars(batch).values() if isinstance(v, Tensor)])
        self._moments: list[Moment] = []
        self._gradients, self._given = 0, set[int]()
        self._depth, self._objective = 0, objective
        self._left_behind = 0
        """What was there when the last tower had put out what it computes."""
        self._in_loss = False
        self._most, self._most_loss = 0, 0
        hooks = nn.modules.module
        self._handles: list[Any] = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave),
        ]
        for parameter in objective.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._take_gradient)
                self._handles.append(hook)

    def _know(self, tensors: Sequence[Tensor]) -> int:
        """Have some tensors count for nothing; the bytes of their storages."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        for key, storage in storages.items():
            self._alive[key] = weakref.ref(storage, partial(self._forget, key))
        return sum(storage.nbytes() for storage in storages.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or size == 0:
            return
        self._alive[key] = weakref.ref(storage, partial(self._forget, key))
        self._sizes[key] = size
        self.live += size
        if self.live > self._most:
            self._most = self.live
            in_loss = self._in_loss and self._depth == 0
            self._most_loss = max(self.live - self._left_behind, 0) if in_loss else 0

    def _forget(self, key: int, _: Any = None) -> None:
        self._alive.pop(key, None)
        self.live -= self._sizes.pop(key, 0)

    def begin(self) -> None:
        """A forward pass begins."""
        self._depth, self._left_behind, self._in_loss = 0, 0, False

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._depth += module is not self._objective

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if module is self._objective:
            return
        self._depth -= 1
        if self._depth == 0 and torch.is_grad_enabled():
            self._left_behind, self._in_loss = self.live, True
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._end_loss)

    def _end_loss(self, _: Tensor) -> None:
        """The gradient of what a tower put out is there: the loss has been gone through."""
        self._in_loss = False

    def _take_gradient(self, parameter: Tensor) -> None:
        self._moments.append(Moment(self._gradients, self._most, self._most_loss))
        if id(parameter) not in self._given:
            self._given.add(id(parameter))
            self._gradients += parameter.numel()
        # who keeps it, and how much of it, is counted elsewhere; autograd still holds it here
        assert parameter.grad is not None
        self.live -= self._sizes.pop(parameter.grad.untyped_storage()._cdata, 0)
        parameter.grad = None
        self._most, self._most_loss = self.live, 0

    def close(self) -> tuple[Moment, ...]:
        """The moments of the step, once it is done."""
        self._moments.append(Moment(self._gradients, self._most, self._most_loss))
        for handle in self._handles:
            handle.remove()
        return tuple(self._moments)
