"""What the parts of a run hand to each other, and what each of them must be able to do.

A method brings any of these from a package of its own. The parts that are configured by a whole
recipe, models, data and objectives, have the contracts of their configurations in
:mod:`frugal.common.recipe`; reductions have theirs in :mod:`frugal.common.reduction`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.data.damage import DamageNote
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import SampleResults
from frugal.common.models.bundle import ModelBundle, TokenizerSource
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import Count, NotNegative, Range, check_ranges
from frugal.common.reduction.image import ImageReduction, KeepAll, PatchView
from frugal.common.run import Run


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one micro-batch of one process, in global order."""

    images: Tensor
    """(B, 3, H, W) uint8, or float32 that is normalized already; (B, 3, 0, 0) where there are
    ``features`` in their place."""
    sample_numbers: Tensor
    """(B,) int64: number of the sample since the start of the run; every random draw uses it."""
    valid: Tensor
    """(B,) bool: False where the sample was damaged. Such rows carry zeros and must not count."""
    token_ids: Tensor | None = None
    """(B, T) int64, padded on the right."""
    text_lengths: Tensor | None = None
    """(B,) int64: tokens before the padding."""
    text_positions: Tensor | None = None
    """(B, T) int64: the slot of the text tower that each token stands in, ascending; padding has
    one too. Without them the tokens stand in the first slots, and padding in all others."""
    labels: Tensor | None = None
    """(B,) int64 class indices, where the data has classes; -1 for a sample that has none.
    Or (B, H, W) uint8, where every pixel has a class."""
    features: Tensor | None = None
    """(B, D) float32: what a frozen image tower has put out for each image, before its projection;
    of training on stored vectors."""
    text_features: Tensor | None = None
    """(B, D) float32: the same of a frozen text tower and each caption; no tokens come then."""
    groups: Tensor | None = None
    """(B,) int64: samples of equal numbers are no strangers to each other, where an objective asks
    for that; of samples without a group their own number."""
    keys: list[str] = field(default_factory=list)
    """Where each sample comes from: ``shard/key``."""
    damage: dict[str, int] = field(default_factory=dict)
    """Damaged samples of this batch by kind."""
    damage_notes: list[DamageNote] = field(default_factory=list)
    """Each of them, with the reason; empty where a stream tells none. Also valid samples that were
    repaired, of the kind ``repaired``."""
    sources: dict[int, int] = field(default_factory=dict)
    """Valid samples by entry of ``data.train``; empty where there is one."""
    ends: str = ""
    """Why the run is to end after one of the next steps, with a checkpoint; usually nothing."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device`` (without waiting, from pinned memory)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop`` of this batch; damage stays with the whole."""
        whole: dict[str, Any] = {"damage": {}, "damage_notes": [], "sources": {}, "ends": ""}
        part: dict[str, Any] = {
            name: value[start:stop]
            for name, value in vars(self).items()
            if name not in whole and value is not None
        }
        return replace(self, **(whole | part))

    def __len__(self) -> int:
        """Samples, damaged ones included."""
        return len(self.sample_numbers)


class ColorChange(Protocol):
    """A change of colors that belongs to the samples, made where the images are."""

    def apply(self, images: Tensor, *, noise: NoiseSource) -> Tensor:
        """The images (B, 3, H, W) uint8 in other colors, from one row of noise per image."""
        ...


@dataclass(frozen=True)
class Part:
    """A shard, or the images of a class folder."""

    name: str
    """Below the folder that holds all parts of an entry of ``data.train``: it stays where the data
    are moved."""
    samples: int | None
    """None where it is known only by reading everything."""
    digest: str
    """Of what tells its samples from others; empty where only the name is known."""
    stamp: str = field(default="", compare=False)
    """Of files as they lie on the disk; where it is another, they were touched. Empty where nobody
    looked."""
    path: str = field(default="", compare=False)
    """Of an indexed shard, which can be read again; empty for others."""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """The learning rate of a run, as a pure function of the samples seen before a step."""

    samples: Count
    """Samples the run trains on."""

    def for_batch_size(self, batch_size: int) -> Self:
        """The same with what was given in steps told in samples; a recipe is built with that."""
        return self

    @abstractmethod
    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""


