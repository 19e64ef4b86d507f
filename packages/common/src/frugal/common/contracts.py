"""What the parts of a run hand to each other.

Nothing here imports torch at run time: recipes are built from these names, and ``--help`` must
answer at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import logging
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from frugal.common.evaluation.bootstrap import Keep
    from frugal.common.models.bundle import ModelBundle
    from frugal.common.randomness import NoiseSource
    from frugal.common.recipe import Recipe
    from frugal.common.reduction.text import Placed
    from frugal.common.run import Run


class DamageNote(NamedTuple):
    """One damaged or repaired sample, as a person finds and understands it."""

    kind: str
    key: str
    """Where it is: ``shard/key``, a path or a URL."""
    detail: str
    """What is wrong with it, such as an exit status or the words of the decoder."""
    source: int
    """Which entry of ``data.train`` it is of."""
    lost: int
    """Samples that were lost with it and have no slot in any batch: the rest of its shard."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one micro-batch of one process, in global order."""

    images: Tensor
    """(B, 3, H, W) uint8, or float32 that is normalized already."""
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
    keys: list[str] = field(default_factory=list)
    """Where each sample comes from: ``shard/key``."""
    damage: dict[str, int] = field(default_factory=dict)
    """Damaged samples of this batch by kind."""
    damage_notes: list[DamageNote] = field(default_factory=list)
    """Each of them, with the reason; empty where a stream tells none. Also valid samples that were
    repaired, of the kind ``repaired``."""
    sources: dict[int, int] = field(default_factory=dict)
    """Valid samples by entry of ``data.train``; empty where there is one."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device`` (without waiting, from pinned memory)."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return replace(self, **moved)

    def rows(self, start: int, stop: int) -> Batch:
        """Samples ``start`` to ``stop`` of this batch; damage stays with the whole."""
        whole: dict[str, Any] = {"damage": {}, "damage_notes": [], "sources": {}}
        part: dict[str, Any] = {
            f.name: value[start:stop]
            for f in fields(self)
            if f.name not in whole and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **(whole | part))

    def __len__(self) -> int:
        """Samples, damaged ones included."""
        return len(self.sample_numbers)


@runtime_checkable
class ImageReduction(Protocol):
    """Decides which patches of every image stay. A frozen dataclass; see ``reduction/``."""

    def keep(self, view: Any, *, noise: NoiseSource) -> Any:
        """From a ``PatchView`` to a ``Kept``, or None where every patch stays."""
        ...


@runtime_checkable
class PreparedReduction(ImageReduction, Protocol):
    """An image reduction that looks at the first images of a run before the run trains."""

    measured: ClassVar[tuple[str, ...]]
    """Fields that are None until then; the run's recipe and checkpoints hold what was found."""

    @property
    def images_to_see(self) -> int:
        """Images, over all processes, that it wants to see; 0 where nothing is left to find."""
        ...

    def prepared(
        self,
        seen: Iterable[tuple[Any, NoiseSource]],
        *,
        gather: Callable[[Any], list[Any]],
        log: logging.Logger,
    ) -> ImageReduction:
        """The same with every measured field filled in, alike on every process.

        Args:
            seen: ``PatchView`` of images of this process, with the noise they have in training.
            gather: collects one JSON-ready value of every process, in rank order, on all of them.
            log: told what was found.
        """
        ...

    def remark(self, means: dict[str, float]) -> str | None:
        """What a person should know of the objective's metrics over some steps; usually nothing."""
        ...


@runtime_checkable
class TextReduction(Protocol):
    """Decides which tokens of a caption stay; runs in the loader, one caption at a time.

    What it needs beside the caption (a tagger, a file of counts) it loads, or refuses in a
    sentence, in an optional ``prepare(tokenizer, *, length)``, called before training starts.
    """

    def encode(
        self, caption: str, tokenizer: Any, *, length: int, generator: Any
    ) -> list[int] | Placed:
        """At most ``length`` token ids, special tokens included, without padding.

        Or, where tokens keep the slots they had, ids with positions; always or never.
        """
        ...


class Objective(Protocol):
    """One ``nn.Module`` that holds everything trainable and maps a batch to its loss.

    ``forward(batch) -> (loss, metrics)``: a scalar whose mean over the processes is the loss of
    the global micro-batch, and detached scalars by name, the same names on every process. Two of
    the names have a meaning: ``image_tokens`` and ``text_tokens``, the mean numbers of tokens that
    the towers saw of one sample.
    """

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics)."""
        ...

    @property
    def model(self) -> nn.Module:
        """What evaluations and exports take."""
        ...

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Parameters, by name, that the engine keeps within bounds after every step."""
        ...

    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample, from the means of ``metrics``."""
        ...


@runtime_checkable
class CountingObjective(Protocol):
    """An objective whose loss is the mean over something else than the valid samples."""

    def counted(self, batch: Batch) -> Tensor:
        """(): how many things of a batch of this process its loss is the mean of."""
        ...


@runtime_checkable
class ObjectiveConfig(Protocol):
    """The part of a recipe that builds the objective."""

    def build(self, recipe: Recipe) -> Any:
        """An :class:`Objective`, initialized from ``recipe.run.seed``, on the CPU in float32."""
        ...

    def trained_model(self, recipe: Recipe, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model that weights of a checkpoint are of, on the CPU; it is filled with them.

        What else trained it, such as a teacher, need not be there any more.

        Args:
            recipe: of the run.
            weights: by their names in the model.
        """
        del weights
        return self.build(recipe).model


class Stream(Protocol):
    """The micro-batches of one process, from any first sample number on.

    Endless, or to the end of the run: whoever wants more than the run has must expect fewer.
    """

    epoch_samples: int
    """Samples of one epoch."""
    contents: Any
    """What it is read from, as :mod:`frugal.common.data.contents` has it: compared where a run goes
    on. () where that cannot change."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep beside the sample number (JSON); {} for indexed data."""
        ...

    def scalars(self) -> dict[str, float]:
        """What to log of the data beside the loss, alike on every process; usually nothing."""
        ...


class DataConfig(ABC):
    """The part of a recipe that builds the stream of training batches."""

    max_damaged: float
    """Fraction of damaged samples at which the run stops."""
    shared_state: ClassVar[bool] = False
    """Whether the state of a stream is that of all processes, so that it fits any number of them.
    Otherwise a stream gets a state back only where there are as many as before."""

    @abstractmethod
    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: Any,
    ) -> Stream:
        """A stream that continues at ``first_sample``, a multiple of the global batch size.

        ``engine`` holds the model that is trained, for data that asks it; None where nothing is.
        """

    def report(self, run_dir: Path) -> list[tuple[str, str]]:
        """Titles and HTML of what the report tells about the data of a run; usually nothing."""
        del run_dir
        return []


Show = Callable[[str, Any], None]
"""Takes a name and a (3, H, W) uint8 picture."""


class EvaluationTask(ABC):
    """One evaluation of a recipe."""

    name: str
    """Of the file that the numbers go to."""

    @abstractmethod
    def folder(self) -> Path | None:
        """Its data, or None without any; refuses what is not there, before training starts."""

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
