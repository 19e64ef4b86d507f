"""What was trained, on its way into another library: two towers, or an image tower alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from frugal.common.checkpoint.store import Checkpoint
from frugal.common.checkpoint.warm_start import trained_objective
from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder
from frugal.common.files import reason_of
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.models.weight_names import State
from frugal.common.recipe import Recipe
from frugal.common.run import make_logger

_CAPTIONS = [
    "a photo of a cat",
    "Two red circles, left of 3 blue squares!",
    "it's the dog's ball; isn't it GREAT? (naïve café, 7½)",
    "a very long caption " * 30,
]


class Embedded(NamedTuple):
    """What a model makes of some pictures and captions."""

    images: Tensor
    """(B, E) unit vectors."""
    texts: Tensor
    """(C, E) unit vectors."""
    logit: Tensor
    """(1,) the logarithm of the scale on the cosines; (2,) with the bias of a sigmoid loss."""


Embed = Callable[[Path, Tensor, list[str]], Embedded]
"""What a library makes of (B, 3, H, W) uint8 pictures and of captions with a written folder."""


class Misfit(NamedTuple):
    """An option of a model that another library has no place for."""

    option: str
    reason: str


def misfit_of_projector(tower: ImageTower) -> Misfit | None:
    """What no other library has behind its vision transformers."""
    if tower.projector_width is None:
        return None
    return Misfit(
        f"model.image.projector_width={tower.projector_width}",
        "its vision transformers have no MLP with batch norms behind what they pool",
    )


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A checkpoint and what is known of the run it is from."""

    recipe: Recipe
    checkpoint: Checkpoint
    folder: Path
    """The run directory."""
    numbers: dict[str, dict[str, Any]]
    """What this checkpoint was measured at, by task."""
    average: bool = True
    """Whether it leaves with the moving average of its weights, where the run kept one."""

    @property
    def reads_captions(self) -> bool:
        """Whether it has a text tower."""
        return hasattr(self.recipe.model, "text")

    def objective(self) -> Any:
        """What was trained, with these weights, on the CPU, in evaluation mode."""
        return trained_objective(self.recipe, self.checkpoint.folder, log=make_logger(0))

    @property
    def crop(self) -> CenterCrop:
        """Which part of an image the first evaluation of the recipe shows the model."""
        crops = (getattr(task, "crop", None) for task in self.recipe.evaluation)
        return next((crop for crop in crops if isinstance(crop, CenterCrop)), CenterCrop())

    def crop_in(self, library: str) -> CenterCrop:
        """The nearest to :attr:`crop` that open_clip, transformers or timm has."""
        crop = self.crop
        height, width = self.recipe.model.image.height_width
        is_stretched = crop.order == "stretch"
        if library == "transformers" and height != width:
            is_stretched = True  # its crops of another shape have borders
        kernel = crop.interpolation
        has_bicubic_alone = library == "open_clip" and height != width and not is_stretched
        if kernel.startswith("tf") or has_bicubic_alone:
            kernel = "bicubic"
        if library == "open_clip" and kernel != "bilinear":
            kernel = "bicubic"
        share = 1.0 if library == "open_clip" else crop.share
        cuts_down = library == "transformers" and (share < 1 or not is_stretched)
        return CenterCrop(
            order="stretch" if is_stretched else "resize_first",
            interpolation=kernel,
            share=share,
            half_pixel="down" if cuts_down else "even",
        )


class Seen(NamedTuple):
    """What an image tower makes of some pictures."""

    said: Tensor | None
    """(B, C) what its head says, or, where there is none, (B, D) what it pools."""
    tokens: Tensor | None = None
    """(B, [1 +] N, D) after the last norm; before it, where that acts on the pooled vector."""


See = Callable[[Path, Tensor], Seen]
"""What a library makes of (B, 3, H, W) uint8 pictures with a written folder, without gradients."""