_ClipNorm = Annotated[float, Range(above=0, hint="leave it out to train without clipping")]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """How weights are stepped; builds a ``torch.optim.Optimizer``.

    The engine clips, sets the learning rate of every group to its ``lr_scale`` times that of the
    schedule, and sets ``found_inf``, a scalar tensor, to 1 where a step must change nothing:
    torch's fused kernels obey it, an optimizer of one's own has to.
    """

    learning_rate: NotNegative | None = None
    """Peak learning rate; give this or --optimizer.learning-rate-per-256."""
    learning_rate_per_256: NotNegative | None = None
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    clip_norm: _ClipNorm | None = None
    """Largest norm of the whole gradient."""

    moments: ClassVar[tuple[str, ...]] = ()
    """What a checkpoint holds of a trainable parameter beside its weights: names of float32
    tensors of the parameter's shape in the optimizer's ``state``."""

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer")
        if (self.learning_rate is None) == (self.learning_rate_per_256 is None):
            raise InputError(
                "give exactly one of optimizer.learning_rate "
                f"({self.learning_rate}) and optimizer.learning_rate_per_256 "
                f"({self.learning_rate_per_256})"
            )

    def peak(self, batch_size: int) -> float:
        """The peak learning rate at a global batch size."""
        if self.learning_rate is not None:
            return self.learning_rate
        assert self.learning_rate_per_256 is not None
        return self.learning_rate_per_256 * batch_size / 256

    def moments_of(self, module: nn.Module) -> dict[str, tuple[str, ...]]:
        """The ``moments`` of every trainable parameter, by name; those of a group are alike."""
        named = module.named_parameters()
        return {name: self.moments for name, parameter in named if parameter.requires_grad}

    def gathered(self, module: nn.Module) -> int:
        """Numbers of what a step needs whole where each process has a piece: see below."""
        return 0

    @abstractmethod
    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters, every group with an ``lr_scale``.

        Raises:
            InputError: if the options do not go with the model.
        """


@runtime_checkable
class NormsOfWholeTensors(Protocol):
    """An optimizer that needs norms of whole tensors, of which ZeRO gives each process a part."""

    total: Callable[[Tensor], Tensor]
    """Adds up what the processes know of squared norms; an engine that cuts tensors up sets it."""


@runtime_checkable
class WholeTensors(Protocol):
    """An optimizer that needs whole tensors, of which ZeRO gives each process a piece."""

    gather: Callable[[Tensor], Tensor] | None
    """(n,) to (W n,): the pieces of one tensor in the order of the processes, filled up at the end;
    an engine that cuts tensors up sets it."""


class Tower(Protocol):
    """A part of an objective that does most of its work; ``nn.Module.compile`` meets the second."""

    checkpoint_activations: bool
    """Recompute every block in the backward pass instead of storing it."""

    def compile(self) -> None:
        """``torch.compile`` it, in place."""
        ...


class Initializer(Protocol):
    """What an objective takes its first weights with."""

    @property
    def interpolate(self) -> bool:
        """Whether position tables may be brought to another grid or length."""
        ...

    @property
    def log(self) -> logging.Logger:
        """Told what was taken."""
        ...

    def take_all(self, objective: Objective, source: Path | ModelBundle) -> None:
        """Give the whole objective the weights of the same names.

        Raises:
            InputError: if there are none, they do not fit, or their model computes otherwise.
        """
        ...


class Objective(nn.Module):
    """One ``nn.Module`` that holds everything trainable and maps a batch to its loss.

    The engine compiles its towers, recomputes their activations and has ``forward`` compute in the
    run's precision: an objective does none of that itself.
    """

    model: nn.Module
    """What evaluations and exports take."""
    reduction: ImageReduction = KeepAll()
    """Which patches stay; a run sets the calibrated one before it trains."""
    tokenizer: TokenizerSource | None = None
    """Of its captions, in its configuration: weights go with the ids of one."""
    auxiliary: ClassVar[tuple[str, ...]] = ()
    """What the names of parts begin with that help training and are no part of ``model``: a stage
    begins without those of the run before it, or draws its own where that has none."""
    frozen_image: str = ""
    """Digest of a frozen image tower that a new run has begun with; empty elsewhere."""
    frozen_text: str = ""
    """And of a frozen text tower."""

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a micro-batch of this process.

        The loss is a scalar whose mean over the processes is that of the global micro-batch; the
        metrics are detached scalars by name, the same names on every process. Two of the names have
        a meaning: ``image_tokens`` and ``text_tokens``, the mean numbers of tokens that the towers
        saw of one sample.
        """
        raise NotImplementedError

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Meet all micro-batches of this process before the first forward pass of their step.

        Every process is called at the same time. Where the step is skipped, buffers that this
        changes are set back.
        """
        del batches

    def towers(self) -> Sequence[Tower]:
        """What is to be compiled and whose activations may be recomputed."""
        return ()

    def counted(self, batch: Batch) -> Tensor:
        """(): how many things of a batch of this process its loss is the mean of."""
        return batch.valid.sum()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Parameters, by name, that the engine keeps within bounds after every step."""
        return {}

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample, from the means of ``metrics``; 0 if unknown."""
        del metrics
        return 0.0

    def init_from(self, source: Path | ModelBundle | None, start: Initializer) -> None:
        """Take the first weights: by default everything of the same names, if a source is given.

        Args:
            source: ``run.start_from``, which may hold weights of another kind of model, or a model
                that was loaded already.
            start: takes them all; an objective that takes a part of them, or some from elsewhere,
                calls :mod:`frugal.common.checkpoint.init_from` for each of its towers.

        Raises:
            InputError: if there are none although it needs some, or they do not fit.
        """
        if source is not None:
            start.take_all(self, source)

    def also_read(self) -> dict[str, str]:
        """Digests of what decides about the loss and is in no checkpoint, such as a teacher.

        By the field that names it; a run does not go on where one is another.
        """
        return {}

    def patch_view(self, batch: Batch) -> tuple[PatchView, NoiseSource] | None:
        """What the image reduction sees of a batch, and where it gets its random numbers.

        None where it cannot be shown, so that no reduction can be calibrated on it.
        """
        del batch
        return None

    def draw(self, batch: Batch) -> np.ndarray | None:
        """A picture (3, H*, W*) uint8 of a few samples as they are seen, where there is one."""
        del batch
        return None

    def draw_reduction(self, batch: Batch) -> np.ndarray | None:
        """What the image reduction draws of a few samples, (3, H*, W*) uint8."""
        del batch
        return None


class TrainedModel(Protocol):
    """The model that is being trained, for data that asks it; an engine is one."""

    objective: Objective
    dtype: torch.dtype
    """Of its matrix products."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """While open, ``objective`` holds all its weights on this process."""
        ...


class Stream(Protocol):
    """The micro-batches of one process, from any first sample number on.

    Endless, or to the end of the run: whoever wants more than the run has must expect fewer.
    """

    epoch_samples: int
    """Samples of one epoch."""
    contents: Sequence[Sequence[Part]]
    """The parts of every entry of ``data.train``, in order, compared where a run goes on; () where
    they cannot change."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside the sample number (JSON); {} for indexed data."""
        ...

    def scalars(self) -> dict[str, float]:
        """What to log of the data beside the loss, alike on every process; usually nothing."""
        ...


