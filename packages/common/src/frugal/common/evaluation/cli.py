"""What the command line asks for: which evaluations of a recipe, and what they do differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from frugal.common.contracts import EvaluationTask
from frugal.common.data.benchmark_layout import (
    dataset_type,
    has_class_names,
    holds_class_folders,
)
from frugal.common.distributed import MEETING
from frugal.common.errors import InputError
from frugal.common.evaluation.class_names import SUBSETS
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.linear_probe import LinearProbe, Solver
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.sugarcrepe import has_contrasts
from frugal.common.evaluation.suites import SUITES, find_parts, metric_of
from frugal.common.evaluation.task import FolderEvaluation, ImageEvaluation
from frugal.common.evaluation.task_labels import TASKS
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.vit import ImageTower
from frugal.common.ranges import Positive

_Kind = ZeroShot | Retrieval | Compositional | LinearProbe
KINDS: dict[str, type[_Kind]] = {
    "zero-shot": ZeroShot,
    "retrieval": Retrieval,
    "compositional": Compositional,
    "linear-probe": LinearProbe,
}
"""Evaluations of every model of images and captions, by the word that asks for them."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """Of zero-shot classification."""

    templates: str | None = None
    """Prompts: data (those the data comes with), imagenet_7, imagenet_9, imagenet_80, name (the
    bare class name), or those of a task of clip-26."""
    class_names: str | None = None
    """Names of the classes: data, imagenet, imagenet_a, imagenet_r, or those of a task of
    clip-26."""
    reduce_prompts: bool | None = None
    """Shorten prompts as the recipe shortens captions in training."""


@dataclass(frozen=True, kw_only=True)
class CompositionalOptions:
    """Of SugarCrepe's choices between two captions."""

    images: Path | None = None
    """Folder of the images that the JSON files name (COCO's val2017); by default images/ or
    val2017/ beside them, or their own folder."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions:
    """Of linear probes."""

    solver: Solver | None = None
    """lbfgs (the optimum), adamw or sgd (epochs, as clip_benchmark trains)."""
    weight_decay: float | None = None
    """By default searched on validation images."""
    features: Path | None = None
    """Folder where the embeddings are kept; by default features/ in --out."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Of tasks that train on top of an image tower."""

    recipe: str | None = None
    """One of the task's recipes, such as vit-b16 or demo, or the path of a recipe.json."""
    changes: tuple[str, ...] = ()
    """What the recipe is to do differently, such as schedule.samples=64000."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a model; under torchrun or deepspeed, on several processes.

    What is not given here is as the run's recipe evaluates: its crop, prompts, masks and data. A
    model of another library is measured with the crop that it comes with.
    """

    checkpoint: Path
    """A run directory of any method, or one of its checkpoints; a folder of open_clip, of
    transformers (CLIP, SigLIP, VisionTextDualEncoder, ViT) or of timm; a file of OpenAI's; or with
    --model any file of weights that open_clip or timm loads."""
    model: str | None = None
    """Of a file of weights: open_clip's name of the model, such as ViT-B-16; openai for a state
    dict of OpenAI's."""
    weights_key: str | None = None
    """Of a file that holds several sets of weights: the keys that lead to the one to take, such as
    model_ema, or what stands in front of its names, such as momentum_encoder."""
    data: Path | None = None
    """A scenes folder, class-per-folder images, clip_benchmark's webdataset layout, or SugarCrepe's
    JSON files; the URL of a folder in clip_benchmark's layout; for a suite the folder of its tasks'
    folders; by default what the recipe's own evaluations name."""
    tasks: tuple[str, ...] | None = None
    """Any of zero-shot, retrieval, compositional, linear-probe; the suites clip-26 and
    imagenet-robustness; the name of an evaluation of the recipe. By default, with data: zero-shot
    of class folders and data with class names, retrieval of other captioned data, compositional
    where the data has its files; of a model without captions, what
    its recipe evaluates. Without data: all of the recipe's that name data. linear-probe also takes
    image towers alone, of any run that has one: it looks at what they pool. milan-finetune,
    milan-linear-probe and milan-segment train on top of the image tower, in a run directory of
    their name in --out, and measure that."""
    name: str | None = None
    """Of the JSON file and first part of the name of every number, where one task is measured."""
    zero_shot: ZeroShotOptions = field(default_factory=ZeroShotOptions)
    compositional: CompositionalOptions = field(default_factory=CompositionalOptions)
    linear_probe: LinearProbeOptions = field(default_factory=LinearProbeOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    published: bool = False
    """Crop and resize the images as the method's published numbers were measured."""
    mask_ratio: float | None = None
    """Fraction of the patches that the image tower does not see."""
    views: int | None = None
    """Masked views of every image, whose embeddings are averaged."""
    out: Path | None = None
    """Folder for one JSON file per task, and what was found image by image; by default
    evaluation/ in the run directory, or beside the file of weights in a folder of its name."""
    csv: Path | None = None
    """A table with clip_benchmark's columns that every task adds a row to; by default results.csv
    in --out."""
    rendezvous_minutes: Positive = MEETING
    """How long a process waits at the start for all others to come, before it ends."""
    stall_minutes: Positive | None = 30.0
    """How long one of several processes may give no sign of life, or all of them be in one line of
    the program, before they end and name it; None waits for ever."""
    batch_size: int = 256
    """Images, or texts, per process at a time."""
    workers: int = 2
    """Processes that decode images, per process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the matrix products on CUDA; by default as the recipe trains, or bfloat16."""


@dataclass(frozen=True)
class _Asked:
    """What the command line says differently of one kind of evaluation."""

    kind: type
    word: str
    """Asks for evaluations of this kind."""
    given: dict[str, Any]
    """By the name of the field."""
    prefix: str
    """Of the flags."""

    def flags(self) -> str:
        """Those that were typed."""
        return " and ".join(f"--{self.prefix}{name.replace('_', '-')}" for name in self.given)


def _asked(options: Options) -> list[_Asked]:
    """What each kind of evaluation is to do differently."""
    of_images = {"mask_ratio": options.mask_ratio, "views": options.views}
    return [
        _of_kind(ZeroShot, "zero-shot", dataclasses.asdict(options.zero_shot)),
        _of_kind(Compositional, "compositional", dataclasses.asdict(options.compositional)),
        _of_kind(LinearProbe, "linear-probe", dataclasses.asdict(options.linear_probe)),
        replace(_of_kind(ImageEvaluation, "zero-shot", of_images), prefix=""),
    ]


def _of_kind(kind: type, word: str, fields: Mapping[str, Any]) -> _Asked:
    given = {name: value for name, value in fields.items() if value is not None}
    return _Asked(kind, word, given, f"{word}.")


def chosen_tasks(
    options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask]
) -> list[EvaluationTask]:
    """The evaluations that the command line asks for, with what it says differently.

    Given data, one of each kind; the run's first, or one with its defaults where it has none.
    Without, all of the run's that have data, those of its own method included.

    Args:
        options: of the command line.
        bundle: the model.
        own: what its run measures it on.

    Raises:
        InputError: if there is nothing to measure, or a flag would have no effect.
    """
    words = _words(options, bundle, own)
    trainings = chosen_trainings(options)
    if (options.transfer.recipe or options.transfer.changes) and not trainings:
        known = ", ".join(transfer_tasks())
        raise InputError(
            f"--transfer.recipe and --transfer.changes are for tasks that train ({known}); add one "
            "to --tasks, or leave them out"
        )
    if trainings and options.published:
        raise InputError(
            f"--published is for what the model says of images, but {trainings[0]} trains and "
            "prepares images as its recipe says; leave it out"
        )
    tasks = [task for word in words for task in _tasks(word, options, bundle, own)]
    if not tasks and not trainings:
        _refuse_nothing(words, options, bundle, own)
    if options.name is not None and len(tasks) + len(trainings) > 1:
        raise InputError(
            f"--name {options.name} is for one evaluation, but there are "
            f"{len(tasks) + len(trainings)}; choose one with --tasks"
        )
    _check_flags(options, tasks)
    return [_as_asked(task, options) for task in tasks]


