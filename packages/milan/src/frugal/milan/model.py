"""The encoder that is kept and the decoder that it is trained with, as one module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.models.flops import block_flops, image_flops
from frugal.common.models.initialize import initialize_xavier
from frugal.common.models.named import image_tower
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.recipe import ModelConfig, ModelInputs
from frugal.common.reduction.image import KeptPatches
from frugal.milan.decoders import Decoder, DecoderConfig, PlainDecoder, PromptingDecoder, Split


def encoder(name: str, *, image_size: int | tuple[int, int] = 224, **options: Any) -> ImageTower:
    """The tower that MILAN and MAE pretrain: ``"S/16"``, ``"B/16"``, ``"L/16"`` or ``"H/14"``.

    Source: arXiv:2208.06049, appendix, and MAE (arXiv:2111.06377), whose towers these are: fixed
    sine-cosine positions, a class token, ImageNet's mean and standard deviation. Options override
    fields.

    Raises:
        InputError: if the size is unknown.
    """
    return image_tower(name, image_size=image_size, **{"positions": "sincos", **options})


@dataclass(frozen=True, kw_only=True)
class MaskedModel(ModelConfig):
    """An image tower that is pretrained, and the decoder that it is pretrained with."""

    image: ImageTower
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        if self.image.class_token == "none":
            raise InputError(
                "model.image.class_token=none, but the decoder starts from a class token; use "
                "with_position"
            )
        self.decoder.tower(self.image)

    @override
    def inputs(self) -> ModelInputs:
        """Images."""
        return ModelInputs(height_width=self.image.height_width, grid=self.image.grid)

    def build(self, generator: torch.Generator | None = None, *, outputs: int) -> MaskedImageModel:
        """The model, on the CPU in float32, with weights drawn from ``generator`` (or seed 0).

        Args:
            generator: on the CPU.
            outputs: numbers predicted for every token.
        """
        return build(self, generator, outputs=outputs)


class MaskedImageModel(nn.Module):
    """Images of which a part is seen to predictions for every token."""

    def __init__(self, config: MaskedModel, *, outputs: int) -> None:
        """Build the layers; :func:`build` draws their weights.

        Args:
            config: encoder and decoder.
            outputs: numbers predicted for every token.
        """
        super().__init__()
        self.config = config
        self.image = ImageTransformer(config.image)
        kind = {"prompting": PromptingDecoder, "plain": PlainDecoder}[config.decoder.kind]
        self.decoder: Decoder = kind(
            config.decoder.tower(config.image), inputs=config.image.width, outputs=outputs
        )

    def forward(self, images: Tensor, split: Split, *, hidden_only: bool = False) -> Tensor:
        """Encode what is seen and predict.

        Args:
            images: (B, 3, H, W) uint8, or float that is normalized already.
            split: what is seen.
            hidden_only: predict hidden patches alone.

        Returns:
            See :meth:`frugal.milan.decoders.Decoder.forward`.
        """
        latent = self.image.forward_tokens(
            images, KeptPatches.dense(split.visible)
        )  # (B, 1 + K, D)
        return self.decoder(latent, split, hidden_only=hidden_only)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.decoder.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, enabled: bool) -> None:
        self.image.checkpoint_activations = enabled
        self.decoder.checkpoint_activations = enabled

    def flops(self, visible: float) -> float:
        """Forward FLOPs of one image of which some patches are seen.

        Every token is predicted, hidden ones alone are updated by the prompting decoder.
        """
        tower, config = self.decoder.tower, self.config.image
        tokens = config.num_patches + 1
        head = self.decoder.head.out_features * tokens
        ends = 2 * tower.width * (config.width * (visible + 1) + head)
        blocks = tower.depth * block_flops(tower, tokens)
        if isinstance(self.decoder, PromptingDecoder):
            # the seen tokens only give keys and values
            spared = 2 * tower.width + 2 * tokens + 2 * tower.mlp_width
            blocks -= tower.depth * 2 * (visible + 1) * tower.width * spared
        return image_flops(config, visible) + ends + blocks


def build(
    config: MaskedModel, generator: torch.Generator | None = None, *, outputs: int
) -> MaskedImageModel:
    """The model on the CPU in float32, every weight drawn from ``generator`` (or seed 0).

    Where torch's default device is ``meta``, it stays there and has sizes alone.
    """
    with torch.device("meta"):  # else torch's layers would draw from the global generator first
        model = MaskedImageModel(config, outputs=outputs)
    model.to_empty(device=torch.get_default_device())
    generator = generator or torch.Generator().manual_seed(0)
    model.image.initialize(generator, "flip")
    _default_patch_bias(model.image, generator)
    _initialize_decoder(model.decoder, generator)
    return model


@torch.no_grad()
def _default_patch_bias(tower: ImageTransformer, generator: torch.Generator) -> None:
    """The patch projection was a convolution, whose bias MAE left as torch draws it."""
    if tower.patch_embed.bias is not None:
        limit = 1 / math.sqrt(tower.patch_embed.in_features)
        tower.patch_embed.bias.uniform_(-limit, limit, generator=generator)


@torch.no_grad()
def _initialize_decoder(decoder: Decoder, generator: torch.Generator) -> None:
    """MAE's scheme, as for the encoder; keys and values of a block count as one matrix."""
    decoder.pos_embed.copy_(image_table(decoder.tower))
    initialize_xavier(decoder, generator)
    decoder.mask_token.normal_(0.0, 0.02, generator=generator)
    if isinstance(decoder, PromptingDecoder):
        limit = math.sqrt(6 / sum(decoder.kv_weight.shape[1:]))
        decoder.kv_weight.uniform_(-limit, limit, generator=generator)
        decoder.kv_bias.zero_()