Show = Callable[[str, np.ndarray], None]
"""Takes a name and a (3, H, W) uint8 picture."""
Keep = Callable[[SampleResults], None]
"""Takes what a task found image by image."""


class EvaluationTask(ABC):
    """One evaluation of a recipe."""

    name: str
    """Of the file that the numbers go to."""
    data: Path | None = None
    """What is measured on, as it was given."""
    crop: CenterCrop | None = None
    """Which part of an image the model sees, of a task that cuts images."""

    def check_classes(self, trained: Sequence[str]) -> None:
        """Refuse data with class folders that training does not have; calls for no model.

        Args:
            trained: the class folders that a run trains on.

        Raises:
            InputError: if there is one with images.
        """
        del trained

    @abstractmethod
    def folder(self) -> Path | None:
        """Its data, or None without any; refuses what is not there, before training starts."""

    @property
    def has_data(self) -> bool:
        """Whether there is anything to measure; a task that draws its data itself says so here."""
        return self.folder() is not None

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of those numbers of :meth:`evaluate` of which higher is better.

        Some may be of certain data alone.
        """
        return ()

    @abstractmethod
    def evaluate(
        self,
        bundle: ModelBundle,
        run: Run,
        *,
        show: Show | None = None,
        keep: Keep | None = None,
    ) -> dict[str, float | int]:
        """Numbers by name, {} without data; every process of the run calls this.

        Args:
            bundle: the model; its weights are on the device of the run.
            run: says where files beside the numbers go, and is told what was found.
            show: takes pictures of what the model said, on the process that wants them.
            keep: takes what was found image by image, where a task knows that; on the process that
                wants it.
        """
