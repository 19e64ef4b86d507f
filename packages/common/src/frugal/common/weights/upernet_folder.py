"""A folder that transformers loads as ``UperNetForSemanticSegmentation`` on a BEiT backbone.

A recipe describes one by ``model.taps`` (the blocks whose outputs are the four levels),
``num_classes``, ``width``, ``auxiliary_width`` and ``pool_scales``, its weights are called
``neck.*``, ``decode_head.*`` and ``auxiliary_head.*`` as transformers calls them; common knows no
more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frugal.common.checkpoint.warm_start import load_weights
from frugal.common.models.weight_names import State
from frugal.common.weights.beit_folder import beit_settings, block_state, misfit_of_blocks
from frugal.common.weights.trained import Misfit, TrainedTower, largest_difference, noise_pictures
from frugal.common.weights.vit_folder import labels, processed

USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
made = model(**processor(images, return_tensors="pt"))
sizes = [(image.height, image.width) for image in images]
classes = processor.post_process_semantic_segmentation(made, target_sizes=sizes)
```
"""


def is_segmenter(trained: TrainedTower) -> bool:
    """Whether the recipe describes UperNet on the tower."""
    return hasattr(trained.recipe.model, "taps")


def misfit(trained: TrainedTower) -> Misfit | None:
    """The first option that ``BeitBackbone`` cannot express."""
    return misfit_of_blocks(trained.tower)


def write(trained: TrainedTower, folder: Path) -> None:
    """Weights of the tower and of both heads, configuration and image processor.

    The processor stretches a whole picture to the size of the crops of training, as BEiT's
    segmenters do, and brings scores back to the sizes of the pictures.
    """
    from transformers import (
        BeitConfig,
        SegformerImageProcessor,
        UperNetConfig,
        UperNetForSemanticSegmentation,
    )

    recipe: Any = trained.recipe
    model = recipe.model
    taps = [f"stage{tap}" for tap in model.taps]
    backbone = beit_settings(trained.tower, add_fpn=True, out_features=taps)
    theirs = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=BeitConfig(**backbone),
            hidden_size=model.width or trained.tower.width,
            pool_scales=list(model.pool_scales),
            auxiliary_channels=model.auxiliary_width,
            auxiliary_loss_weight=recipe.objective.auxiliary_weight,
            **labels(model.num_classes),
        )
    )
    theirs.load_state_dict(_state(trained))
    theirs.save_pretrained(folder)
    height, width = trained.tower.height_width
    SegformerImageProcessor(
        size={"height": height, "width": width},
        image_mean=trained.tower.mean,
        image_std=trained.tower.std,
    ).save_pretrained(folder)


def _state(trained: TrainedTower) -> State:
    state = {f"backbone.beit.{name}": tensor for name, tensor in block_state(trained).items()}
    for name, tensor in load_weights(trained.checkpoint).items():
        part, _, rest = name.removeprefix("model.").partition(".")
        if part != "image":
            state[f"backbone.fpn.{rest}" if part == "neck" else f"{part}.{rest}"] = tensor
    return state


@torch.no_grad()
def difference(trained: TrainedTower, folder: Path) -> float:
    """How far the scores of noise are from ours; infinite if one is not finite."""
    from transformers import AutoModelForSemanticSegmentation

    pictures = noise_pictures(trained.tower)
    theirs = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    scores = theirs(pixel_values=processed(folder, pictures)).logits
    return largest_difference(trained.objective().model(pictures), scores)
