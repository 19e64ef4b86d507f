"""Every recipe: its command line, its model, and what tells it from the others."""

import pytest
import torch

from frugal.cluster_masking.clusters import most_kept, num_anchors
from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.recipes import RECIPES
from frugal.common.cli import read_command_line
from frugal.common.contracts import Batch
from frugal.common.models.clip import DualEncoder
from frugal.common.models.named import clip_encoder
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import difference, from_json, to_json
from frugal.common.reduction.random_masking import RandomMasking
from support import command, run_code

pytestmark = pytest.mark.slow

SMALL = (
    "--model.image.width=8", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=8", "--model.text.width=8", "--model.text.depth=1",
    "--model.text.heads=2", "--model.text.mlp-width=8", "--model.embed-dim=4",
)  # fmt: skip
CLUSTERED = [n for n, make in RECIPES.items() if isinstance(make().reduction.image, ClusterMasking)]


def read(*words: str) -> Recipe:
    return read_command_line(RECIPES, program="test", arguments=list(words))[1]


def changed(one: str, other: str) -> set[str]:
    lines = difference(RECIPES[one](), RECIPES[other]())
    return {line.split(" was ")[0] for line in lines}


def test_the_published_run() -> None:
    recipe = RECIPES["vit-b16-cc12m"]()
    assert recipe.batch_size == 8 * 256
    assert recipe.steps == 171_520 == 32 * 5_360
    # every process reads whole batches for each of its 8 loader processes
    per_loader = -(-10_968_539 // (2048 * 8))
    assert recipe.steps == 32 * per_loader * 8
    assert recipe.schedule.samples == 171_520 * 2_048
    assert recipe.schedule.warmup_samples == 2_000 * 2_048
    peak = recipe.optimizer.peak(recipe.batch_size)
    assert peak == 5e-4
    masking = recipe.reduction.image
    assert isinstance(masking, ClusterMasking)
    assert (masking.anchor_ratio, masking.target_mask_ratio, masking.min_mask_ratio) == (
        0.03, 0.5, 0.3,
    )  # fmt: skip
    assert masking.threshold is None and masking.calibration_images >= 1000
    patches = recipe.model.image.num_patches
    assert (patches, num_anchors(patches, 0.03), most_kept(patches, 0.3)) == (196, 6, 137)
    assert (recipe.optimizer.betas, recipe.optimizer.epsilon) == ((0.9, 0.98), 1e-6)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip_norm) == (0.2, None)
    assert recipe.data.augmentation.scale == (0.9, 1.0) and recipe.data.augmentation.flip == 0
    assert recipe.run.seed == 0 and recipe.data.workers == 8


def test_the_learning_rate_of_the_published_run_to_half_a_thousandth_of_its_peak() -> None:
    import math

    recipe = RECIPES["vit-b16-cc12m"]()
    for step in (0, 1, 999, 1_999, 2_000, 2_001, 80_000, 171_519):
        if step < 2_000:
            published = 5e-4 * (step + 1) / 2_000
        else:
            done = (step - 2_000) / (171_520 - 2_000)
            published = 0.5 * (1 + math.cos(math.pi * done)) * 5e-4
        ours = recipe.schedule.learning_rate(step * recipe.batch_size, peak=5e-4)
        assert ours == pytest.approx(published, abs=2.6e-7)


def test_weight_decay_acts_on_matrices_alone() -> None:
    recipe = RECIPES["vit-b16-cc12m"]()
    with torch.device("meta"):
        model = DualEncoder(recipe.model)
    decayed = recipe.optimizer.decayed_names(model)
    # of the published names: fewer than two dimensions, or one of these words
    spared = {
        name
        for name, weight in model.named_parameters()
        if weight.squeeze().ndim < 2 or "norm" in name or "bias" in name or "scale" in name
    }
    assert decayed == {name for name, _ in model.named_parameters()} - spared
    assert {"image.pos_embed", "text.pos_embed", "text.token_embedding.weight"} <= decayed
    assert "image.cls_token" not in decayed


