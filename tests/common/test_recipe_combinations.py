"""Every image reduction x text reduction x objective trains a step or is refused in a sentence."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from frugal.cit.objective import LockedContrastive
from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.engine.rehearsal import _made_up, rehearse
from frugal.common.engine.step import train_step
from frugal.common.errors import InputError
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import NoiseSource
from frugal.common.recipe import EngineOptions, Recipe, Reductions
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.run import Run, make_logger
from frugal.common.train import make_engine, train_recipe
from frugal.flip.recipes import demo
from frugal.milan.recipes import demo_pixels
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING
from support import ROOT

IMAGE = ImageTower(width=16, depth=1, heads=2, mlp_width=32, patch_size=8, image_size=32)
LEARNED = replace(IMAGE, depth=4)


def with_tower(recipe: Recipe, tower: ImageTower) -> Recipe:
    return replace(recipe, model=replace(recipe.model, image=tower))


def contrastive() -> Recipe:
    recipe = demo()
    text = TextTower(width=16, depth=1, heads=2, mlp_width=32, length=8)
    return replace(recipe, model=replace(recipe.model, image=IMAGE, text=text, embed_dim=8))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "contrastive": contrastive,
    "locked": lambda: replace(
        contrastive(), objective=LockedContrastive(train_image="all", train_text="all")
    ),
    "pixels": lambda: with_tower(demo_pixels(), IMAGE),
    "classes": lambda: with_tower(FINE_TUNING["demo"](), LEARNED),
    "probe": lambda: with_tower(LINEAR_PROBING["demo"](), LEARNED),
    "segments": lambda: with_tower(SEGMENTATION["demo"](), LEARNED),
}


def strategies(method: str) -> Iterator[type]:
    """The reductions of every package: dataclasses with a method that keeps patches or tokens."""
    for file in sorted(ROOT.glob("packages/*/src/frugal/**/*.py")):
        if f"def {method}(" not in file.read_text() or "dataclass(frozen" not in file.read_text():
            continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts[3:])
        for kind in vars(importlib.import_module(name)).values():
            is_own = is_dataclass(kind) and getattr(kind, "__module__", "") == name
            if is_own and isinstance(kind, type) and hasattr(kind, method):
                yield kind


IMAGES = {kind.__name__: kind for kind in strategies("keep")}
TEXTS = {"None": None} | {kind.__name__: kind for kind in strategies("encode")}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe_of(name: str, image: Any, text: Any) -> Recipe:
    return replace(
        RECIPES[name](),
        reduction=Reductions(image=image, text=text),
        batch_size=2,
        engine=EngineOptions(device="cpu", precision="float32", threads=1),
    )


def one_step(name: str, image: Any, text: Any, folder: Path) -> None:
    """Build, rehearse and take a step."""
    recipe = recipe_of(name, image, text)
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    engine = make_engine(recipe.objective.build(recipe), recipe, run)
    rehearse(engine, recipe, run)
    batch = _made_up(recipe, first=0, count=2)
    if batch is not None:
        assert train_step(engine, recipe, 0, [batch]).norm.isfinite()


def test_the_product_is_of_all_there_are() -> None:
    assert {"KeepAll", "RandomMasking", "GridMasking", "ClusterMasking", "SemanticSampling"} <= {
        *IMAGES
    }
    assert {"Truncate", "TextMasking", "SyntaxMasking", "FrequencyMasking"} <= {*TEXTS}


def is_tried(name: str, image: str, text: str) -> bool:
    """Every pair, but where both towers see all combinations only one of the two is changed."""
    return name not in ("contrastive", "locked") or image == "KeepAll" or text == "Truncate"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_refused_trains(name: str, tmp_path: Path) -> None:
    refused: dict[tuple[str, str], str] = {}
    pairs = [(i, t) for i in IMAGES for t in TEXTS if is_tried(name, i, t)]
    for image_name, text_name in pairs:
        image, text = IMAGES[image_name], TEXTS[text_name]
        options = {"threshold": 0.3} if image is ClusterMasking else {}
        try:
            one_step(name, image(**options), text and text(), tmp_path / "run")
        except InputError as error:
            refused[image_name, text_name] = str(error)
    assert not (tmp_path / "run").exists()
    trained = set(pairs) - refused.keys()
    assert trained, refused
    for pair, sentence in refused.items():
        assert len(sentence.split(". ")) == 1, (pair, sentence)
    if name in ("classes", "probe", "pixels", "segments"):
        assert {text for _, text in trained} == {"None"}
    if name == "pixels":
        assert not {"KeepAll", "ClusterMasking"} & {image for image, _ in trained}
    if name != "segments":
        assert ("RandomMasking", "None" if "None" in {t for _, t in trained} else "Truncate") in (
            trained
        )


@pytest.mark.parametrize("name", ["classes", "probe"])
def test_a_classifier_cannot_search_a_threshold(name: str) -> None:
    with pytest.raises(InputError, match=r"looks for its threshold .* --reduction.image.threshold"):
        recipe_of(name, ClusterMasking(), None)


@dataclass(frozen=True, kw_only=True)
class HidesNothing(RandomMasking):
    """Says that it masks, and keeps every patch."""

    def keep(self, view: PatchView, *, noise: NoiseSource) -> None:
        del view, noise


def test_a_mistake_of_the_first_step_blocks_no_directory(scenes: Path, tmp_path: Path) -> None:
    recipe = recipe_of("pixels", HidesNothing(), None)
    recipe = replace(
        recipe,
        data=replace(recipe.data, train=(str(scenes / "train"),)),
        schedule=replace(recipe.schedule, samples=4, warmup_samples=0),
        run=replace(recipe.run, dir=tmp_path / "run"),
    )
    with pytest.raises(InputError, match="keeps every patch, so that nothing is left to"):
        train_recipe(recipe)
    assert not (tmp_path / "run").exists()
