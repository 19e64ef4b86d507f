"""The frozen tower whose features are reconstructed and whose attention draws the patches.

Source: Hou et al., arXiv:2208.06049, sections 3.1 and 3.3. It is no part of the module that
trains: no optimizer state, nothing in checkpoints, nothing for DDP or ZeRO to wrap.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.evaluation.provenance import weights_digest
from frugal.common.models.attention import Attention
from frugal.common.models.blocks import Activation, Block
from frugal.common.models.flops import image_flops
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.named import clip_encoder
from frugal.common.models.preprocess import describe
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.ranges import Count, check_ranges
from frugal.common.reduction.image import Channels
from frugal.common.weights.image_towers import read_encoder

_LOG = logging.getLogger("frugal")
_CLIP_FEATURES = 512
"""Numbers of a token of CLIP's ViT-B/16."""
_FROM_SHAPES = (
    "the usual one for such a file, which does not say it; heads, activation and epsilon are "
    "usual ones too unless they are given"
)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen image tower whose features are targets and whose attention weighs the patches."""

    source: str | None = None
    """A file of OpenAI's CLIP, open_clip, SLIP or DINO; a folder in the layout of Hugging Face or
    open_clip, or its name on the hub; a run directory of ours."""
    normalization: Literal["student", "own"] = "student"
    """student: pixels are normalized as the student's, by ImageNet's mean and std (published).
    own: as the teacher was trained."""
    image_size: Count | tuple[Count, Count] | None = None
    """Side of the images that it is shown, or (height, width), in pixels, if not the student's;
    its position table is interpolated to that size."""
    activation: Activation | None = None
    """Of its blocks, where the file does not say and is not to be guessed."""
    heads: Count | None = None
    """Attention heads, where the file does not say; without it one per 64 channels."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective.teacher")


