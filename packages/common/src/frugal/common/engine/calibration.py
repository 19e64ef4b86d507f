"""What an image reduction finds out on the first images of a run, before it trains."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from frugal.common.checkpoint.store import Checkpoint
from frugal.common.contracts import Batch
from frugal.common.distributed import gather_objects
from frugal.common.engine.engine import Engine
from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import with_calibrated
from frugal.common.reduction.image import PatchView
from frugal.common.run import Run


def calibrate_reduction(
    recipe: Recipe, run: Run, engine: Engine, checkpoint: Checkpoint | None
) -> Recipe:
    """The recipe with its image reduction calibrated, which the objective uses from then on.

    Every process calls this; a run that is continued goes on with what it found at its start.

    Raises:
        InputError: if the reduction wants images that the objective cannot show.
    """
    if checkpoint is not None:
        recipe = with_calibrated(recipe, checkpoint.recipe())
    image = recipe.reduction.image
    if not image.calibrated:
        return recipe
    if image.calibration_images:
        # curated data writes what it chose, here for nobody
        with tempfile.TemporaryDirectory() as folder:
            elsewhere = replace(run, dir=Path(folder))
            views = _first_views(recipe, elsewhere, engine, images=image.calibration_images)
            image = image.calibrate(views, gather=gather_objects, log=run.log)
    engine.objective.reduction = image
    return replace(recipe, reduction=replace(recipe.reduction, image=image))


def _first_views(
    recipe: Recipe, run: Run, engine: Engine, *, images: int
) -> Iterator[tuple[PatchView, NoiseSource]]:
    """The first images that this process will train on, damaged ones left out, and their noise.

    Raises:
        InputError: if the objective shows none.
    """
    stream = recipe.data.build(recipe, run, first_sample=0, state={}, engine=engine)
    virtual = recipe.virtual_per_process(run.world_size)
    micro_batch = recipe.batch_size // recipe.engine.accumulate
    missing = math.ceil(images / micro_batch) * virtual
    for batch in islice(stream, missing):
        missing -= 1
        valid = batch.valid
        whole = Batch(
            images=batch.images[valid],
            sample_numbers=batch.sample_numbers[valid],
            valid=valid[valid],
        )
        view = engine.objective.patch_view(whole.to(run.device))
        if view is None:
            raise InputError(
                "reduction.image looks for its settings on the first images of a run, which this "
                "objective does not show; give them on the command line"
            )
        yield view
    if missing > 0:
        run.log.warning(
            "reduction.image wants to look at %s images, of which the run does not have the last "
            "%s",
            f"{images:,}",
            f"{missing * micro_batch // virtual:,}",
        )
