"""A recipe: the typed, printable description of one run.

A recipe is a frozen value. The command line may override any field of it, the resolved value is
saved as ``recipe.json`` in the run directory, and that file is enough to repeat the run. Every
number has one place: what can be derived is derived.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import torch
import tyro
from torch import Tensor, nn

from frugal.common.contracts import (
    ColorChange,
    EvaluationTask,
    Objective,
    Optimizer,
    Schedule,
    Stream,
    TrainedModel,
)
from frugal.common.distributed import MEETING
from frugal.common.errors import InputError
from frugal.common.models.bundle import ImageSpec, TextSpec, TokenizerSource
from frugal.common.ranges import (
    Count,
    OpenShare,
    Positive,
    Range,
    Seed,
    check_ranges,
)
from frugal.common.reduction.image import ImageReduction
from frugal.common.reduction.text import TextReduction
from frugal.common.run import Run


@dataclass(frozen=True, kw_only=True)
class Reductions:
    """Which tokens the towers never see."""

    image: ImageReduction
    """Which patches of an image stay."""
    # for tyro no union, which would take the fields of the reduction off the command line
    text: Annotated[TextReduction | None, tyro.conf.arg(constructor=TextReduction)] = None
    """Which tokens of a caption stay; None for a model that reads none."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the numbers are computed; no choice here changes them beyond rounding."""

    deepspeed_config: Path | None = None
    """A file of ds_configs/: train with DeepSpeed. Without it Accelerate is used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the matrix products; weights and optimizer stay float32. auto: bfloat16 where the
    hardware has it, else float32."""
    accumulate: Count = 1
    """Micro-batches per step; each is a contrastive batch of its own."""
    cache_chunk: Count | None = None
    """Gradient caching: encode this many samples at a time, exact loss over the whole batch."""
    checkpoint_activations: bool = False
    """Recompute every block in the backward pass instead of storing it."""
    compile: bool = False
    """torch.compile the towers."""
    ema_decay: OpenShare | None = None
    """Keep an exponential moving average of the weights with this decay per step."""
    threads: Count | None = None
    """CPU threads of each process; without it the cores are divided among the processes, and a
    process that runs alone takes OMP_NUM_THREADS where that is set."""
    deterministic: bool = False
    """Compute with deterministic kernels alone, so that two runs on the same GPUs end in the same
    bits; refused for what has none. Its cost is not measured."""
    virtual_processes: Count | None = None
    """Compute every step as this many processes would, bit for bit, on any number of processes that
    divides it; each has one CPU thread then, unless engine.threads is given."""

    def __post_init__(self) -> None:
        check_ranges(self, "engine")


