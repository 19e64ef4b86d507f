"""The vision transformer: its configuration, and images to vectors.

Patches are cut from the pixels, those that stay are embedded and get their positions, then come
the blocks, the pooling and the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.models.batch_norm import SharedVectorNorm
from frugal.common.models.blocks import Activation, Blocks, check_block_config
from frugal.common.models.initialize import Initialization, draw_layers, normal
from frugal.common.models.layout import Layout, Packed, PooledToken, lay_out
from frugal.common.models.positions import ImagePositions, sincos_table
from frugal.common.ranges import Count, NotNegative, Positive, ShareBelowOne
from frugal.common.reduction.image import KeptPatches, PatchView, normalize, take_patches

ClassToken = Literal["none", "with_position", "without_position"]
ImagePooling = Literal["class", "mean", "mean_all"]
"""The class token, the mean of the patches, or the mean of every token."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """A vision transformer."""

    width: Count
    depth: Count
    """Blocks."""
    heads: Count
    mlp_width: Count
    patch_size: Count
    """Side of a patch in pixels."""
    image_size: Count | tuple[Count, Count] = 224
    """Side of a square image, or (height, width), in pixels."""
    mean: tuple[NotNegative, NotNegative, NotNegative] = IMAGENET_MEAN
    """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    patch_bias: bool = True
    """Whether the patch projection has a bias."""
    class_token: ClassToken = "with_position"
    positions: ImagePositions = "learned"
    pre_norm: bool = False
    """A norm between the embedding and the blocks."""
    activation: Activation = "gelu"
    norm_epsilon: Positive = 1e-6
    pooling: ImagePooling = "class"
    norm_after_pooling: bool = False
    """The last norm acts on the pooled vector, not on every token."""
    drop_path: ShareBelowOne = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    layer_scale: NotNegative | None = None
    """First value of the layer scales; without it there are none."""
    projector_width: Count | None = None
    """Hidden width of MoCo v3's projector (4096 there), three linear layers with batch norms on the
    pooled vector; without it there is none."""
    projector_outputs: Count = 256
    """Width of what the projector makes of the pooled vector."""

    def __post_init__(self) -> None:
        check_block_config(self, "image")
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists only
        self._check_grid()
        if self.positions != "learned" and self.width % 4:
            raise InputError(
                f"image.width {self.width} is not a multiple of 4, which "
                f"image.positions={self.positions} needs"
            )
        if self.positions == "sincos_bigvision" and self.width < 8:
            raise InputError("image.positions=sincos_bigvision needs image.width of at least 8")
        if self.pooling == "class" and self.class_token == "none":
            raise InputError(
                "image.pooling=class needs a class token; set image.class_token, or pool by mean"
            )

    def _check_grid(self) -> None:
        for side in self.height_width:
            if side < self.patch_size:
                raise InputError(
                    f"image.image_size {self.image_size} is smaller than a patch "
                    f"(image.patch_size = {self.patch_size}); use larger images or smaller patches"
                )
            if side % self.patch_size:
                raise InputError(
                    f"image.image_size {self.image_size} is not a multiple of image.patch_size = "
                    f"{self.patch_size}; use {side // self.patch_size * self.patch_size} or "
                    f"{(side // self.patch_size + 1) * self.patch_size}"
                )

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the images, in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.num_patches + (self.class_token == "with_position")

    @property
    def pooled_width(self) -> int:
        """Of the vector that is projected into the space of texts."""
        return self.width if self.projector_width is None else self.projector_outputs

    def module(self, embed_dim: int | None = None) -> ImageTransformer:
        """The tower; its weights are yet to be drawn."""
        return ImageTransformer(self, embed_dim)


