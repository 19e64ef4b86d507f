"""Every recipe of FLIP: its command line, its model, and what tells it from the others."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from frugal.common.cli import read_command_line
from frugal.common.contracts import Batch
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import difference
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import PositionedTokens, Truncate
from frugal.flip.recipes import RECIPES, VIRTUAL_EPOCH
from frugal.flip.text_masking import TextMasking
from support import command

pytestmark = pytest.mark.slow

SMALL = (
    "--model.image.width=8", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=8", "--model.text.width=8", "--model.text.depth=1",
    "--model.text.heads=2", "--model.text.mlp-width=8", "--model.embed-dim=4",
)  # fmt: skip
PUBLISHED = ("base", "large", "huge14", "large-laion2b", "huge14-laion2b")
STAGES = [
    *((name, "") for name in PUBLISHED),
    *((name, "-tuning") for name in PUBLISHED),
    ("large", "-tuning-336"),
    ("large-laion2b", "-tuning-336"),
]


def read(*words: str) -> Recipe:
    return read_command_line(RECIPES, program="test", arguments=list(words))[1]


def changed(one: Recipe, other: Recipe) -> set[str]:
    """Fields that decide the mathematics of a run and differ."""
    return {line.split(" was ")[0] for line in difference(one, other)}


class Words:
    """Words as tokens, without special ones."""

    def encode(self, caption: str) -> list[int]:
        return [int(word) for word in caption.split()]

    def assemble(self, ids: list[int], length: int) -> list[int]:
        return list(ids[:length])


def batch_for(recipe: Recipe) -> Batch:
    """Two pairs, as the loader would make them."""
    import numpy as np

    height, width = recipe.model.image.height_width
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    ids, positions, lengths = [], [], []
    for caption in ("3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3", "2 7 1"):
        tokens = recipe.reduction.text.encode(
            caption, Words(), length=recipe.model.text.length, generator=np.random.default_rng(0)
        )
        if isinstance(tokens, PositionedTokens):
            positions.append(tokens.positions)
            tokens, slots = tokens.ids, len(tokens.positions)
        else:
            slots = recipe.model.text.length
        ids.append(tokens + [recipe.model.text.pad_id] * (slots - len(tokens)))
        lengths.append(len(tokens))
    return Batch(
        images=images,
        sample_numbers=torch.arange(2),
        valid=torch.ones(2).bool(),
        token_ids=torch.tensor(ids),
        text_lengths=torch.tensor(lengths),
        text_positions=torch.tensor(positions) if positions else None,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_at_a_small_size(name: str) -> None:
    recipe = read(name, *SMALL)
    whole = RECIPES[name]()
    objective = recipe.objective.build(recipe)
    loss, metrics = objective(batch_for(recipe))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    # the small one differs in width alone: it saw as many tokens as the published one would
    patches = whole.model.image.num_patches
    masking = whole.reduction.image
    if isinstance(masking, RandomMasking):
        patches = masking.num_kept(patches)
    assert metrics["image_tokens"].item() == 1 + patches
    masked = isinstance(whole.reduction.text, TextMasking)
    if not whole.model.text.packed:
        assert metrics["text_tokens"].item() == (16 if masked else whole.model.text.length)


def parts_of(recipe: object) -> tuple[object, ...]:
    """The classes that a recipe is made of, which decide about its flags."""
    inner = recipe if isinstance(recipe, tuple) else ()
    if is_dataclass(recipe):
        inner = tuple(getattr(recipe, field.name) for field in fields(recipe))
    return (type(recipe), *map(parts_of, inner))


ONE_OF_EACH = {parts_of(make()): name for name, make in RECIPES.items()}.values()
"""One recipe for every set of parts: the others have the same page with other defaults."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_recipe_has_a_page_of_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(name, "--help")
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    for flag in ("--batch-size", "--schedule.samples", "--data.train", "--model.text.pad-mask"):
        assert flag in page


@pytest.mark.parametrize("name", ["large-clean-tuning-336", "ablation-text-random"])
def test_the_command_line_answers_as_a_user_calls_it(name: str) -> None:
    assert "--data.train" in command("frugal.flip.train", name, "--help").stdout


def test_every_recipe_says_what_it_is() -> None:
    for name, make in RECIPES.items():
        assert make.__doc__ and len(make.__doc__.split("\n")[0]) > 30, name


@pytest.mark.parametrize(("model", "stage"), STAGES)
def test_the_two_presets_differ_in_exactly_these_fields(model: str, stage: str) -> None:
    parity, clean = RECIPES[model + stage](), RECIPES[f"{model}-clean{stage}"]()
    assert changed(parity, clean) == {
        "model.text.pad_mask",
        "objective.clamp",
        "optimizer.no_decay",
        "schedule.samples",
        "schedule.warmup_samples",
    }
    # nothing that a resumed run may change differs either
    same = replace(
        clean,
        model=parity.model,
        objective=parity.objective,
        optimizer=parity.optimizer,
        schedule=parity.schedule,
    )
    assert same == parity


