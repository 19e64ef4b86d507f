"""A folder that transformers loads as ``UperNetForSemanticSegmentation`` on a BEiT backbone.

A recipe describes one by ``model.taps`` (the blocks whose outputs are the four levels),
``num_classes``, ``width``, ``auxiliary_width`` and ``pool_scales``, its weights are called
``neck.*``, ``decode_head.*`` and ``auxiliary_head.*`` as transformers calls them; common knows no
more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.weight_names import State
from frugal.common.weights.library import Target, UnsupportedOption
from frugal.common.weights.runs import open_checkpoint
from frugal.common.weights.transformers.config_files import labels, nearest_crop, processed
from frugal.common.weights.transformers.vit import beit_settings, block_state, unsupported_blocks
from frugal.common.weights.written import largest_difference, noise_images

_USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
made = model(**processor(images, return_tensors="pt"))
sizes = [(image.height, image.width) for image in images]
classes = processor.post_process_semantic_segmentation(made, target_sizes=sizes)
```
"""


@runtime_checkable
class _SegmenterConfig(Protocol):
    """The settings of UperNet on an image tower, which are those of transfer learning."""

    taps: tuple[int, int, int, int]
    num_classes: int
    width: int | None
    auxiliary_width: int
    pool_scales: tuple[int, ...]


def is_segmenter(bundle: ModelBundle) -> bool:
    """Whether the model is UperNet on an image tower."""
    return isinstance(bundle.config, _SegmenterConfig)


def target(bundle: ModelBundle) -> Target | UnsupportedOption:
    """How a segmenter is written as ``UperNetForSemanticSegmentation``."""
    return unsupported_blocks(image_encoder(bundle).tower) or Target(
        usage=_USAGE,
        write=lambda folder: _write(bundle, folder),
        difference=lambda folder: _difference(bundle, folder),
        transform=nearest_crop(bundle.transform, bundle.image),
    )


def _write(bundle: ModelBundle, folder: Path) -> None:
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

    model = bundle.config
    assert isinstance(model, _SegmenterConfig)
    encoder = image_encoder(bundle)
    taps = [f"stage{tap}" for tap in model.taps]
    backbone = beit_settings(encoder.tower, add_fpn=True, out_features=taps)
    segmenter = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=BeitConfig(**backbone),
            hidden_size=model.width or encoder.tower.width,
            pool_scales=list(model.pool_scales),
            auxiliary_channels=model.auxiliary_width,
            auxiliary_loss_weight=_auxiliary_weight(bundle),
            **labels(model.num_classes),
        )
    )
    segmenter.load_state_dict(_state(encoder))
    segmenter.save_pretrained(folder)
    height, width = encoder.tower.height_width
    SegformerImageProcessor(
        size={"height": height, "width": width},
        image_mean=encoder.tower.mean,
        image_std=encoder.tower.std,
    ).save_pretrained(folder)


def _state(encoder: ImageEncoder) -> State:
    state = {f"backbone.beit.{name}": tensor for name, tensor in block_state(encoder).items()}
    for name, tensor in encoder.rest.items():
        part, _, rest = name.partition(".")
        state[f"backbone.fpn.{rest}" if part == "neck" else f"{part}.{rest}"] = tensor
    return state


@torch.no_grad()
def _difference(bundle: ModelBundle, folder: Path) -> float:
    """How far the scores of noise are from the model's; infinite if one is not finite."""
    from transformers import AutoModelForSemanticSegmentation

    pictures = noise_images(bundle.image)
    segmenter = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    scores = segmenter(pixel_values=processed(folder, pictures)).logits
    return largest_difference(bundle.model(pictures), scores)


def _auxiliary_weight(bundle: ModelBundle) -> float:
    """Of the auxiliary head's loss in training; of no account where the model is only used."""
    objective: Any = open_checkpoint(bundle.source.path)[1].objective
    return objective.auxiliary_weight
