"""Models of timm and transformers as towers: they look like ours from outside."""

from __future__ import annotations

import logging
import math
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frugal.common.data.transforms import normalize
from frugal.common.errors import InputError
from frugal.common.models import clip
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.initialize import Initialization
from frugal.common.models.pretrained_models import (
    inside,
    make,
    pool_image,
    pool_text,
    probe,
    stored_state,
    transformers_config,
)
from frugal.common.reduction.image import KeptPatches

_COUNTS_FROM_ZERO = ("bert", "electra", "albert", "gpt2", "clip_text_model", "siglip_text_model")
"""Kinds of text models whose positions can be given, the first one being 0."""


class _Tower(nn.Module):
    """A model of another library and the projection into the space that both towers share."""

    config: Any
    model: nn.Module
    """The library's."""

    def __init__(self, config: Any, embed_dim: int | None = None) -> None:
        """Weights are uninitialized in effect; see :meth:`initialize`.

        Args:
            config: what it is made of.
            embed_dim: width that the pooled vector is projected to; None for no projection.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = make(config)
        width = probe(config).width
        self.projection = (
            nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)
        )
        self._checkpoint_activations = False

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, scheme: Initialization = "open_clip") -> None:
        """Draw every weight afresh as its library does, whatever the scheme of Frugal's towers."""
        del scheme
        seed = torch.randint(2**62, (), generator=generator, device="cpu").item()
        with torch.random.fork_rng(devices=[]), torch.get_default_device():
            torch.default_generator.manual_seed(int(seed))
            self.model = make(self.config)
            if isinstance(self.projection, nn.Linear):
                self.projection.reset_parameters()
        for name in probe(self.config).unused:  # DDP would wait for their gradients for ever
            self.model.get_parameter(name).requires_grad_(False)
        _still_key_biases(self.model)

    def start(self, *, log: logging.Logger) -> None:
        """Take the weights that the name or file stands for; the projection stays as it is.

        Raises:
            InputError: if there are none, or they are of another model.
        """
        self.model.load_state_dict(stored_state(self.config))
        log.info("%s starts from %s", type(self.model).__name__, self.config.name)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether blocks are recomputed in the backward pass; set it to change that."""
        return self._checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        if wanted == self._checkpoint_activations:
            return
        self._checkpoint_activations = wanted
        model: Any = self.model
        try:
            if self.config.library == "timm":
                model.set_grad_checkpointing(wanted)
            elif wanted:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
        except (AttributeError, AssertionError, ValueError):
            raise InputError(
                f"{self.config.name} cannot recompute its blocks; leave out "
                "--engine.checkpoint-activations"
            ) from None


_KEY_BIAS = re.compile(r".*\.(key|k_proj|k_lin)\.bias")
_SOFTMAX_OF_KEYS = {
    "bert", "roberta", "xlm-roberta", "electra", "camembert", "distilbert", "mpnet",
    "clip_text_model", "clip_vision_model", "vit", "deit", "dinov2",
}  # fmt: skip
"""Kinds of models in which a bias on the keys moves every logit of a row alike."""


def _still_key_biases(model: nn.Module) -> None:
    """Give biases on attention keys their true gradient, zero, and not the noise of rounding.

    Adam scales noise up to full steps; see :class:`~frugal.common.models.attention.QueryKeyValue`.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for name, parameter in model.named_parameters():
        if kind in _SOFTMAX_OF_KEYS and _KEY_BIAS.fullmatch(name):
            parameter.register_hook(torch.zeros_like)
        elif name.endswith(".attn.qkv.bias") and _has_bare_keys(model, name):
            parameter.register_hook(_without_middle)


def _has_bare_keys(model: nn.Module, name: str) -> bool:
    """Of timm's vision transformers: no norm between keys and logits."""
    attention = model.get_submodule(name.removesuffix(".qkv.bias"))
    return isinstance(getattr(attention, "k_norm", None), nn.Identity)


