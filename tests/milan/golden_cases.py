"""Recorded runs of the reference models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from frugal.milan.decoders import Split
from frugal.milan.model import MaskedImageModel
from frugal.milan.published_weights import Published, from_published, to_published

GOLDEN = Path(__file__).parents[1] / "golden" / "milan"


@dataclass(frozen=True)
class Case:
    """One recorded model."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    published: Published

    def model(self, dtype: torch.dtype = torch.float32) -> MaskedImageModel:
        model = self.published.build().to(dtype)
        model.decoder.pos_embed = model.decoder.pos_embed.to(dtype)
        return model

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    @property
    def split(self) -> Split:
        order, keep = self.tensors["mask/ids_shuffle"], self.about["keep"]
        return Split(order[:, :keep], order[:, keep:])

    def gradients(self, model: MaskedImageModel) -> dict[str, Tensor]:
        """Those of a model by the reference's names."""
        found = {name: p.grad for name, p in model.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        return to_published(found, self.published.model)  # type: ignore[arg-type]


def case(name: str) -> Case:
    about = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    config = about["config"]
    published = from_published(
        state,
        source=name,
        heads=config["num_heads"],
        decoder_heads=config["decoder_num_heads"],
    )
    return Case(about, tensors, published)


def in_image_order(predicted: Tensor, split: Split) -> Tensor:
    """(B, 1 + N, K) as the decoder has them, to the order of the image."""
    return predicted.gather(1, split.order.argsort(1)[:, :, None].expand_as(predicted))