@dataclass(frozen=True, kw_only=True)
class TrainedTower(TrainedRun):
    """A trained image tower, perhaps with a linear layer on what it pools."""

    tower: ImageTower
    state: State
    """Of an ``ImageTransformer`` without projection; without ``norm.*`` where it has no last
    norm."""
    head: tuple[Tensor, Tensor] | None = None
    """(C, D) and (C,): weight and bias of the linear layer."""
    scores: Callable[[Tensor], Tensor] | None = None
    """The model that has that layer: (B, 3, H, W) uint8 pictures to (B, C)."""

    @property
    def reads_captions(self) -> bool:
        """False: where the run has a text tower, it stays behind."""
        return False

    @property
    def has_norm(self) -> bool:
        """Whether there is a norm behind the last block."""
        return "norm.weight" in self.state

    def build(self) -> ImageTransformer:
        """The tower, on the CPU, in evaluation mode.

        Raises:
            InputError: if its weights are not those of one tower.
        """
        transformer = ImageTransformer(self.tower)
        if not self.has_norm:
            transformer.norm = nn.Identity()  # type: ignore[assignment]
        try:
            transformer.load_state_dict(self.state)
        except RuntimeError as error:
            reason = reason_of(error, last_line=True)
            raise InputError(f"{self.folder} does not hold one whole tower: {reason}") from None
        return transformer.eval()

    @torch.no_grad()
    def difference(self, see: See, folder: Path) -> float:
        """How far what another library sees is from ours, for noise: the largest difference."""
        pictures = noise_pictures(self.tower)
        ours, theirs = self._see(pictures), see(folder, pictures)
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
        return max(largest_difference(cast("Tensor", mine), other) for mine, other in pairs)

    def _see(self, pictures: Tensor) -> Seen:
        transformer = self.build()
        said = transformer.forward_pooled if self.scores is None else self.scores
        return Seen(said(pictures), transformer.forward_tokens(pictures))


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """That of two numbers at one place, over the largest of ours where that is above 1.

    Returns:
        Infinity if the shapes differ or a number is not finite.
    """
    if ours.shape != theirs.shape or not (ours - theirs).isfinite().all():
        return float("inf")
    return float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))


def noise_pictures(tower: ImageTower) -> Tensor:
    """(4, 3, H, W) uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, *tower.height_width)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


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


class OwnTowers(NamedTuple):
    """Whether each tower is of this library."""

    image: bool
    text: bool


@dataclass(frozen=True, kw_only=True)
class TrainedModel(TrainedRun):
    """Two trained towers and everything that is needed to use them."""

    model: DualEncoder
    """On the CPU in float32, in evaluation mode."""

    @property
    def config(self) -> DualEncoderConfig:
        """The towers."""
        return self.model.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that the run keeps, or else the one that its recipe names.

        Raises:
            InputError: if it cannot be loaded, or has ids that the model has no row for.
        """
        data: Any = self.recipe.data
        tokenizer, rows = data.tokenizer.load(), self.config.text.vocabulary
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"the tokenizer of {self.folder} has {tokenizer.vocab_size:,} entries for the "
                f"{rows:,} rows of the model's token table; export the run with the tokenizer it "
                "was trained with"
            )
        return tokenizer

    @property
    def has_own_towers(self) -> OwnTowers:
        """Which towers are of this library, and not models of another one."""
        image, text = self.config.image, self.config.text
        return OwnTowers(isinstance(image, ImageTower), isinstance(text, TextTower))

    @property
    def captions_end(self) -> bool:
        """Whether a caption ends with a token that does not begin it too."""
        end = self.tokenizer.end_id
        return end is not None and end not in self.tokenizer.prefix

    @property
    def image(self) -> TrainedTower:
        """The image tower alone; the projection is its linear layer."""
        tower, state = self.model.image, self.model.image.state_dict()
        projection = state.pop("projection.weight")
        return TrainedTower(
            recipe=self.recipe,
            checkpoint=self.checkpoint,
            folder=self.folder,
            numbers=self.numbers,
            tower=replace(self.config.image, drop_path=0.0),
            state=state,
            head=(projection, projection.new_zeros(len(projection))),
            scores=tower,
        )

    def difference(self, embed: Embed, folder: Path) -> float:
        """How far another library's embeddings are from ours, for noise and a few captions.

        Returns:
            The largest difference of a number; infinite if one is not finite.
        """
        pictures = noise_pictures(self.config.image)
        with torch.no_grad():
            ours, theirs = self._embed(pictures), embed(folder, pictures, _CAPTIONS)
        worst = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            if mine.shape != other.shape or not (mine - other).isfinite().all():
                return float("inf")
            worst = max(worst, (mine - other).abs().max().item())
        return worst

    def _embed(self, pictures: Tensor) -> Embedded:
        embedder = Embedder(
            self.model,
            self.tokenizer,
            context_length=self.config.text.length,
            device=torch.device("cpu"),
        )
        logit: list[Tensor] = [self.model.logit_scale]
        if self.model.logit_bias is not None:
            logit.append(self.model.logit_bias)
        return Embedded(embedder.images(pictures), embedder.texts(_CAPTIONS), torch.cat(logit))
