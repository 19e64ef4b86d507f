"""The named runs have the numbers of the paper's configurations."""

import pytest

from frugal.cit.curated_data import CuratedData
from frugal.cit.recipes import RECIPES
from frugal.common.evaluation.task_labels import TASKS
from frugal.common.recipe_json import from_json, to_json

PUBLISHED = {
    "yfcc15m-in1k-moco-b16": (16_384, 0.55, 0.003, "set", 2_048),
    "yfcc100m-in1k-moco-b16": (16_384, 0.7, 0.01, "list", 2_048),
    "yfcc15m-food101-moco-b16": (1_536, 0.45, 0.05, "list", 3_072),
}
"""Batch, threshold, least share, collection, twice the batch of a GPU."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_has_its_numbers(name: str) -> None:
    recipe = RECIPES[name]()
    data = recipe.data
    assert isinstance(data, CuratedData)
    found = (recipe.batch_size, data.threshold, data.min_ratio, data.keep, data.scan)
    assert found == PUBLISHED[name]
    assert (recipe.steps, data.period) == (5_000, 100)
    assert recipe.schedule.warmup_samples == 200 * recipe.batch_size
    rates = [
        recipe.schedule.learning_rate(step * recipe.batch_size, peak=5e-4)
        for step in (0, 200, 5_000)
    ]
    assert rates == pytest.approx([0, 5e-4, 1e-5])
    assert data.text_names == ("title", "desc", "tag")
    assert data.tag_places == (2,)
    assert (recipe.model.text.length, recipe.model.image.image_size) == (32, 224)
    assert recipe.model.embed_dim == 512


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_built_and_read_back(name: str) -> None:
    recipe = RECIPES[name]()
    assert from_json(to_json(recipe)) == recipe
    assert (RECIPES[name].__doc__ or "").strip()


def test_there_is_a_run_for_every_task() -> None:
    for task in TASKS:
        data = RECIPES[f"yfcc15m-{task.replace('_', '-')}-moco-b16"]().data
        assert isinstance(data, CuratedData)
        assert data.metadata.sources == (task,)
