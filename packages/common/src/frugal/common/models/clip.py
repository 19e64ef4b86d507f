"""Two towers and the scale of their cosines."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.models.config import DualEncoderConfig
from frugal.common.models.initialize import initialize_flip, initialize_open_clip
from frugal.common.reduction.image import Kept


def unit(vectors: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Vectors divided by (their length + epsilon), in float32 at least."""
    if vectors.dtype in (torch.bfloat16, torch.float16):
        vectors = vectors.float()
    return vectors / (torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) + epsilon)


class DualEncoder(nn.Module):
    """Images and captions to unit vectors of one space."""

    logit_bias: nn.Parameter | None

    def __init__(self, config: DualEncoderConfig) -> None:
        """Weights start as torch's layers do; :func:`build` draws them from a generator."""
        super().__init__()
        self.config = config
        self.image: Any = config.image.module(config.embed_dim)
        self.text: Any = config.text.module(config.embed_dim)
        # one dimension, not none: DeepSpeed cannot take a parameter without one
        self.logit_scale = nn.Parameter(torch.full((1,), config.initial_logit_scale))
        self.register_parameter("logit_bias", None)
        if config.initial_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.full((1,), config.initial_logit_bias))

    def encode_image(self, images: Tensor, kept: Kept | None = None) -> Tensor:
        """(B, 3, H, W) images, of which only the kept patches are seen, to (B, E) unit float32."""
        return unit(self.image(images, kept), self.config.norm_epsilon)

    def encode_text(
        self,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids, (B,) their lengths and (B, T) their slots to (B, E) unit float32."""
        return unit(self.text(token_ids, text_lengths, text_positions), self.config.norm_epsilon)

    def forward(
        self,
        images: Tensor,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both sides at once: two (B, E) of unit length."""
        return self.encode_image(images, kept), self.encode_text(token_ids, text_lengths)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.image.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        for tower in (self.image, self.text):
            tower.checkpoint_activations = wanted

    @override
    def train(self, mode: bool = True) -> Self:
        """Parts of which nothing is trained stay in evaluation mode."""
        super().train(mode)
        if mode:
            _rest_if_frozen(self)
        return self

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw every weight afresh, as ``config.initialization`` says."""
        flip = self.config.initialization == "flip"
        start = initialize_flip if flip else initialize_open_clip
        for tower in (self.image, self.text):
            own = getattr(tower, "initialize", None)  # another library's, which knows its scheme
            start(tower, generator) if own is None else own(generator)
        self.logit_scale.fill_(self.config.initial_logit_scale)
        if self.logit_bias is not None and self.config.initial_logit_bias is not None:
            self.logit_bias.fill_(self.config.initial_logit_bias)


def _rest_if_frozen(module: nn.Module) -> None:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        module.eval()
        return
    for part in module.children():
        _rest_if_frozen(part)


def build(config: DualEncoderConfig, generator: torch.Generator | None = None) -> DualEncoder:
    """A dual encoder on the CPU in float32, every weight drawn from ``generator`` (or seed 0)."""
    with torch.device("meta"):  # else torch's layers would draw from the global generator first
        model = DualEncoder(config)
    model.to_empty(device="cpu")
    model.initialize(generator or torch.Generator().manual_seed(0))
    return model
