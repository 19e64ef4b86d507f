"""No number of any part of any recipe may be what its field does not allow."""

import dataclasses
import importlib
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest

from frugal.common.cli import read_command_line
from frugal.common.contracts import EvaluationTask
from frugal.common.errors import InputError
from frugal.common.models.pretrained import TimmImage
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.ranges import Count, Range, check_ranges
from frugal.common.recipe import DataConfig
from frugal.common.recipe_json import from_json, to_json
from frugal.flip.recipes import RECIPES
from support import ROOT

TABLES = {
    "cit.recipes": ("RECIPES",),
    "clipa.recipes": ("RECIPES",),
    "cluster_masking.recipes": ("RECIPES",),
    "flip.recipes": ("RECIPES",),
    "milan.recipes": ("RECIPES",),
    "milan.segmentation_recipes": ("SEGMENTATION",),
    "milan.transfer_recipes": ("FINE_TUNING", "LINEAR_PROBING"),
}
NOT_NEGATIVE = "may be 0"
ALLOWED: dict[tuple[str, str], tuple[set[float], str]] = {
    ("DualEncoderConfig", "initial_logit_scale"): ({-1, 0}, "a logarithm"),
    ("DualEncoderConfig", "initial_logit_bias"): ({-1, 0}, "-10 in SigLIP"),
    ("ClusterMasking", "threshold"): ({-1, 0}, "a cosine"),
    ("CuratedData", "threshold"): ({-1, 0}, "a cosine"),
    **dict.fromkeys(
        [
            ("TextTower", "pad_id"), ("TextTower", "drop_path"),
            ("ImageTower", "drop_path"), ("ImageTower", "mean"), ("ImageTower", "layer_scale"),
            ("TextTower", "layer_scale"), ("DualEncoderConfig", "norm_epsilon"),
            ("TransformersText", "dropout"), ("SegmenterConfig", "dropout"),
            ("StoredData", "max_damaged"), ("StoredData", "workers"),
            ("SegmentationData", "max_damaged"), ("SegmentationData", "workers"),
            ("ColorJitter", "probability"), ("ColorJitter", "brightness"),
            ("ColorJitter", "contrast"), ("ColorJitter", "saturation"), ("ColorJitter", "hue"),
            ("ColorJitter", "gray"), ("RandomResizedCrop", "flip"), ("SingleDrawCrop", "flip"),
            ("ScaledCrop", "flip"), ("ScaledCrop", "tries"), ("RandAugmentedCrop", "fill"),
            ("RandomMasking", "mask_ratio"), ("BlockMasking", "mask_ratio"),
            ("TextMasking", "mask_ratio"), ("SemanticSampling", "mask_ratio"),
            ("ClusterMasking", "min_mask_ratio"), ("ImageEvaluation", "mask_ratio"),
            ("FolderEvaluation", "workers"), ("LinearProbe", "weight_decay"),
            ("LinearProbe", "seed"), ("RunOptions", "seed"), ("Classification", "smoothing"),
            ("RandomErasing", "probability"), ("Mixing", "mixup"), ("Mixing", "cutmix"),
            ("Mixing", "cutmix_probability"), ("PhotometricDistortion", "probability"),
            ("PhotometricDistortion", "brightness"), ("PhotometricDistortion", "contrast"),
            ("PhotometricDistortion", "saturation"), ("PhotometricDistortion", "hue"),
            ("Optimizer", "learning_rate"), ("Optimizer", "learning_rate_per_256"),
            ("Contrastive", "token_loss"),
            ("AdamW", "betas"), ("AdamW", "epsilon"), ("AdamW", "weight_decay"),
            ("AdamW", "projection_weight_decay"), ("LARS", "momentum"), ("LARS", "weight_decay"),
            ("WarmupCosine", "warmup_samples"), ("WarmupCosine", "start"),
            ("WarmupCosine", "floor"), ("PgsMasking", "edge_weight"),
        ],
        ({0}, NOT_NEGATIVE),
    ),
}  # fmt: skip
"""What of -1, 0, nan and inf the fields of a class, and of classes derived from it, allow; why."""


def table(module: str, name: str) -> dict[str, Any]:
    return getattr(importlib.import_module(f"frugal.{module}"), name)


@cache
def parts() -> dict[type, Any]:
    """An instance of every dataclass that recipes hold, or could hold."""
    found: dict[type, Any] = {TimmImage: TimmImage(name="resnet18")}
    for module, names in TABLES.items():
        for name in names:
            for make in table(module, name).values():
                found |= {type(part): part for part in inside(make())}
    for kind in other_strategies():
        found.setdefault(kind, kind())
    return found


def inside(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from inside(item)
    elif dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from inside(getattr(value, field.name))


def other_strategies() -> Iterator[type]:
    """Parts that no recipe names, but the command line or a recipe of one's own may."""
    for file in sorted(ROOT.glob("packages/*/src/frugal/**/*.py")):
        if "@dataclass(frozen=True, kw_only=True)" not in file.read_text():
            continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts[3:])
        for kind in vars(importlib.import_module(name)).values():
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                continue
            if kind.__module__ != name:
                continue
            is_part = issubclass(kind, DataConfig | EvaluationTask | WarmupCosine)
            is_part |= any(hasattr(kind, method) for method in ("keep", "encode", "decode"))
            needs = [f for f in dataclasses.fields(kind) if f.default is f.default_factory]
            if is_part and not needs and not getattr(kind, "__abstractmethods__", ()):
                yield kind


