"""A folder that transformers' ``ViTMAEForPreTraining`` loads: a masked autoencoder of pixels.

A recipe describes one by ``model.decoder`` (kind, width, depth, heads), a decoder whose weights are
called ``decoder.*``, and by an objective with ``normalize_patches``; common knows no more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.checkpoint.warm_start import load_weights
from frugal.common.contracts import Batch
from frugal.common.models.vit import image_table
from frugal.common.models.weight_names import VIT_MAE_DECODER, State, write_names
from frugal.common.weights.trained import Misfit, TrainedTower, noise_pictures
from frugal.common.weights.transformers_folder import image_processor
from frugal.common.weights.vit_folder import (
    encoder_state,
    misfit_of_tower,
    processed,
    transformer_settings,
)

USAGE = """\
```python
from transformers import AutoImageProcessor, ViTMAEForPreTraining

model = ViTMAEForPreTraining.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
loss = model(**processor(images, return_tensors="pt")).loss
```
"""


def misfit(trained: TrainedTower) -> Misfit | None:
    """The first option that ``ViTMAEForPreTraining`` cannot express."""
    recipe, tower = trained.recipe, trained.tower
    decoder: Any = getattr(recipe.model, "decoder", None)
    if decoder is None or not hasattr(decoder, "kind"):
        return Misfit(f"model={type(recipe.model).__name__}", "ViTMAEForPreTraining has a decoder")
    if decoder.kind != "plain":
        return Misfit(
            f"model.decoder.kind={decoder.kind}",
            "in the decoder of ViTMAEForPreTraining all tokens change",
        )
    if not hasattr(recipe.objective, "normalize_patches"):
        return Misfit(
            f"objective={type(recipe.objective).__name__}", "ViTMAEForPreTraining predicts pixels"
        )
    if tower.grid[0] != tower.grid[1]:
        return Misfit(
            f"model.image.image_size={tower.image_size}",
            "ViTMAEForPreTraining takes square images",
        )
    return misfit_of_tower(tower)


def write(trained: TrainedTower, folder: Path) -> None:
    """Weights, both position tables included, configuration and image processor."""
    from transformers import ViTMAEConfig

    recipe: Any = trained.recipe
    shape = recipe.model.decoder.tower(trained.tower)
    state = {f"vit.{name}": tensor for name, tensor in encoder_state(trained).items()}
    state |= {f"decoder.{name}": tensor for name, tensor in _decoder_state(trained, shape).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ViTMAEConfig(
        **transformer_settings(trained.tower),
        decoder_hidden_size=shape.width,
        decoder_num_hidden_layers=shape.depth,
        decoder_num_attention_heads=shape.heads,
        decoder_intermediate_size=shape.mlp_width,
        norm_pix_loss=recipe.objective.normalize_patches,
        mask_ratio=getattr(recipe.reduction.image, "mask_ratio", 0.75),
        architectures=["ViTMAEForPreTraining"],
    ).save_pretrained(folder)
    image_processor(trained, trained.tower).save_pretrained(folder)


def _decoder_state(trained: TrainedTower, shape: Any) -> State:
    prefix = "model.decoder."
    weights = load_weights(trained.checkpoint)
    state = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    state["pos_embed"] = image_table(shape)
    return write_names(state, VIT_MAE_DECODER, target="transformers' ViTMAE")


@torch.no_grad()
def difference(trained: TrainedTower, folder: Path) -> float:
    """How far the loss of noise is from ours, the same patches hidden; infinite if not finite."""
    from transformers import ViTMAEForPreTraining

    objective = trained.objective()
    pictures = noise_pictures(trained.tower)
    numbers = torch.arange(len(pictures))
    batch = Batch(images=pictures, sample_numbers=numbers, valid=torch.ones_like(numbers).bool())
    view, noise = objective.look(batch)
    hidden = ~objective.reduction.keep(view, noise=noise).mask(view.num_patches)  # (B, N)
    model = ViTMAEForPreTraining.from_pretrained(folder).eval()
    # half a patch more is kept than hidden says, because transformers rounds down
    model.config.mask_ratio = (int(hidden[0].sum()) - 0.5) / view.num_patches
    theirs = model(pixel_values=processed(folder, pictures), noise=_ascending(hidden)).loss
    ours = objective(batch)[0]
    gap = float((ours - theirs).abs())
    return gap if gap == gap else float("inf")


def _ascending(hidden: Tensor) -> Tensor:
    """(B, N) numbers of which those of the patches that stay are the lowest."""
    return hidden.float() + torch.arange(hidden.shape[1]) / (2 * hidden.shape[1])