def _without_middle(gradient: Tensor) -> Tensor:
    query, key, value = gradient.chunk(3)
    return torch.cat((query, torch.zeros_like(key), value))


class _ImageTower(_Tower):
    def forward(
        self,
        images: Tensor,
        kept: KeptPatches | None = None,
        *,
        output: Literal["embedding", "pooled"] = "embedding",
    ) -> Tensor:
        """Run the tower.

        Args:
            images: (B, 3, H, W) uint8, which is normalized here, or float that already is.
            kept: None; this tower sees images whole.
            output: ``embedding``, the pooled and projected vector; ``pooled``, the same before
                the projection.

        Returns:
            (B, E) or (B, D).
        """
        if kept is not None or output not in ("embedding", "pooled"):
            raise InputError(
                f"{self.config.name} is another library's tower and sees images whole; leaving "
                "patches out, or looking at them one by one, needs one of Frugal's own towers"
            )
        if images.shape[2:] != self.config.height_width:
            raise InputError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels reached a tower built for "
                f"{self.config.image_size}; set model.image.image_size to the size of the images"
            )
        pooled = pool_image(self.model, self.config, self._normalized(images))
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(images, kept, output="pooled")

    def _normalized(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return normalize(images, mean=self.config.mean, std=self.config.std)


class TransformersImageModule(_ImageTower):
    """An image model of transformers."""


class TimmImageModule(_ImageTower):
    """An image model of timm."""


class TransformersTextModule(_Tower):
    """A text model of transformers."""

    def forward(
        self,
        token_ids: Tensor,
        text_lengths: Tensor | None = None,
        text_positions: Tensor | None = None,
        *,
        output: Literal["embedding", "pooled"] = "embedding",
    ) -> Tensor:
        """Run the tower.

        Args:
            token_ids: (B, T) int64, padded on the right, T at most the tower's length.
            text_lengths: (B,) tokens before the padding. Without them padding is what stands
                behind the last id that is not the padding's.
            text_positions: (B, T) slots that the tokens stand in, where the model can be told.
            output: ``embedding``, the pooled and projected vector; ``pooled``, the same before
                the projection.

        Returns:
            (B, E) or (B, D).
        """
        if token_ids.shape[1] > self.config.length:
            raise InputError(
                f"captions of {token_ids.shape[1]} tokens reached a text tower of "
                f"{self.config.length}; set model.text.length to the tokens of the longest caption"
            )
        places = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device)
        if text_lengths is None:
            text_lengths = (places * (token_ids != self.config.pad_id)).amax(1)
        # a damaged sample has no token, yet its row must stay finite
        lengths = text_lengths.clamp(1, token_ids.shape[1])
        more = {"attention_mask": inside(token_ids, lengths).long()}
        more |= self._slots(text_positions)
        pooled = pool_text(self.model, self.config, token_ids, lengths, more)
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, token_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(token_ids, text_lengths, output="pooled")

    def _slots(self, positions: Tensor | None) -> dict[str, Tensor]:
        if positions is None:
            return {}
        kind = transformers_config(self.config.facts).model_type
        if kind not in _COUNTS_FROM_ZERO:
            raise InputError(
                f"{self.config.name} is a {kind}, which cannot be told the slots of tokens; choose "
                "a text reduction that does not leave tokens in their slots"
            )
        return {"position_ids": positions}


def build(config: DualEncoderConfig, generator: torch.Generator | None = None) -> DualEncoder:
    """A dual encoder on the CPU in float32, every weight drawn from ``generator`` (or seed 0)."""
    generator = generator or torch.Generator().manual_seed(0)
    model = clip.build(config, generator)
    for tower in (model.image, model.text):
        limit = 1 / math.sqrt(tower.projection.in_features)
        with torch.no_grad():
            tower.projection.weight.uniform_(-limit, limit, generator=generator)
    return model