def bare(hint: Any) -> Any:
    """A type without what it is annotated with."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def spoiled(hint: Any, value: Any) -> Iterator[tuple[float, Any]]:
    """Every bad number, and the field's value with it in every place where it could stand."""
    hint = bare(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for choice in typing.get_args(hint):
            is_several = typing.get_origin(bare(choice)) is tuple
            yield from spoiled(choice, value if isinstance(value, tuple) == is_several else None)
    elif typing.get_origin(hint) is tuple:
        several = [bare(item) for item in typing.get_args(hint) if item is not ...]
        if all(item in (int, float) for item in several):
            whole = value or (several if len(several) > 1 else several * 2)
            for place in range(len(whole)):
                kept = [one if isinstance(one, int | float) else 1 for one in whole]
                for bad, _ in spoiled(several[0], None):
                    yield bad, (*kept[:place], bad, *kept[place + 1 :])
    elif hint in (int, float):
        for bad in (-1, 0, *((math.nan, math.inf, -math.inf) if hint is float else ())):
            yield bad, hint(bad)


def cases() -> list[Any]:
    found = []
    for kind in sorted(parts(), key=lambda kind: kind.__name__):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            value = getattr(parts()[kind], field.name)
            if bads := list(spoiled(hints[field.name], value)):
                name = f"{kind.__name__}.{field.name}"
                found.append(pytest.param(parts()[kind], field.name, bads, id=name))
    return found


@pytest.mark.parametrize(("part", "field", "bads"), cases())
def test_a_number_that_means_nothing_is_refused(
    part: Any, field: str, bads: list[tuple[float, Any]]
) -> None:
    allowed: set[float] = set()
    for kind in type(part).__mro__:
        allowed |= ALLOWED.get((kind.__name__, field), (set(), ""))[0]
    for bad, value in bads:
        if bad in allowed:
            continue
        with pytest.raises(InputError, match=field.replace("_", "[_ ]")) as refusal:
            replace(part, **{field: value})
        assert str(bad) in str(refusal.value)


def test_every_exception_names_a_field_that_is_there() -> None:
    known = {
        (kind.__name__, field.name)
        for part in parts()
        for kind in part.__mro__
        if dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
    }
    assert ALLOWED.keys() <= known


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--optimizer.learning-rate=nan", "optimizer.learning_rate is nan, must not be negative"),
        ("--optimizer.clip-norm=inf", "clip_norm is inf, must be positive and finite; leave it"),
        ("--engine.threads=-1", "engine.threads is -1, must be at least 1"),
        ("--run.seed=-3", "run.seed is -3, must lie between 0 and"),
        ("--model.image.mean -1 0 0", r"image.mean is \(-1.0, 0.0, 0.0\), must not be negative"),
        ("--model.initial-logit-scale=nan", "logit_scale is nan, must be a finite number"),
        ("--data.augmentation.ratio 0.5 inf", "ratio is .*inf.*, must be positive and finite"),
    ],
)
def test_the_command_line_is_answered_in_one_sentence(flag: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_command_line(RECIPES, program="test", arguments=["demo", *flag.split()])


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("optimizer", "weight_decay"), math.inf, "weight_decay is inf, must not be negative or"),
        (("schedule", "samples"), 3e5, "schedule.samples is 300000.0, must be a whole number"),
        (("batch_size",), "256", "batch_size is '256', must be a number"),
        (("schedule", "samples"), 10**20, "schedule.samples is 1[0]{20}, must be less than 2"),
        (("optimizer", "weight_decay"), 10**400, "must be less than 2"),
        (("model", "image", "std"), [0.2, 0.2, -0.1], "must be positive"),
    ],
)
def test_so_is_a_recipe_that_somebody_edited(path: tuple, value: Any, sentence: str) -> None:
    encoded = json.loads(json.dumps(to_json(RECIPES["demo"]())))
    inner = encoded
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(InputError, match=sentence):
        from_json(encoded)


@dataclass(frozen=True)
class Odd:
    """Numbers in every place that a type can have them."""

    plain: float = 0.0
    either: Count | tuple[Count, Count] = 1
    several: tuple[Annotated[int, Range(least=2, below=5)], ...] = ()
    text: str = "nan"
    file: Path | None = None


def test_ranges_are_found_inside_of_types() -> None:
    check_ranges(Odd(plain=-5.0, either=(1, 2), several=(2, 3, 4)))
    for odd, words in (
        (Odd(plain=math.inf), "odd.plain is inf, must be a finite number"),
        (Odd(either=0), "odd.either is 0, must be at least 1"),
        (Odd(either=(1, 0)), r"odd.either is \(1, 0\), must be at least 1"),
        (Odd(several=(2, 5)), r"odd.several is \(2, 5\), must lie in \[2, 5\)"),
    ):
        with pytest.raises(InputError, match=words):
            check_ranges(odd, "odd")
