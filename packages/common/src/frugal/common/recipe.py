"""A recipe: the typed, printable description of one run.

A recipe is a frozen value. The command line may override any field of it, the resolved value is
saved as ``recipe.json`` in the run directory, and that file is enough to repeat the run. Every
number has one place: what can be derived is derived.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from frugal.common.contracts import (
    DataConfig,
    EvaluationTask,
    ImageReduction,
    ObjectiveConfig,
    PreparedReduction,
)
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of
from frugal.common.old_names import FIELDS, TYPES, VALUES
from frugal.common.ranges import (
    Count,
    CountOrZero,
    NotNegative,
    OpenShare,
    Positive,
    PositiveShare,
    Range,
    Seed,
    ShareBelowOne,
    check_ranges,
)


@dataclass(frozen=True, kw_only=True)
class Reductions:
    """Which tokens the towers never see."""

    image: ImageReduction
    """Which patches of an image stay."""
    text: Any = None
    """Which tokens of a caption stay, a ``TextReduction``; None for a model that reads none. (A
    union in its type would take the fields of the reduction off the command line.)"""


_ClipNorm = Annotated[float, Range(above=0, hint="leave it out to train without clipping")]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What the ways of stepping have in common."""

    learning_rate: NotNegative | None = None
    """Peak learning rate; give this or --optimizer.learning-rate-per-256."""
    learning_rate_per_256: NotNegative | None = None
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    clip_norm: _ClipNorm | None = None
    """Largest norm of the whole gradient."""

    moments: ClassVar[tuple[str, ...]] = ()
    """What a checkpoint holds of every trainable parameter beside its weights."""

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


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    epsilon: NotNegative = 1e-8
    weight_decay: NotNegative = 0.2
    no_decay: tuple[str, ...] = ("bias", "norm", "position")
    """Which parameters are not decayed: bias, norm, position, class_token, logit_scale,
    embedding, vector (every parameter with fewer than two dimensions)."""
    projection_weight_decay: NotNegative | None = None
    """Of the projections of both towers into the shared space; without it as of all others."""
    layer_decay: PositiveShare | None = None
    """Learning rate of every block over that of the block behind it; what stands behind the last
    block has the whole rate. Without it everything has."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "bias", "norm", "position", "class_token", "logit_scale", "embedding", "vector"
        }  # fmt: skip
        if unknown := sorted(set(self.no_decay) - known):
            raise InputError(
                f"optimizer.no_decay does not know {unknown[0]!r}; choose from {sorted(known)}"
            )


@dataclass(frozen=True, kw_only=True)
class LARS(Optimizer):
    """Momentum whose steps are scaled to the norm of each matrix (You et al., arXiv:1708.03888).

    Vectors, such as biases, are neither scaled nor decayed.
    """

    momentum: ShareBelowOne = 0.9
    weight_decay: NotNegative = 0.0
    trust: Positive = 0.001
    """Norm of a gradient, after scaling, over the norm of its weights."""

    moments: ClassVar[tuple[str, ...]] = ("momentum",)


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine; a pure function of the samples seen before a step."""

    samples: Count
    """Samples the run trains on."""
    warmup_samples: CountOrZero = 0
    """Samples until the peak is reached."""
    start: NotNegative = 0.0
    """Learning rate of the very first step."""
    floor: NotNegative = 0.0
    """Learning rate at the end and beyond."""

    def __post_init__(self) -> None:
        if self.samples <= 0 or not 0 <= self.warmup_samples <= self.samples:
            raise InputError(
                f"schedule.warmup_samples ({self.warmup_samples}) must lie between 0 and "
                f"schedule.samples ({self.samples}), which must be positive"
            )
        check_ranges(self, "schedule")

    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        if samples_seen < self.warmup_samples:
            return self.start + (peak - self.start) * samples_seen / self.warmup_samples
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return self.floor + (peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


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
    best: str | None = None
    """A number of the evaluations, such as accuracy_top1: the checkpoint with the highest one stays
    on disk beside the newest, and every evaluation has a checkpoint."""
    start_from: Path | None = None
    """A run directory or checkpoint whose weights this run starts from, optimizer afresh."""
    interpolate: bool = False
    """Allow --run.start-from to resample position tables to another grid or length."""
    allow_changed_data: bool = False
    """Go on with a run although its data have changed since it began; other samples come then."""
    max_skipped: Count = 10
    """Steps in a row whose loss is not finite before the run stops; seen when a line is logged."""

    def __post_init__(self) -> None:
        check_ranges(self, "run")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete."""

    model: Any
    """The trainable towers."""
    data: DataConfig
    """What it is trained on."""
    reduction: Reductions
    """Which tokens are left out."""
    objective: ObjectiveConfig
    """What is minimized."""
    optimizer: Optimizer
    """How weights are stepped."""
    schedule: WarmupCosine
    batch_size: Count
    """Samples per optimizer step, over all processes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    run: RunOptions = field(default_factory=RunOptions)
    evaluation: tuple[EvaluationTask, ...] = ()
    """What the finished model is measured on."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.batch_size % self.engine.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into engine.accumulate = "
                f"{self.engine.accumulate} micro-batches; choose a multiple"
            )
        if self.run.best is not None and not self.evaluation:
            raise InputError(
                f"run.best is {self.run.best!r}, but this recipe evaluates nothing; leave it out"
            )
        for part in (
            self.model,
            self.data,
            self.reduction.image,
            self.objective,  # which refuses a text reduction where no captions are read
            self.reduction.text,
        ):
            check = getattr(part, "check", None)
            if check is not None:
                check(self)

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


# ------------------------------------------------------------------------------------------------
# A recipe as JSON. Every dataclass carries its type, so that a recipe of any installed method
# package can be read back; only dataclasses of the ``frugal`` namespace are ever imported.


def to_json(value: Any) -> Any:
    """A recipe, or any part of one, as JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        encoded = {"type": f"{kind.__module__}.{kind.__qualname__}"}
        for item in dataclasses.fields(value):
            encoded[item.name] = to_json(getattr(value, item.name))
        return encoded
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def _dataclass_named(name: str, *, source: str) -> type:
    module_name, _, class_name = TYPES.get(name, name).rpartition(".")
    if not module_name.startswith("frugal."):
        raise InputError(
            f"{source} names the type {name!r}, which is not one of Frugal's; it was not written "
            "by this software or was altered"
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise InputError(
            f"{source} needs {name!r}, which is not installed; install the package it was made "
            "with, in a version that has it"
        ) from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise InputError(f"{source} names {name!r}, which is not a part of a recipe")
    return kind


def _coerce(value: Any, hint: Any) -> Any:
    """JSON has lists and strings where a recipe has tuples and paths."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hints = [item for item in typing.get_args(hint) if item is not type(None)]
        return _coerce(value, hints[0]) if len(hints) == 1 else value
    if hint is Path:
        return Path(value)
    if isinstance(value, list):
        arguments = typing.get_args(hint)
        repeated = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None
        return tuple(_coerce(item, repeated) for item in value)
    return value


def from_json(value: Any, *, source: str = "the recipe") -> Any:
    """The inverse of :func:`to_json`.

    Raises:
        InputError: if a type or a field is unknown here.
    """
    if isinstance(value, list):
        return [from_json(item, source=source) for item in value]
    if not isinstance(value, dict):
        return value
    if "type" not in value:
        return {key: from_json(item, source=source) for key, item in value.items()}
    kind = _dataclass_named(value["type"], source=source)
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, item in value.items():
        if key == "type":
            continue
        name = key if key in hints else FIELDS.get(key, key)
        if name not in hints:
            raise InputError(
                f"{source} has a field {key!r} that {value['type']} does not know; it was written "
                "by another version"
            )
        if isinstance(item, str):
            item = VALUES.get((name, item), item)
        arguments[name] = _coerce(from_json(item, source=source), hints[name])
    try:
        return kind(**arguments)
    except TypeError:
        needed = {f.name for f in dataclasses.fields(kind) if _has_no_default(f)}
        lacking = ", ".join(sorted(needed - arguments.keys())) or "a value of the right kind"
        raise InputError(
            f"{source} does not describe a whole {value['type']}: it lacks {lacking}"
        ) from None


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def load_recipe(path: Path) -> Recipe:
    """The recipe saved in a file.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    try:
        encoded = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"there is no recipe at {path}; give a run directory's recipe.json"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a recipe ({reason_of(error)})") from None
    recipe = from_json(encoded, source=str(path))
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path} does not hold a recipe")
    return recipe


FORMER_DEFAULTS = "former_defaults"
"""Key in the metadata of a field: what its default was in earlier versions."""


def _with_former_defaults(wanted: Any, saved: Any) -> Any:
    """``wanted`` with the former defaults that ``saved`` began with, where it has today's."""
    if type(wanted) is not type(saved) or not dataclasses.is_dataclass(wanted):
        return wanted
    assert not isinstance(wanted, type)
    changes = {}
    for item in dataclasses.fields(wanted):
        new, old = getattr(wanted, item.name), getattr(saved, item.name)
        is_default = new == item.default
        if is_default and old != new and old in item.metadata.get(FORMER_DEFAULTS, ()):
            changes[item.name] = old
        elif (inner := _with_former_defaults(new, old)) is not new:
            changes[item.name] = inner
    return dataclasses.replace(wanted, **changes) if changes else wanted


def with_measured(wanted: Recipe, saved: Recipe) -> Recipe:
    """``wanted`` with what a run of ``saved`` has measured, where it leaves that open.

    A default that has changed since stays what it was when the run began.
    """
    wanted = _with_former_defaults(wanted, saved)
    image, before = wanted.reduction.image, saved.reduction.image
    if not isinstance(image, PreparedReduction) or type(image) is not type(before):
        return wanted
    found = {n: getattr(before, n) for n in image.measured if getattr(image, n) is None}
    image = dataclasses.replace(image, **found)  # type: ignore[type-var]
    return dataclasses.replace(wanted, reduction=dataclasses.replace(wanted.reduction, image=image))


_MAY_CHANGE = (
    "engine.",
    "run.",
    "evaluation",
    "data.workers",
    "data.max_damaged",
    "data.timeout_minutes",
)
"""What a resumed run may do differently: none of it changes the samples or the mathematics."""
_MUST_STAY = ("engine.accumulate", "engine.ema_decay", "run.seed", "run.start_from")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        flat = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}{key}."))
        return flat
    return {prefix[:-1]: value}


def difference(saved: Recipe, wanted: Recipe) -> list[str]:
    """What keeps ``wanted`` from continuing a run of ``saved``: one line per field."""
    old, new = _flatten(to_json(saved)), _flatten(to_json(wanted))
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [
        f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in changed
        if name in _MUST_STAY or not name.startswith(_MAY_CHANGE)
    ]