_EvaluateEvery = Annotated[
    int, Range(least=1, hint="leave it out to evaluate after the last step only")
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run lives and how often it reports."""

    dir: Path | None = None
    """Run directory; an interrupted run found there is continued."""
    seed: Seed = 0
    log_every: Count = 10
    """Steps between two log lines."""
    picture_every: Count = 500
    """Steps between two pictures of a batch with its masks in tensorboard."""
    save_every: Count = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""
    evaluate_every: _EvaluateEvery | None = None
    """Steps between two evaluations; without it only after the last step."""
    patience: Count | None = None
    """Evaluations in a row without a higher run.best after which the run ends."""
    best: str | None = None
    """A number of the evaluations, such as accuracy_top1: the checkpoint with the highest one stays
    on disk beside the newest, and every evaluation has a checkpoint."""
    start_from: Path | None = None
    """A run directory, checkpoint or folder of another library whose weights this run starts
    from, optimizer afresh."""
    interpolate: bool = False
    """Allow --run.start-from to resample position tables to another grid or length."""
    allow_changed_data: bool = False
    """Go on with a run although its data or its tokenizer have changed since it began; other
    samples come then, and history.jsonl of the run tells so."""
    max_failed_saves: Count = 60
    """Attempts in a row at writing a checkpoint that may fail before the run stops at the next one.
    They are a second apart at first, and a minute when it goes on: 60 take about an hour."""
    rendezvous_minutes: Positive = MEETING
    """How long a process waits at the start for all others to come, before it ends and says who is
    missing."""
    stall_minutes: Positive | None = 30.0
    """How long one of several processes may give no sign of life, stay behind the others, be in
    one line of a step, or all of them in one line beside the steps, before they end and name it;
    None waits for ever."""
    max_skipped: Count = 10
    """Steps in a row whose loss is not finite before the run stops; seen when a line is logged."""
    on_divergence: Literal["stop", "skip", "rewind"] = "stop"
    """What comes after run.max-skipped of them. stop: end the run. skip: go on, without them.
    rewind: go back to the last good checkpoint and do not train on their samples."""
    digests: bool = False
    """Note 64-bit digests of the samples and the gradient of every step, by which
    frugal.common.replay tells whether a step can be repeated bit for bit."""

    def __post_init__(self) -> None:
        check_ranges(self, "run")


class CaptionSpec(Protocol):
    """What a model takes of captions; the configurations of text towers are such a thing."""

    @property
    def length(self) -> int:
        """Tokens of a caption at most."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids that there may be."""
        ...

    @property
    def pad_id(self) -> int:
        """Token id of what fills captions up."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What a model takes, which data and token reductions go by."""

    height_width: tuple[int, int]
    """Of images, in pixels."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches of an image, of a model that can do with a part of them."""
    captions: CaptionSpec | None = None
    """None of a model that is given none."""
    num_classes: int | None = None
    """Classes of an image, of a model that is told them."""


class ModelConfig(ABC):
    """The trainable towers, as a part of a recipe; the objective builds them.

    ``initial_logit_bias`` is that of logits with a bias, as the sigmoid loss wants it; else None.
    """

    image: ImageSpec
    """The image tower, which every model has."""
    initial_logit_bias: float | None = None

    def text_tower(self) -> TextSpec | None:
        """The text tower, of a model that embeds captions too."""
        return None

    @abstractmethod
    def inputs(self) -> ModelInputs:
        """What data must give this model."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what this model cannot be combined with.

        Raises:
            InputError: naming the setting, before anything is written.
        """
        del recipe


GroupsBy = Literal["caption", "field"]
"""Samples belong together whose captions are equal, or whose ``data.fields.group`` is."""


class ObjectiveConfig(ABC):
    """What is minimized, as a part of a recipe."""

    compares_samples: ClassVar[bool] = False
    """Whether the samples of a micro-batch are told apart from each other, as in contrastive
    losses: one alone teaches nothing, and one that comes twice is told apart from itself."""
    caches_gradients: ClassVar[bool] = False
    """Whether it can encode a part of a batch at a time, as ``engine.cache_chunk`` has it."""
    knows_importance: ClassVar[bool] = False
    """Whether an image reduction is told how important each patch is."""
    takes_uneven: ClassVar[bool] = True
    """Whether another number of patches may stay of every image."""

    @property
    def takes_vectors(self) -> bool:
        """Whether stored vectors of a frozen image tower may stand in the place of images."""
        return False

    @property
    def takes_text_vectors(self) -> bool:
        """Whether stored vectors of a frozen text tower may stand in the place of captions."""
        return False

    @property
    def groups_by(self) -> GroupsBy | None:
        """What makes samples of a batch belong together; None where each stands alone."""
        return None

    def check(self, recipe: Recipe) -> None:
        """Refuse what this objective cannot be combined with, as :meth:`ModelConfig.check`."""
        del recipe

    @abstractmethod
    def build(self, recipe: Recipe) -> Objective:
        """The objective, initialized from ``recipe.run.seed``, on the CPU in float32."""

    def outline(self, recipe: Recipe) -> Objective:
        """The objective with sizes and no numbers, on torch's ``meta`` device, for plans of runs.

        What :meth:`build` reads from files need not be there yet.
        """
        with torch.device("meta"):
            return self.build(recipe)

    def trained_model(self, recipe: Recipe, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model that weights of a checkpoint are of, on the CPU; it is filled with them.

        What else trained it, such as a teacher, need not be there any more.

        Args:
            recipe: of the run.
            weights: by their names in the model.
        """
        del weights
        return self.build(recipe).model


class DataConfig(ABC):
    """What a run is trained on, as a part of a recipe; builds the stream of batches."""

    max_damaged: float
    """Fraction of damaged samples at which the run stops."""
    workers: int = 0
    """Loader processes of each process of a run; 0 loads in the process itself."""
    shared_state: ClassVar[bool] = False
    """Whether the state of a stream is that of all processes, so that it fits any number of them.
    Otherwise a stream gets a state back only where there are as many as before."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Where the samples are, as given; batches tell it by number. () where they are drawn."""
        return ()

    @property
    def caption_tokenizer(self) -> TokenizerSource | None:
        """What makes tokens of captions, in its configuration; None reads images alone."""
        return None

    @property
    def color_change(self) -> ColorChange | None:
        """How the colors of images change on the device; None where they stay."""
        return None

    def check(self, recipe: Recipe) -> None:
        """Refuse what this data cannot be combined with, as :meth:`ModelConfig.check`."""
        del recipe

    @abstractmethod
    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: TrainedModel | None,
    ) -> Stream:
        """A stream that continues at ``first_sample``, a multiple of the global batch size.

        ``engine`` holds the model that is trained, for data that asks it; None where nothing is.
        """

    def also_read(self) -> dict[str, str]:
        """Digests of what decides about samples beside data and tokenizer; usually nothing.

        By the field that names it; a run does not go on where one is another.
        """
        return {}

    def steps_alike(self, one: int, other: int) -> int:
        """Up to which checkpoint two runs of different lengths, in steps, have read the same.

        By default as far as both go: most data do not ask how long a run is.
        """
        return min(one, other)

    def save_tokenizer(self, folder: Path) -> None:
        """Keep with a run what is needed to tokenize as it did; usually nothing."""
        del folder

    def report(self, run_dir: Path) -> list[tuple[str, str]]:
        """Titles and HTML of what the report tells about the data of a run; usually nothing."""
        del run_dir
        return []


ModelT = TypeVar("ModelT", bound=ModelConfig)


def model_of(kind: type[ModelT], model: ModelConfig) -> ModelT:
    """The model of a recipe, for a part that works with models of one kind alone.

    Raises:
        InputError: if it is of another kind.
    """
    if not isinstance(model, kind):
        raise InputError(
            f"model is a {type(model).__name__}, where this recipe needs a {kind.__name__}; choose "
            "a recipe that has one"
        )
    return model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete."""

    model: ModelConfig
    """The trainable towers."""
    data: DataConfig
    """What it is trained on."""
    reduction: Reductions
    """Which tokens are left out."""
    objective: ObjectiveConfig
    """What is minimized."""
    optimizer: Optimizer
    """How weights are stepped."""
    schedule: Schedule
    batch_size: Count
    """Samples per optimizer step, over all processes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    run: RunOptions = field(default_factory=RunOptions)
    evaluation: tuple[EvaluationTask, ...] = ()
    """What the finished model is measured on."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if isinstance(self.schedule, Schedule):  # a file may say otherwise, which is seen later
            object.__setattr__(self, "schedule", self.schedule.for_batch_size(self.batch_size))
        if self.batch_size % self.engine.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into engine.accumulate = "
                f"{self.engine.accumulate} micro-batches; choose a multiple"
            )
        self._check_virtual_processes()
        if self.engine.deterministic and self.engine.compile:
            raise InputError(
                "engine.deterministic wants the same kernels in every run, but engine.compile "
                "chooses some by the time that they take; leave one of them out"
            )
        names = [task.name for task in self.evaluation]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(
                f"two evaluations of this recipe are called {min(twice)!r}, whose numbers would "
                "take each other's place; give one of them another name"
            )
        if self.run.best is not None and not self.evaluation:
            raise InputError(
                f"run.best is {self.run.best!r}, but this recipe evaluates nothing; leave it out"
            )
        if self.run.patience is not None and not (self.run.best and self.run.evaluate_every):
            raise InputError(
                f"run.patience is {self.run.patience}, but nothing says what is to get better, or "
                "when that is seen; give run.best and run.evaluate_every"
            )
        self.model.check(self)
        self.data.check(self)
        inputs = self.model.inputs()
        if inputs.grid is not None:
            self.reduction.image.check_grid(inputs.grid)
        _check_reduction(self.reduction.image, self.objective)
        self.objective.check(self)  # which refuses a text reduction where no captions are read
        if self.engine.cache_chunk is not None and not self.objective.caches_gradients:
            raise InputError(
                "engine.cache_chunk is for losses that compare the samples of a batch, which "
                f"{type(self.objective).__name__} does not; use engine.accumulate instead"
            )
        if self.reduction.text is not None and inputs.captions is not None:
            self.reduction.text.check_length(inputs.captions.length)

    def _check_virtual_processes(self) -> None:
        virtual, engine = self.engine.virtual_processes, self.engine
        if virtual is None:
            return
        if self.batch_size % (engine.accumulate * virtual):
            raise InputError(
                f"batch_size {self.batch_size} does not divide among engine.virtual_processes = "
                f"{virtual} with engine.accumulate = {engine.accumulate}; choose a multiple of "
                f"{engine.accumulate * virtual}"
            )
        if engine.compile:
            raise InputError(
                "engine.virtual_processes promises the same bits, but what engine.compile makes of "
                "a tower depends on the shapes that it has met; leave one of them out"
            )

    def virtual_per_process(self, world_size: int) -> int:
        """Virtual processes that each process stands for: 1 but for ``engine.virtual_processes``.

        Raises:
            InputError: if the processes do not divide them.
        """
        virtual = self.engine.virtual_processes or world_size
        if virtual % world_size:
            raise InputError(
                f"engine.virtual_processes = {virtual} does not divide among {world_size} "
                "processes; start a number of them that divides it"
            )
        return virtual // world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; the last one may pass ``schedule.samples``."""
        return math.ceil(self.schedule.samples / self.batch_size)

    def local_batch(self, world_size: int) -> int:
        """Samples per process and micro-batch.

        Raises:
            InputError: if the processes do not divide the batch.
        """
        parts = self.engine.accumulate * world_size
        if self.batch_size % parts:
            raise InputError(
                f"batch_size {self.batch_size} does not divide among {world_size} processes with "
                f"engine.accumulate = {self.engine.accumulate}; choose a multiple of {parts}"
            )
        return self.batch_size // parts

    def check_trainable(self) -> None:
        """Refuse what can be read, as of a model that was trained elsewhere, but not be trained.

        Looks for the data of the evaluations.

        Raises:
            InputError: if samples are to be compared of which there is one, if evaluation data are
                not there, or if nothing will measure ``run.best``.
        """
        if self.objective.compares_samples and self.batch_size == self.engine.accumulate:
            raise InputError(
                f"a batch_size of {self.batch_size} with engine.accumulate = "
                f"{self.engine.accumulate} compares one pair with itself, whose loss teaches "
                "nothing; make micro-batches larger, or use --engine.cache-chunk instead"
            )
        measured = [task for task in self.evaluation if task.has_data]
        scores = [name for task in measured or self.evaluation for name in task.scores]
        best = self.run.best
        if best is None or best in scores:
            return
        for task in self.evaluation:
            if best in task.scores:
                raise InputError(
                    f"run.best is {best!r}, but the evaluation {task.name!r} was given no data; "
                    f"give it some, or choose from {', '.join(scores)}"
                )
        raise InputError(
            f"run.best is {best!r}, which is nothing that the evaluations of this run measure and "
            f"of which higher is better; choose from {', '.join(scores)}"
        )


def _check_reduction(reduction: ImageReduction, objective: ObjectiveConfig) -> None:
    """Refuse a reduction that an objective cannot serve, or cannot use."""
    name = type(reduction).__name__
    if reduction.needs_importance and not objective.knows_importance:
        raise InputError(
            f"reduction.image {name} draws patches by the attention of a teacher, but this "
            "objective has none; choose RandomMasking, or an objective with a teacher"
        )
    if reduction.is_uneven and not objective.takes_uneven:
        raise InputError(
            f"reduction.image {name} keeps another number of patches of every image, but "
            f"{type(objective).__name__} needs equally many; choose another one"
        )
