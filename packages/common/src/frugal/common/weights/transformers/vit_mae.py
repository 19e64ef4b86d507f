"""A folder that transformers' ``ViTMAEForPreTraining`` loads: a masked autoencoder of pixels.

A recipe describes one by ``model.decoder`` (kind, width, depth, heads), a decoder whose weights are
called ``decoder.*``, and by an objective with ``normalize_patches``; common knows no more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.contracts import Batch
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import ImageEncoder, image_encoder
from frugal.common.models.vit import ImageTower, image_table
from frugal.common.models.weight_names import VIT_MAE_DECODER, State, write_names
from frugal.common.weights.library import Target, UnsupportedOption
from frugal.common.weights.runs import open_checkpoint, trained_objective
from frugal.common.weights.transformers.config_files import image_processor, nearest_crop, processed
from frugal.common.weights.transformers.vit import (
    encoder_state,
    transformer_settings,
    unsupported_tower,
)
from frugal.common.weights.written import noise_images

_USAGE = """\
```python
from transformers import AutoImageProcessor, ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
loss = model(**processor(images, return_tensors="pt")).loss
```
"""


def target(bundle: ModelBundle) -> Target | UnsupportedOption:
    """How an image tower with a decoder of pixels is written as a ``ViTMAEForPreTraining``."""
    return _unsupported(bundle) or Target(
        usage=_USAGE,
        write=lambda folder: _write(bundle, folder),
        difference=lambda folder: _difference(bundle, folder),
        transform=nearest_crop(bundle.transform, bundle.image),
    )


class _Decoder(Protocol):
    """The settings of what predicts the hidden patches."""

    kind: str

    def tower(self, image: ImageTower) -> ImageTower:
        """The shape of its blocks and positions, on the grid of an encoder."""
        ...


@runtime_checkable
class _MaskedModel(Protocol):
    """A model that is pretrained on masked images."""

    image: ImageTower
    decoder: _Decoder


@runtime_checkable
class _PredictsPixels(Protocol):
    """An objective of masked images."""

    normalize_patches: bool


def _unsupported(bundle: ModelBundle) -> UnsupportedOption | None:
    """The first option that ``ViTMAEForPreTraining`` cannot express."""
    config = bundle.config
    if not isinstance(config, _MaskedModel):
        return UnsupportedOption(
            f"model={type(config).__name__}", "ViTMAEForPreTraining has a decoder"
        )
    recipe, tower = open_checkpoint(bundle.source.path)[1], config.image
    if config.decoder.kind != "plain":
        return UnsupportedOption(
            f"model.decoder.kind={config.decoder.kind}",
            "in the decoder of ViTMAEForPreTraining all tokens change",
        )
    if not isinstance(recipe.objective, _PredictsPixels):
        return UnsupportedOption(
            f"objective={type(recipe.objective).__name__}", "ViTMAEForPreTraining predicts pixels"
        )
    if tower.grid[0] != tower.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={tower.image_size}",
            "ViTMAEForPreTraining takes square images",
        )
    return unsupported_tower(tower)


def _write(bundle: ModelBundle, folder: Path) -> None:
    """Weights, both position tables included, configuration and image processor."""
    from transformers import ViTMAEConfig

    recipe, encoder = open_checkpoint(bundle.source.path)[1], image_encoder(bundle)
    assert isinstance(bundle.config, _MaskedModel)
    assert isinstance(recipe.objective, _PredictsPixels)
    shape = bundle.config.decoder.tower(encoder.tower)
    hidden = recipe.reduction.image.mask_ratio
    state = {f"vit.{name}": tensor for name, tensor in encoder_state(encoder).items()}
    state |= {f"decoder.{name}": tensor for name, tensor in _decoder_state(encoder, shape).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ViTMAEConfig(
        **transformer_settings(encoder.tower),
        decoder_hidden_size=shape.width,
        decoder_num_hidden_layers=shape.depth,
        decoder_num_attention_heads=shape.heads,
        decoder_intermediate_size=shape.mlp_width,
        norm_pix_loss=recipe.objective.normalize_patches,
        mask_ratio=_USUAL_RATIO if hidden is None else hidden,
        architectures=["ViTMAEForPreTraining"],
    ).save_pretrained(folder)
    image_processor(encoder.transform, encoder.tower).save_pretrained(folder)


_USUAL_RATIO = 0.75
"""Hidden patches of an image, where the reduction of a recipe has no one number of them."""


def _decoder_state(encoder: ImageEncoder, shape: ImageTower) -> State:
    prefix = "decoder."
    state = {n.removeprefix(prefix): t for n, t in encoder.rest.items() if n.startswith(prefix)}
    state["pos_embed"] = image_table(shape)
    return write_names(state, VIT_MAE_DECODER, target="transformers' ViTMAE")


@torch.no_grad()
def _difference(bundle: ModelBundle, folder: Path) -> float:
    """How far the loss of noise is from the model's, with the same patches hidden.

    Returns:
        Infinity if a loss is not finite.
    """
    from transformers import ViTMAEForPreTraining

    checkpoint, recipe = open_checkpoint(bundle.source.path)
    objective = trained_objective(recipe, checkpoint)
    pictures = noise_images(bundle.image)
    numbers = torch.arange(len(pictures))
    batch = Batch(images=pictures, sample_numbers=numbers, valid=torch.ones_like(numbers).bool())
    seen = objective.patch_view(batch)
    assert seen is not None  # it reconstructs what is not kept
    view, noise = seen
    kept = objective.reduction.keep(view, noise=noise)
    assert kept is not None
    hidden = ~kept.mask(view.num_patches)  # (B, N)
    model = ViTMAEForPreTraining.from_pretrained(folder).eval()
    # half a patch more is kept than hidden says, because transformers rounds down
    model.config.mask_ratio = (int(hidden[0].sum()) - 0.5) / view.num_patches
    written = model(pixel_values=processed(folder, pictures), noise=_ascending(hidden)).loss
    gap = float((objective(batch)[0] - written).abs())
    return gap if gap == gap else float("inf")


def _ascending(hidden: Tensor) -> Tensor:
    """(B, N) numbers of which those of the patches that stay are the lowest."""
    return hidden.float() + torch.arange(hidden.shape[1]) / (2 * hidden.shape[1])