def test_the_clean_preset_mends_what_it_says() -> None:
    parity, clean = RECIPES["large"](), RECIPES["large-clean"]()
    assert (parity.model.text.pad_mask, clean.model.text.pad_mask) == (False, True)
    assert (parity.objective.clamp, clean.objective.clamp) == ("forward", "after_step")
    spared = set(clean.optimizer.no_decay) - set(parity.optimizer.no_decay)
    assert spared == {"class_token", "logit_scale"}
    assert clean.schedule.samples == 10_000 * VIRTUAL_EPOCH
    assert clean.schedule.warmup_samples == 40 * VIRTUAL_EPOCH


@pytest.mark.parametrize(("model", "stage"), STAGES)
@pytest.mark.parametrize("preset", ["", "-clean"])
def test_a_recipe_has_a_second_name_by_model_and_data(model: str, stage: str, preset: str) -> None:
    size, _, data = model.partition("-")
    tower = {"base": "vit-b16", "large": "vit-l16", "huge14": "vit-h14"}[size]
    second = f"{tower}-{data or 'laion400m'}{preset}{stage}"
    assert RECIPES[second]() == RECIPES[model + preset + stage]()


@pytest.mark.parametrize("model", [f"{n}{p}" for n in PUBLISHED for p in ("", "-clean")])
def test_tuning_differs_from_pretraining_in_masking_and_schedule_alone(model: str) -> None:
    masked, tuning = RECIPES[model](), RECIPES[f"{model}-tuning"]()
    assert changed(masked, tuning) == {
        "reduction.image.type",
        "reduction.image.mask_ratio",
        "optimizer.learning_rate_per_256",
        "schedule.samples",
        "schedule.warmup_samples",
    }
    assert isinstance(tuning.reduction.image, KeepAll)
    assert tuning.optimizer.peak(tuning.batch_size) == pytest.approx(1.024e-5)


@pytest.mark.parametrize("model", ["large", "large-clean", "large-laion2b"])
def test_tuning_at_336_pixels_differs_in_the_grid_alone(model: str) -> None:
    usual, larger = RECIPES[f"{model}-tuning"](), RECIPES[f"{model}-tuning-336"]()
    assert changed(usual, larger) == {"model.image.image_size"}
    assert larger.model.image.grid == (21, 21)
    assert larger.run.interpolate


@pytest.mark.parametrize(
    ("name", "mask_ratio", "batch"),
    [
        ("ablation-mask0-16k", 0.0, 2**14),
        ("ablation-mask50-16k", 0.5, 2**14),
        ("ablation-mask50-32k", 0.5, 2**15),
        ("ablation-mask50-64k", 0.5, 2**16),
        ("ablation-mask75-16k", 0.75, 2**14),
        ("ablation-mask75-32k", 0.75, 2**15),
        ("ablation-mask75-64k", 0.75, 2**16),
    ],
)
def test_ablations_are_short_runs_of_the_large_model(
    name: str, mask_ratio: float, batch: int
) -> None:
    recipe = RECIPES[name]()
    assert changed(RECIPES["large"](), recipe) <= {
        "reduction.image.mask_ratio",
        "batch_size",
        "schedule.samples",
        "schedule.warmup_samples",
    }
    assert recipe.reduction.image == RandomMasking(mask_ratio=mask_ratio)
    assert recipe.reduction.text == Truncate()
    assert recipe.batch_size == batch
    steps = VIRTUAL_EPOCH // batch  # of a virtual epoch
    assert recipe.steps == 2000 * steps  # 6.4 epochs of 400 million
    assert recipe.schedule.samples == recipe.steps * batch
    assert recipe.schedule.samples / 400e6 == pytest.approx(6.4, rel=0.03)
    # 4e-6 for every 256 samples of the batch
    assert recipe.optimizer.peak(batch) == pytest.approx(4e-6 * batch / 256)


@pytest.mark.parametrize(
    ("name", "order"),
    [("ablation-text-random", "random"), ("ablation-text-pad-first", "padding_first")],
)
def test_text_ablations_mask_half_of_the_text_and_nothing_else(name: str, order: str) -> None:
    plain, masked = RECIPES["ablation-mask75-64k"](), RECIPES[name]()
    fields = {"type", "mask_ratio", "order"}
    assert changed(plain, masked) == {f"reduction.text.{field}" for field in fields}
    assert masked.reduction.text.order == order
    assert masked.reduction.text.num_kept(masked.model.text.length) == 16


def test_the_readme_names_every_recipe() -> None:
    readme = Path(__file__).parents[2] / "packages" / "flip" / "README.md"
    text = readme.read_text()
    for name in RECIPES:
        plain = name.replace("-clean", "")
        plain = plain.removesuffix("-336").removesuffix("-tuning")
        assert f"`{plain}`" in text, plain