def transfer_tasks() -> dict[str, EntryPoint]:
    """The tasks that train on top of an image tower, none of them imported.

    See :mod:`frugal.common.transfer.tasks`.
    """
    return {point.name: point for point in sorted(entry_points(group="frugal.transfer"))}


def chosen_trainings(options: Options) -> list[str]:
    """The words of those of them that the command line asks for."""
    return [word for word in dict.fromkeys(options.tasks or ()) if word in transfer_tasks()]


def _of_encoders(bundle: ModelBundle) -> list[str]:
    """What measures an image tower alone, whatever trained it."""
    return ["linear-probe"] if isinstance(bundle.image, ImageTower) else []


def _others(own: Sequence[EvaluationTask]) -> dict[str, EvaluationTask]:
    """The run's evaluations that no word stands for, by name."""
    kinds = tuple(KINDS.values())
    return {task.name: task for task in own if not isinstance(task, kinds)}


def _words(options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask]) -> list[str]:
    """What to look at."""
    others = _others(own)
    known = [*KINDS, *SUITES, *others, *transfer_tasks()]
    if options.tasks is not None:
        if not options.tasks:
            raise InputError(f"--tasks is empty; choose from {', '.join(known)}")
        if unknown := [word for word in options.tasks if word not in known]:
            raise InputError(f"there is no task {unknown[0]!r}; choose from {', '.join(known)}")
        words = list(dict.fromkeys(options.tasks))
        words = [word for word in words if word not in transfer_tasks()]
        fitting = words if bundle.text is not None else [*others, *_of_encoders(bundle)]
        if odd := [word for word in words if word not in fitting]:
            _refuse_without_text(options, bundle, own, odd[0])
        return words
    data = options.data
    if bundle.text is None:
        return list(others)
    if data is None:
        return [*KINDS, *others]
    usual = _usual(data)
    return (
        [*usual, "compositional"] if options.compositional.images or has_contrasts(data) else usual
    )


