"""Images to vectors: patches, positions, kept patches, blocks, pooling, projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.models.attention import Layout, Packed
from frugal.common.models.batch_norm import SharedVectorNorm
from frugal.common.models.blocks import Blocks, Picked
from frugal.common.models.config import ImageTower
from frugal.common.models.positions import image_table
from frugal.common.reduction.image import Kept, PatchView, normalize, take_patches


class Projector(nn.Sequential):
    """MoCo v3's: three linear layers without bias, each with a batch norm, the last one bare.

    Source: Chen et al., arXiv:2104.02057, section 4.1.
    """

    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for inputs in (width, hidden):
            layers += [nn.Linear(inputs, hidden, bias=False), SharedVectorNorm(hidden), nn.ReLU()]
        last = nn.Linear(hidden, outputs, bias=False)
        super().__init__(*layers, last, SharedVectorNorm(outputs, affine=False))


class ImageTransformer(nn.Module):
    """A vision transformer that embeds only the patches that stay."""

    pos_embed: Tensor

    def __init__(self, config: ImageTower, embed_dim: int | None = None) -> None:
        """Parameters are uninitialized in effect; see :mod:`~frugal.common.models.initialize`.

        Args:
            config: shape and options.
            embed_dim: width that the pooled vector is projected to; None for no projection.
        """
        super().__init__()
        self.config = config
        width, side = config.width, config.patch_size
        self.patch_embed = nn.Linear(3 * side * side, width, bias=config.patch_bias)
        if config.class_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_positions, width))
        else:
            self.register_buffer("pos_embed", image_table(config), persistent=False)
        self.norm_pre = self._norm() if config.pre_norm else nn.Identity()
        self.blocks = Blocks(config)
        self.norm = self._norm()
        if config.projector_width is not None:
            self.projector = Projector(width, config.projector_width, config.projector_outputs)
        self.projection = (
            nn.Identity()
            if embed_dim is None
            else nn.Linear(config.pooled_width, embed_dim, bias=False)
        )

    def _norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(self.config.width, eps=self.config.norm_epsilon)

    def forward(
        self,
        images: Tensor,
        kept: Kept | None = None,
        *,
        output: Literal["embedding", "pooled", "tokens", "blocks", "embedded"] = "embedding",
        blocks: Sequence[int] = (),
    ) -> Any:
        """Run the tower.

        Args:
            images: (B, 3, H, W) uint8, which is normalized here, or float that already is.
            kept: the patches that stay; None for all of them.
            output: ``embedding``, the pooled and projected vector; ``pooled``, the same before
                the projection, behind the projector where there is one; ``tokens``, every token
                after the last norm (before it, where the norm belongs to the pooled vector);
                ``blocks``, what the given blocks put out; ``embedded``, the patches with their
                positions, before anything else.
            blocks: numbers of blocks, from 0.

        Returns:
            (B, E), (B, D), tokens, or a list of tokens. Tokens are (B, [1 +] K, D), or packed
            (sum of [1 +] K_i, D), class token first and patches in the order of ``kept``.
        """
        if output == "embedded":
            return self._patches(images, kept)
        tokens, layout = self.embed(images, kept)
        if output == "blocks":
            return self.blocks(tokens, layout, outputs_of=tuple(blocks))[1]
        pools_one = self.config.pooling == "class" and output != "tokens"
        picked = self._class_token(tokens, layout) if pools_one else None
        tokens, _ = self.blocks(tokens, layout, picked=picked)
        if output == "tokens":
            return tokens if self.config.norm_after_pooling else self.norm(tokens)
        pooled = self._pool(tokens, layout)  # (B, D)
        if self.config.projector_width is not None:
            pooled = self.projector(pooled)
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, images: Tensor, kept: Kept | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(images, kept, output="pooled")

    def forward_tokens(
        self, images: Tensor, kept: Kept | None = None, *, blocks: Sequence[int] | None = None
    ) -> Any:
        """Every token after the last norm, or the raw outputs of the given blocks as a list."""
        if blocks is None:
            return self(images, kept, output="tokens")
        return self(images, kept, output="blocks", blocks=blocks)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether every block is recomputed in the backward pass; set it to change that."""
        return self.blocks.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        self.blocks.checkpoint_activations = wanted

    def _patches(self, images: Tensor, kept: Kept | None) -> Tensor:
        """(B, K, D) or packed (T, D): the kept patches, embedded, with their positions."""
        view = PatchView(images, self.config.patch_size)
        if view.grid != self.config.grid:
            height, width = self.config.height_width
            raise InputError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels reached a tower built for "
                f"{height}x{width}; set model.image.image_size to the size of the images"
            )
        tokens = self.patch_embed(self._normalized(take_patches(view, kept)))  # (..., D)
        patch_positions = self.pos_embed[0, -view.num_patches :]  # (N, D)
        if kept is None:
            return tokens + patch_positions
        return tokens + F.embedding(kept.index, patch_positions)

    def embed(self, images: Tensor, kept: Kept | None = None) -> tuple[Tensor, Layout]:
        """The tokens that go into the first block, class token first, and how they lie."""
        tokens = self._patches(images, kept)
        if kept is None or kept.lengths is None:
            tokens, layout = self._put_class_token_first(tokens), Layout()
        else:
            tokens, layout = self._put_class_tokens_between(tokens, kept.lengths)
        return self.norm_pre(tokens), layout

    def _normalized(self, pixels: Tensor) -> Tensor:
        """(..., P) pixels as the patch projection takes them."""
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels, mean=self.config.mean, std=self.config.std)
        return pixels.to(self.patch_embed.weight.dtype)

    def _class_vector(self) -> Tensor | None:
        """(1, 1, D), its position added where it has one."""
        if self.config.class_token == "with_position":
            return self.cls_token + self.pos_embed[:, :1]
        return self.cls_token if self.config.class_token == "without_position" else None

    def _put_class_token_first(self, tokens: Tensor) -> Tensor:
        """(B, K, D) to (B, [1 +] K, D)."""
        class_vector = self._class_vector()
        if class_vector is None:
            return tokens
        class_vector = class_vector.to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat((class_vector, tokens), dim=1)

    def _put_class_tokens_between(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Layout]:
        """(T, D) to (T [+ B], D), one class token in front of every image's patches."""
        class_vector = self._class_vector()
        if class_vector is None:
            return tokens, Layout(packed=Packed.of(lengths))
        packed = Packed.of(lengths + 1)
        is_class = packed.place == 0
        patch = torch.arange(len(is_class), device=tokens.device) - packed.sequence - 1
        source = torch.where(is_class, len(tokens), patch)  # (T + B,) the class vector stands last
        both = torch.cat((tokens, class_vector[0].to(tokens.dtype)))
        return both[source], Layout(packed=packed)

    def _class_token(self, tokens: Tensor, layout: Layout) -> Picked:
        if layout.packed is None:
            first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
            return Picked(first, None)
        return Picked(layout.packed.starts, layout.packed.lengths)

    def _pool(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Tokens, or (B, D) class tokens, to (B, D)."""
        if not self.config.norm_after_pooling:
            tokens = self.norm(tokens)
        if self.config.pooling != "class":
            tokens = self._mean(tokens, layout)
        return self.norm(tokens) if self.config.norm_after_pooling else tokens

    def _mean(self, tokens: Tensor, layout: Layout) -> Tensor:
        """(B, D)."""
        front = int(self.config.class_token != "none" and self.config.pooling == "mean")
        if layout.packed is None:
            return tokens[:, front:].mean(1)
        counts = (layout.packed.lengths - front).clamp(min=1)  # nothing kept: zeros, not NaN
        sums = layout.packed.pad(tokens)[:, front:].sum(1)
        return sums / counts[:, None]