def test_the_towers_are_ordinary_clip() -> None:
    for name, size in (("vit-b16-cc12m", "B/16"), ("vit-l16-cc12m", "L/16")):
        model, plain = RECIPES[name]().model, clip_encoder(size)
        assert model.image == plain.image
        assert {k for k, v in vars(model.text).items() if v != getattr(plain.text, k)} == {"packed"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit-b16-cc12m-embeddings", {"use_embeddings"}),
        ("vit-b16-cc12m-anchors1", {"anchor_ratio"}),
        ("vit-b16-cc12m-anchors5", {"anchor_ratio"}),
        ("vit-b16-cc12m-anchors10", {"anchor_ratio"}),
        ("vit-b16-cc12m-threshold50", {"threshold", "target_mask_ratio"}),
        ("vit-b16-cc12m-threshold70", {"threshold", "target_mask_ratio"}),
        ("vit-b16-cc12m-min0", {"min_mask_ratio"}),
        ("vit-b16-cc12m-min15", {"min_mask_ratio"}),
        ("vit-b16-cc12m-min40", {"min_mask_ratio"}),
        ("vit-b16-cc12m-min50", {"min_mask_ratio"}),
    ],
)
def test_an_ablation_changes_nothing_else(name: str, fields: set[str]) -> None:
    assert changed("vit-b16-cc12m", name) == {f"reduction.image.{field}" for field in fields}


@pytest.mark.parametrize(
    ("clusters", "random"), [("vit-b16-cc12m", "vit-b16-cc12m-random"), ("demo", "demo-random")]
)
def test_the_random_baseline_masks_the_same_share_and_differs_in_nothing_else(
    clusters: str, random: str
) -> None:
    assert all(field.startswith("reduction.image.") for field in changed(clusters, random))
    masking = RECIPES[clusters]().reduction.image
    assert isinstance(masking, ClusterMasking)
    assert RECIPES[random]().reduction.image == RandomMasking(mask_ratio=masking.target_mask_ratio)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_travels_as_json_and_says_what_it_is(name: str) -> None:
    recipe = RECIPES[name]()
    assert from_json(to_json(recipe)) == recipe
    assert len((RECIPES[name].__doc__ or "").split("\n")[0]) > 30


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_at_a_small_size(name: str) -> None:
    words = [*SMALL]
    if RECIPES[name]().reduction.image != RandomMasking(mask_ratio=0.5):
        words.append("--reduction.image.threshold=0.4")
    recipe = read(name, *words)
    objective = recipe.objective.build(recipe)
    loss, metrics = objective(batch_for(recipe))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert 0 < metrics["mask_ratio"] < 1


def batch_for(recipe: Recipe) -> Batch:
    """Three pairs of smooth pictures, so that the images keep different numbers of patches."""
    height, width = recipe.model.image.height_width
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    images = images + torch.tensor([0.0, 0.1, 0.3]).view(3, 1, 1, 1) * torch.rand(
        3, 3, height, width, generator=generator
    )
    ids = torch.zeros(3, recipe.model.text.length, dtype=torch.long)
    ids[:, :5] = torch.tensor([49406, 320, 1125, 530, 49407])
    return Batch(
        images=(255 * images.clamp(0, 1)).to(torch.uint8),
        token_ids=ids,
        text_lengths=torch.tensor([5, 5, 5]),
        sample_numbers=torch.arange(3),
        valid=torch.ones(3, dtype=torch.bool),
    )


@pytest.mark.parametrize("name", CLUSTERED)
def test_every_field_of_the_masking_is_a_flag(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(name, "--help")
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    for field in ("anchor-ratio", "threshold", "target-mask-ratio", "min-mask-ratio", "tolerance",
                  "search-images", "use-embeddings"):  # fmt: skip
        assert f"--reduction.image.{field}" in page
    assert "--reduction.image.calibrated" not in page


def test_recipes_need_nothing_slower_than_torch_and_the_command_line_answers() -> None:
    check = (
        "import sys; from frugal.cluster_masking.recipes import RECIPES;"
        "[make() for make in RECIPES.values()]; sys.exit('matplotlib' in sys.modules)"
    )
    assert run_code(check).returncode == 0
    result = command("frugal.cluster_masking.train", "vit-b16-cc12m", "--help")
    assert "--reduction.image.threshold" in result.stdout