def _usual(data: Path) -> list[str]:
    """What a folder says that it is for; both, where it says nothing."""
    if has_contrasts(data) or any((data / part).is_dir() for part in ("zero_shot", "retrieval")):
        return ["zero-shot", "retrieval"]
    kind = dataset_type(data)
    if kind == "retrieval":
        return ["retrieval"]
    names_classes = has_class_names(data) or holds_class_folders(data)
    return ["zero-shot"] if kind or names_classes else ["zero-shot", "retrieval"]


def _refuse_nothing(
    words: list[str], options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask]
) -> None:
    if bundle.text is None:
        of_texts = [kind for kind in KINDS if kind not in _of_encoders(bundle)]
        _refuse_without_text(options, bundle, own, " or ".join(of_texts))
    named = " or ".join(word for word in words if word in KINDS) or " or ".join(words)
    raise InputError(
        f"there is nothing to measure: the recipe of {options.checkpoint} names no data for "
        f"{named}; give --data"
    )


def _refuse_without_text(
    options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask], word: str
) -> None:
    """An image tower alone is measured by what its recipe says, or by what is trained on top."""
    said = f"{options.checkpoint} holds a model without a text tower"
    ways = []
    if others := _others(own):
        takes_data = any(isinstance(task, FolderEvaluation) for task in others.values())
        named = (
            f"{' and '.join(others)}: give --data" if takes_data else f"--tasks {' '.join(others)}"
        )
        ways.append(f"its own {named}")
    if words := _of_encoders(bundle):
        trained = f" (or {', '.join(transfer_tasks())}, which train)" if transfer_tasks() else ""
        ways.append(f"--tasks {words[0]} --data DATA{trained}")
    if not ways:
        ways.append("the programs of its own method")
    raise InputError(f"{said}, which {word} needs; it is measured by {', or by '.join(ways)}")