class FrozenTeacher:
    """Whole images to the tokens to be predicted and the importance of their patches.

    No ``nn.Module``, so that an objective can hold it without owning its weights. It follows the
    images to their device, and computes in the dtype of the autocast around it.
    """

    def __init__(
        self, stored: ImageEncoder, *, pixels_mean: Channels, pixels_std: Channels
    ) -> None:
        """Take a tower.

        Args:
            stored: the tower as it was read, on the grid that it is to have.
            pixels_mean: of float images, which have been normalized already.
            pixels_std: of the same.
        """
        self.tower = stored.build().eval().requires_grad_(False)
        is_outline = self.tower.patch_embed.weight.is_meta
        self.digest = "" if is_outline else weights_digest(self.tower)
        """SHA-256 of its weights as they were read; empty of one without numbers."""
        self._given = (pixels_mean, pixels_std)
        self._dtype: torch.dtype | None = None
        self.checkpoint_activations = False
        """Has no effect: a teacher has no backward pass."""

    @property
    def config(self) -> ImageTower:
        """The configuration of the tower."""
        return self.tower.config

    @property
    def width(self) -> int:
        """Channels of the tokens that are to be predicted."""
        projection = self.tower.projection
        return projection.out_features if isinstance(projection, nn.Linear) else self.config.width

    def compile(self) -> None:
        """torch.compile the tower's blocks."""
        for block in self.tower.blocks:
            block.compile()

    def flops(self) -> float:
        """Forward FLOPs of one image."""
        tokens = self.config.num_patches + 1
        projection = 2 * tokens * self.config.width * self.width
        has_projection = isinstance(self.tower.projection, nn.Linear)
        return image_flops(self.config, self.config.num_patches) + has_projection * projection

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of whole images.

        Args:
            images: (B, 3, H, W) uint8, or float that is normalized as the student's.

        Returns:
            tokens (B, 1 + N, K), class token first; importance (B, N) float32, not negative: how
            much of the last block's attention the class token pays to every patch, mean over the
            heads.
        """
        self._fit(images.device)
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype is not None):
            tokens, layout = self.tower.embed(self._shown(images))
            *blocks, last = cast("Iterable[Block]", self.tower.blocks)
            for block in blocks:
                tokens = block(tokens, layout)
            importance = class_attention(last.attn, last.norm1(tokens))[:, 1:]
            tokens = last(tokens, layout)
            return self.tower.projection(self.tower.norm(tokens)), importance

    def _fit(self, device: torch.device) -> None:
        """Bring weights to the images, and matrices to the dtype that autocast would cast them to.

        Autocast itself casts frozen weights anew at every use.
        """
        if self.tower.patch_embed.weight.device != device:
            self.tower.to(device)
        if not torch.is_autocast_enabled(device.type):
            return
        self._dtype = torch.get_autocast_dtype(device.type)
        for module in self.tower.modules():
            # the patch projection says in which dtype it takes its pixels
            if not isinstance(module, nn.Linear) or module is self.tower.patch_embed:
                continue
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dtype != self._dtype:
                    cast = weight.detach().to(self._dtype)
                    setattr(module, name, nn.Parameter(cast, requires_grad=False))

    def _shown(self, images: Tensor) -> Tensor:
        """The images as the tower takes them: of its size, and normalized as it is to see them."""
        resize = images.shape[2:] != self.config.height_width
        same = self._given == (self.config.mean, self.config.std)
        if not resize and (same or images.dtype == torch.uint8):
            return images
        is_given = images.dtype != torch.uint8  # and then normalized as the student's
        levels = _scaled(images, *self._given) if is_given else images.float() / 255
        if resize:
            size = self.config.height_width
            levels = F.interpolate(
                levels, size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)
        mean, std = self.config.mean, self.config.std
        back = tuple(-m / s for m, s in zip(mean, std, strict=True))
        return _scaled(levels, back, tuple(1 / s for s in std))


def _scaled(images: Tensor, shift: tuple[float, ...], factor: tuple[float, ...]) -> Tensor:
    """Images times a factor plus a shift per channel; numbers of the host need no waiting."""
    parts = zip(images.unbind(1), shift, factor, strict=True)
    return torch.stack([part * f + s for part, s, f in parts], dim=1)


def class_attention(attention: Attention, tokens: Tensor) -> Tensor:
    """How much attention the first token pays to every token, mean over the heads.

    One row of the attention matrix, in float32. The product of the query with all keys is taken
    through the key weights, so that no keys are computed. A bias on the keys would move all logits
    of a head alike.

    Args:
        attention: a block's.
        tokens: (B, L, D) as they go into it, after the norm.

    Returns:
        (B, L), each row with a sum of 1.
    """
    width, heads = attention.qkv.in_features, attention.heads
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        weight, bias = attention.qkv.weight.to(tokens.dtype), attention.qkv.bias.to(tokens.dtype)
        query = F.linear(tokens[:, 0], weight[:width], bias[:width])  # (B, D)
        query = query.unflatten(1, (heads, -1))  # (B, H, C)
        keys_of = weight[width : 2 * width].unflatten(0, (heads, -1))  # (H, C, D)
        through = torch.einsum("bhc,hcd->bhd", query, keys_of) * query.shape[2] ** -0.5
        logits = through @ tokens.transpose(1, 2)  # (B, H, L)
        return logits.softmax(-1).mean(1)


def load_teacher(teacher: Teacher, student: ImageTower) -> FrozenTeacher:
    """The teacher of a recipe, on the CPU in float32.

    Raises:
        InputError: if there is none, it cannot be read, or its patches do not lie where the
            student's do.
    """
    if teacher.source is None:
        raise InputError(
            "objective.teacher.source is not given; name a file or folder of a CLIP model, or a "
            "run directory, such as --objective.teacher.source ViT-B-16.pt"
        )
    if not Path(teacher.source).exists() and "/" not in teacher.source:
        raise InputError(
            f"the teacher {teacher.source} is not there; say where it lies with "
            "--objective.teacher.source"
        )
    stored = read_encoder(teacher.source, activation=teacher.activation, heads=teacher.heads)
    if stored.tower.class_token == "none":
        raise InputError(
            f"the teacher {teacher.source} has no class token, whose attention says which patches "
            "matter; choose another one"
        )
    if any(name.startswith("image_head.") for name in stored.rest):
        raise InputError(
            f"the teacher {teacher.source} has heads of two layers (model.head_width), which know "
            "whole images and no patches; choose another one"
        )
    if missing := stored.missing():
        raise InputError(f"the teacher {teacher.source} has no {missing[0]}; it is incomplete")
    _log_teacher(stored, teacher, student)
    stored = _on_grid(stored, teacher, student)
    if teacher.normalization == "student":
        seen = replace(stored.tower, mean=student.mean, std=student.std)
        stored = replace(stored, tower=seen)
    return FrozenTeacher(stored, pixels_mean=student.mean, pixels_std=student.std)


def outline_teacher(teacher: Teacher, student: ImageTower) -> FrozenTeacher:
    """A teacher with sizes and no numbers on torch's ``meta`` device, whether it is there or not.

    Where it is not there it counts as CLIP's ViT-B/16, or DINO's where its name says so.
    """
    if teacher.source is not None and Path(teacher.source).exists():
        real = load_teacher(teacher, student)
        real.tower.to("meta")
        return real
    _LOG.warning(
        "the teacher %s is not there: the plan counts a ViT-B/16 in its place",
        teacher.source or "(objective.teacher.source is not given)",
    )
    tower = clip_encoder("B/16", quick_gelu=True).image
    rows, columns = student.grid
    tower = replace(
        tower,
        image_size=(rows * tower.patch_size, columns * tower.patch_size),
        mean=student.mean,
        std=student.std,
    )
    features = None if "dino" in (teacher.source or "") else _CLIP_FEATURES
    with torch.device("meta"):
        state = ImageTransformer(tower, features).state_dict()
        stored = ImageEncoder(tower, state, "an outline")
        return FrozenTeacher(stored, pixels_mean=student.mean, pixels_std=student.std)


def _log_teacher(stored: ImageEncoder, teacher: Teacher, student: ImageTower) -> None:
    """Say what of the teacher its weights alone do not, from where it is, and what it is shown."""
    tower, prepared = stored.tower, stored.preparation
    told_by = _FROM_SHAPES if prepared is None else prepared.told_by
    if prepared is None and Path(stored.source).is_dir():
        told_by = "its recipe"
    _LOG.info("the teacher %s: %s", teacher.source, describe(tower, told_by=told_by))
    if teacher.normalization == "student" and (tower.mean, tower.std) != (
        student.mean,
        student.std,
    ):
        _LOG.warning(
            "the teacher %s is shown images of the student's mean %s and std %s, as published; "
            "--objective.teacher.normalization own shows them as it was trained",
            teacher.source, list(student.mean), list(student.std),
        )  # fmt: skip


def _on_grid(stored: ImageEncoder, teacher: Teacher, student: ImageTower) -> ImageEncoder:
    """The tower for the size of images that it will be shown."""
    shown_size = teacher.image_size or student.image_size
    if isinstance(shown_size, int):
        shown_size = (shown_size, shown_size)
    size = (shown_size[0], shown_size[1])
    side = stored.tower.patch_size
    fits = not any(length % side for length in size)
    grid = tuple(length // side for length in size)
    if fits and grid == student.grid and (teacher.image_size or grid == stored.tower.grid):
        return stored.for_images(size)
    rows, columns = student.grid
    height, width = rows * side, columns * side
    shown = height if height == width else f"{height} {width}"
    raise InputError(
        f"the teacher's patches of {side} pixels do not lie where the student's do: it has a grid "
        f"of {_times(stored.tower.grid)} for images of {_times(stored.tower.height_width)} and is "
        f"shown {_times(size)}, the student has {_times(student.grid)} patches of "
        f"{student.patch_size}; show it resized images and interpolate its positions with "
        f"--objective.teacher.image-size {shown}, or choose another teacher"
    )


def _times(pair: tuple[int, ...]) -> str:
    return "x".join(map(str, pair))
