"""Two towers and the scale of their cosines: CLIP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.models.initialize import Initialization, normal
from frugal.common.models.positions import resample_grid, resample_length
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.ranges import Count, NotNegative, check_choices, check_ranges
from frugal.common.recipe import ModelConfig, ModelInputs
from frugal.common.reduction.image import KeptPatches


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig(ModelConfig):
    """An image tower and a text tower that meet in one space."""

    image: ImageTower
    text: TextTower
    embed_dim: Count
    """Width of the space that both project to, without bias."""
    head_width: Count | None = None
    """Hidden width of heads of two linear layers with a GELU between them, as vectors of frozen
    towers may need; without it the head of a tower is one linear layer."""
    initial_logit_scale: float = math.log(1 / 0.07)
    """Logarithm of the factor on the cosines."""
    initial_logit_bias: float | None = None
    """Of the sigmoid loss; without it there is none."""
    norm_epsilon: NotNegative = 1e-8
    """Added to the length of a vector before dividing by it."""
    initialization: Initialization = "open_clip"

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        check_choices(self, "model")

    @override
    def inputs(self) -> ModelInputs:
        """Images and captions."""
        return ModelInputs(
            height_width=self.image.height_width,
            # a tower of another library sees images whole
            grid=self.image.grid if isinstance(self.image, ImageTower) else None,
            captions=self.text,
        )

    @override
    def text_tower(self) -> TextTower:
        """That of captions."""
        return self.text

    def build(self, generator: torch.Generator | None = None) -> DualEncoder:
        """The model, on the CPU in float32, with weights drawn from ``generator`` (or seed 0)."""
        return build(self, generator)


def unit(vectors: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Vectors divided by (their length + epsilon), in float32 at least."""
    if vectors.dtype in (torch.bfloat16, torch.float16):
        vectors = vectors.float()
    return vectors / (torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) + epsilon)


class DualEncoder(nn.Module):
    """Images and captions to unit vectors of one space."""

    logit_bias: nn.Parameter | None

    def __init__(self, config: DualEncoderConfig) -> None:
        """Build the layers; :func:`build` draws their weights from a generator."""
        super().__init__()
        self.config = config
        self.image: Any = config.image.module(config.head_width or config.embed_dim)
        self.text: Any = config.text.module(config.head_width or config.embed_dim)
        self.image_head, self.text_head = _second_layer(config), _second_layer(config)
        # one dimension, not none: DeepSpeed cannot take a parameter without one
        self.logit_scale = nn.Parameter(torch.full((1,), config.initial_logit_scale))
        self.register_parameter("logit_bias", None)
        if config.initial_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), config.initial_logit_bias))

    def encode_image(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, 3, H, W) images, of which only the kept patches are seen, to (B, E) unit float32.

        Images are uint8, which is normalized here, or float that is normalized already.
        """
        return self._unit_image(self.image(images, kept))

    def _unit_image(self, projected: Tensor) -> Tensor:
        return unit(self.image_head(projected), self.config.norm_epsilon)

    def encode_image_and_patches(
        self, images: Tensor, kept: KeptPatches | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and (B, D) means of the patches that are seen, after the last norm."""
        embeddings, patches = self.image(images, kept, output="embedding and patches")
        return self._unit_image(embeddings), patches

    def project_image(self, pooled: Tensor) -> Tensor:
        """(B, D) vectors that the image tower has pooled to (B, E) unit float32."""
        return self._unit_image(self.image.projection(pooled))

    def encode_text(
        self,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids, (B,) their lengths and (B, T) their slots to (B, E) unit float32.

        Without lengths a caption ends where its padding begins; for a tower that pools the end of
        the text, at its largest id, as in CLIP: give the lengths of any other tokenizer.
        """
        return self._unit_text(self.text(token_ids, text_lengths, text_positions))

    def _unit_text(self, projected: Tensor) -> Tensor:
        return unit(self.text_head(projected), self.config.norm_epsilon)

    def project_text(self, pooled: Tensor) -> Tensor:
        """(B, D) vectors that the text tower has pooled to (B, E) unit float32."""
        return self._unit_text(self.text.projection(pooled))

    def forward(
        self,
        images: Tensor,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        kept: KeptPatches | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both sides at once: two (B, E) of unit length."""
        return self.encode_image(images, kept), self.encode_text(token_ids, text_lengths)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.image.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, enabled: bool) -> None:
        for tower in (self.image, self.text):
            tower.checkpoint_activations = enabled

    @override
    def train(self, mode: bool = True) -> Self:
        """Parts of which nothing is trained stay in evaluation mode."""
        super().train(mode)
        if mode:
            _evaluate_if_frozen(self)
        return self

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every weight afresh, as ``config.initialization`` says."""
        for tower in (self.image, self.text):
            tower.initialize(generator, self.config.initialization)
        for head in (self.image_head, self.text_head):
            for layer in head.children():
                if isinstance(layer, nn.Linear):
                    normal(layer.weight, layer.in_features**-0.5, generator)
        self.logit_scale.fill_(self.config.initial_logit_scale)
        if self.logit_bias is not None and self.config.initial_logit_bias is not None:
            self.logit_bias.fill_(self.config.initial_logit_bias)


def _second_layer(config: DualEncoderConfig) -> nn.Module:
    """What follows the projection of a tower, in a head of two layers."""
    if config.head_width is None:
        return nn.Identity()
    return nn.Sequential(nn.GELU(), nn.Linear(config.head_width, config.embed_dim, bias=False))


def _evaluate_if_frozen(module: nn.Module) -> None:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        module.eval()
        return
    for part in module.children():
        _evaluate_if_frozen(part)


def build(config: DualEncoderConfig, generator: torch.Generator | None = None) -> DualEncoder:
    """A dual encoder on the CPU in float32, every weight drawn from ``generator`` (or seed 0).

    Where torch's default device is ``meta``, it stays there and has sizes alone.
    """
    with torch.device("meta"):  # else torch's layers would draw from the global generator first
        model = DualEncoder(config)
    model.to_empty(device=torch.get_default_device())
    model.initialize(generator or torch.Generator().manual_seed(0))
    return model


def resample_table(
    name: str,
    table: Tensor,
    *,
    old: ImageTower | TextTower | None,
    new: ImageTower | TextTower,
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """A learned table of a saved model for a tower of another grid or length.

    Args:
        name: of the parameter, for messages.
        table: (1, rows, D) as saved.
        old: the tower it was saved from; where that is not known, images count as square.
        new: the tower that takes it.
        antialias: see :func:`~frugal.common.models.positions.resample_grid`.
        align_corners: see there too.

    Returns:
        (1, rows', D): linear for texts, bicubic for images.

    Raises:
        InputError: if an image table does not belong to the old grid.
    """
    if isinstance(new, TextTower):
        return resample_length(table, new.length)
    front = new.num_positions - new.num_patches
    patches = table.shape[1] - front
    side = math.isqrt(max(patches, 0))
    old_grid = old.grid if isinstance(old, ImageTower) else (side, side)
    if patches != math.prod(old_grid):
        grid = f"a grid of {old_grid[0]}x{old_grid[1]}" if old is not None else "a square grid"
        raise InputError(
            f"{name} has {table.shape[1]} rows there, which are not those of {grid} patches "
            f"{'with' if front else 'without'} a position for the class token; only such a table "
            "is resampled for this model"
        )
    return resample_grid(
        table,
        old_grid=old_grid,
        new_grid=new.grid,
        antialias=antialias,
        align_corners=align_corners,
    )