def _tasks(
    word: str, options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask]
) -> list[EvaluationTask]:
    """The evaluations of one word."""
    if word in SUITES:
        return _suite(word, options, bundle, own)
    if word in KINDS:
        kind = KINDS[word]
        same: list[Any] = [task for task in own if isinstance(task, kind)]
        if options.data is None:
            return [task for task in same if task.data is not None]
        return [replace(same[0] if same else _default(kind, bundle, own), data=options.data)]
    other = _others(own)[word]
    if options.data is not None and not isinstance(other, FolderEvaluation):
        raise InputError(
            f"the evaluation {word!r} of {options.checkpoint} takes no --data; leave it out"
        )
    if options.data is not None:
        other = replace(other, data=options.data)  # type: ignore[type-var]
    return [other] if other.has_data else []


def _default(
    kind: type[_Kind], bundle: ModelBundle, own: Sequence[EvaluationTask]
) -> ImageEvaluation:
    """An evaluation that a run does not have; models of others, and probes, see their own crop."""
    return kind() if own and kind is not LinearProbe else kind(crop=bundle.transform)


def _suite(
    word: str, options: Options, bundle: ModelBundle, own: Sequence[EvaluationTask]
) -> list[EvaluationTask]:
    """One zero-shot classification for every task of a suite that is there."""
    if options.data is None:
        raise InputError(f"{word} needs --data: the folder with a sub-folder for each of its tasks")
    if options.zero_shot.class_names is not None:
        raise InputError(
            f"--zero-shot.class-names is for one task, but {word} has names for each of its own"
        )
    if not options.data.is_dir():
        raise InputError(f"the data of {word} is not there: {options.data} is no folder")
    same = [task for task in own if isinstance(task, ZeroShot)]
    base = same[0] if same else _default(ZeroShot, bundle, own)
    assert isinstance(base, ZeroShot)
    tasks: list[EvaluationTask] = []
    for name, folder in find_parts(options.data, word).items():
        task = replace(base, data=folder, name=name)
        if word == "clip-26":
            names = "data" if name == "imagenet" else name
            templates = name if name in TASKS else "data"
            task = replace(task, class_names=names, templates=templates, metric=metric_of(name))
        elif name in SUBSETS:
            task = replace(task, class_names=name)
        tasks.append(task)
    return tasks


def _check_flags(options: Options, tasks: list[EvaluationTask]) -> None:
    """Refuse flags that none of the tasks reads."""
    for asked in _asked(options):
        if asked.given and not any(isinstance(task, asked.kind) for task in tasks):
            them = "it" if len(asked.given) == 1 else "them"
            raise InputError(
                f"{asked.flags()}: no task that is measured reads {them}; add {asked.word} to "
                f"--tasks, or leave {them} out"
            )


def _as_asked(task: EvaluationTask, options: Options) -> EvaluationTask:
    """A task with what the command line says differently of it."""
    changes = {
        key: value
        for asked in _asked(options)
        if isinstance(task, asked.kind)
        for key, value in asked.given.items()
    }
    if options.name is not None:
        changes["name"] = options.name
    has = {field.name for field in dataclasses.fields(task)}  # type: ignore[arg-type]
    given = {"batch_size": options.batch_size, "workers": options.workers}
    changes |= {name: value for name, value in given.items() if name in has}
    if options.published:
        crop = task.published_crop if isinstance(task, ImageEvaluation) else None
        if crop is None:
            raise InputError(
                f"the recipe of {options.checkpoint} does not say how images were prepared for "
                f"published numbers of {task.name}; leave out --published"
            )
        changes["crop"] = crop
    return replace(task, **changes)  # type: ignore[type-var]