def image_table(tower: ImageTower) -> Tensor:
    """(1, rows, D) float32: the fixed position table of a tower."""
    class_row = tower.class_token == "with_position"
    return sincos_table(tower.grid, tower.width, tower.positions, class_row=class_row)[None]


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
        """Build the layers; :meth:`initialize` draws their weights.

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
        kept: KeptPatches | None = None,
        *,
        output: Literal[
            "embedding", "embedding and patches", "pooled", "tokens", "blocks", "embedded"
        ] = "embedding",
        blocks: Sequence[int] = (),
    ) -> Any:
        """Run the tower.

        Args:
            images: (B, 3, H, W) uint8, which is normalized here, or float that already is.
            kept: the patches that stay; None for all of them.
            output: ``embedding``, the pooled and projected vector; ``embedding and patches``, that
                and the mean of the patches among the ``tokens``; ``pooled``, the first before the
                projection, behind the projector where there is one; ``tokens``, every token
                after the last norm (before it, where the norm belongs to the pooled vector);
                ``blocks``, what the given blocks put out; ``embedded``, the patches with their
                positions, before anything else.
            blocks: numbers of blocks, from 0.

        Returns:
            (B, E), (B, D), both, tokens, or a list of tokens. Tokens are (B, [1 +] K, D), or packed
            (sum of [1 +] K_i, D), class token first and patches in the order of ``kept``.
        """
        if output == "embedded":
            return self._patches(images, kept)
        return self._encode(images, kept, self._pack(kept), output, tuple(blocks))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` the tower, but for the one read of packed tokens; options are its."""
        self._encode = torch.compile(self._encode, *args, **kwargs)  # type: ignore[method-assign]

    def _encode(
        self,
        images: Tensor,
        kept: KeptPatches | None,
        packed: Packed | None,
        output: str,
        blocks: tuple[int, ...],
    ) -> Any:
        tokens, layout = self._embed(images, kept, packed)
        if output == "blocks":
            return self.blocks(tokens, layout, outputs_of=blocks)[1]
        class_token = self._class_token(tokens, layout) if self.config.pooling == "class" else None
        needs_all = output in ("tokens", "embedding and patches")
        tokens, _ = self.blocks(tokens, layout, pooled=None if needs_all else class_token)
        if output == "tokens":
            return self._normed(tokens)
        if output == "embedding and patches":
            skip = int(self.config.class_token != "none")
            patches = layout.mean(self._normed(tokens), skip=skip)  # (B, D)
            tokens = tokens if class_token is None else class_token.take(tokens)
            return self._embedding(tokens, layout, "embedding"), patches
        return self._embedding(tokens, layout, output)

    def _normed(self, tokens: Tensor) -> Tensor:
        return tokens if self.config.norm_after_pooling else self.norm(tokens)

    def _embedding(self, tokens: Tensor, layout: Layout, output: str) -> Tensor:
        """(B, E), or (B, D) before the projection, of tokens, or of (B, D) class tokens."""
        pooled = self._pool(tokens, layout)  # (B, D)
        if self.config.projector_width is not None:
            pooled = self.projector(pooled)
        return pooled if output == "pooled" else self.projection(pooled)

    def forward_pooled(self, images: Tensor, kept: KeptPatches | None = None) -> Tensor:
        """(B, D): the pooled vector before the projection."""
        return self(images, kept, output="pooled")

    def forward_tokens(
        self,
        images: Tensor,
        kept: KeptPatches | None = None,
        *,
        blocks: Sequence[int] | None = None,
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
    def checkpoint_activations(self, enabled: bool) -> None:
        self.blocks.checkpoint_activations = enabled

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, scheme: Initialization = "open_clip") -> None:
        """Draw every weight afresh; a fixed position table is computed."""
        width, config = self.config.width, self.config
        draw_layers(self, self.projection, width=width, generator=generator, scheme=scheme)
        std = 0.02 if scheme == "flip" else width**-0.5
        if config.class_token != "none":
            normal(self.cls_token, std, generator)
        if config.positions == "learned":
            normal(self.pos_embed, std, generator)
        else:
            self.pos_embed.copy_(image_table(config))

    def _patches(self, images: Tensor, kept: KeptPatches | None) -> Tensor:
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

    def embed(self, images: Tensor, kept: KeptPatches | None = None) -> tuple[Tensor, Layout]:
        """The tokens that go into the first block, class token first, and how they lie."""
        return self._embed(images, kept, self._pack(kept))

    def _embed(
        self, images: Tensor, kept: KeptPatches | None, packed: Packed | None
    ) -> tuple[Tensor, Layout]:
        tokens = self._patches(images, kept)
        tokens, layout = lay_out(tokens, packed, self._class_vector())
        return self.norm_pre(tokens), layout

    def _pack(self, kept: KeptPatches | None) -> Packed | None:
        """How packed tokens lie, class token included; None where they are dense."""
        if kept is None or kept.lengths is None:
            return None
        return Packed.of(kept.lengths + (self.config.class_token != "none"))

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

    def _class_token(self, tokens: Tensor, layout: Layout) -> PooledToken:
        count = layout.num_sequences(tokens)
        return layout.pooled_token(
            torch.zeros(count, dtype=torch.long, device=tokens.device), attended=None
        )

    def _pool(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Tokens, or (B, D) class tokens, to (B, D)."""
        tokens = self._normed(tokens)
        if self.config.pooling != "class":
            has_class = self.config.class_token != "none"
            tokens = layout.mean(tokens, skip=int(has_class and self.config.pooling == "mean"))
        return self.norm(tokens) if self.config.norm_after_pooling else tokens
