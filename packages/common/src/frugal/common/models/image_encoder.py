"""An image tower alone with its weights, whatever it was a part of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.fit import misfit
from frugal.common.models.positions import resample_grid
from frugal.common.models.preprocess import Preparation
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.models.weight_names import State


@dataclass(frozen=True)
class ImageEncoder:
    """An image tower and its weights."""

    tower: ImageTower
    state: State
    """By the names of ``ImageTransformer``; a fixed position table is no part of it. ``norm.*`` is
    missing where a fine-tuned model has none."""
    source: str
    """Where it was read, for people."""
    rest: State = field(default_factory=dict)
    """What the file holds besides: a decoder, a head."""
    preparation: Preparation | None = None
    """How its library prepares an image for it, where a folder of a library was read."""
    guessed: tuple[str, ...] = ()
    """Fields of the tower that the source does not say."""
    align_corners: bool = False
    """How its library resamples its position table."""
    head: tuple[Tensor, Tensor] | None = None
    """(C, D) and (C,): weight and bias of the linear layer on what it pools."""
    scores: Callable[[Tensor], Tensor] | None = None
    """The model that has that layer: (B, 3, H, W) uint8 images to (B, C)."""
    transform: CenterCrop = field(default_factory=CenterCrop)
    """How an image is prepared."""

    @property
    def embed_dim(self) -> int | None:
        """Width that the pooled vector is projected to; None without a projection."""
        projection = self.state.get("projection.weight")
        return None if projection is None else len(projection)

    @property
    def has_norm(self) -> bool:
        """Whether there is a norm behind the last block."""
        return "norm.weight" in self.state

    def _needed(self) -> State:
        with torch.device("meta"):
            return ImageTransformer(self.tower, self.embed_dim).state_dict()

    def missing(self) -> list[str]:
        """Names that the tower needs and the file has not."""
        return sorted(self._needed().keys() - self.state.keys())

    def misfit(self) -> str | None:
        """What of the weights is not of this tower, by name, count and shape; or None."""
        return misfit(self.state, self._needed())

    def build(self, *, needs_norm: bool = True) -> ImageTransformer:
        """The tower, on torch's default device, which is the CPU, in float32.

        Args:
            needs_norm: refuse weights without the last norm, which segmenters have none of.

        Raises:
            InputError: if the weights are not those of one tower.
        """
        with torch.device("meta"):
            tower = ImageTransformer(self.tower, self.embed_dim)
        tower.to_empty(device=torch.get_default_device())
        if self.tower.positions != "learned":
            tower.pos_embed.copy_(image_table(self.tower))
        if not (needs_norm or self.has_norm):
            tower.norm = nn.Identity()  # type: ignore[assignment]
        if what := misfit(self.state, tower.state_dict()):
            raise InputError(f"{self.source} does not hold one whole tower: {what}")
        tower.load_state_dict(self.state)
        return tower

    def for_images(self, size: tuple[int, int]) -> ImageEncoder:
        """The same tower for images of (height, width) pixels, its position table interpolated.

        Bicubic without anti-aliasing, as MAE's fine-tuning does it.
        """
        tower = replace(self.tower, image_size=size)
        table = self.state.get("pos_embed")
        if table is None or tower.grid == self.tower.grid:
            return replace(self, tower=tower)
        table = resample_grid(table, old_grid=self.tower.grid, new_grid=tower.grid, antialias=False)
        return replace(self, tower=tower, state={**self.state, "pos_embed": table})


def image_encoder(bundle: ModelBundle, *, with_pooled_norm: bool = True) -> ImageEncoder:
    """The image tower of a model; what stands beside it need not be of this library.

    Args:
        bundle: has an image tower of this library.
        with_pooled_norm: the norm that a classifier has on what it pools is the tower's last one;
            else it stays with the head.

    Raises:
        InputError: if it has none of this library.
    """
    tower = bundle.image
    if not isinstance(tower, ImageTower):
        raise InputError(
            f"{bundle.source.path} holds a model without an image tower of this library; only "
            "models with one can be taken apart"
        )
    weights = bundle.model.state_dict()
    state = {n.removeprefix("image."): t for n, t in weights.items() if n.startswith("image.")}
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("image.")}
    if any(name.startswith("image_head.") for name in rest):
        del state["projection.weight"]  # no projection: the first layer of a head
    for leaf in ("weight", "bias"):
        # a classifier has the norm of what it pools beside the tower
        if with_pooled_norm and (name := f"fc_norm.{leaf}") in rest:
            state[f"norm.{leaf}"] = rest.pop(name)
    head: tuple[Tensor, Tensor] | None = None
    scores: Callable[[Tensor], Tensor] | None = None
    if any(name.startswith("head.") for name in rest):
        head, scores = affine(bundle.model.get_submodule("head"), tower.width), bundle.model
    return ImageEncoder(
        replace(tower, drop_path=0.0),
        state,
        str(bundle.source.path),
        rest,
        head=head,
        scores=scores,
        transform=bundle.transform,
    )


def with_projection_as_head(encoder: ImageEncoder) -> ImageEncoder:
    """The same, its projection into the space of the texts as a linear layer without bias."""
    projection = encoder.state.get("projection.weight")
    if projection is None:
        return encoder
    tower = encoder.build().eval()
    state = {n: t for n, t in encoder.state.items() if n != "projection.weight"}
    head = (projection, projection.new_zeros(len(projection)))
    return replace(encoder, state=state, head=head, scores=tower)


@torch.no_grad()
def affine(layer: nn.Module, inputs: int) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of what is linear, such as a batch norm before a linear layer.

    Args:
        layer: in evaluation mode.
        inputs: D.
    """
    if isinstance(layer, nn.Linear):
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return layer.weight.detach(), bias.detach()
    exact = copy.deepcopy(layer).double()
    bias = exact(torch.zeros(1, inputs, dtype=torch.float64))  # (1, C)
    weight = exact(torch.eye(inputs, dtype=torch.float64)) - bias  # (D, C)
    return weight.T.float().contiguous(), bias[0].float()
