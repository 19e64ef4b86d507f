"""MILAN's parts of a recipe: encoder and decoder, teacher, what is reconstructed.

Source: Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation",
arXiv:2208.06049; pixels and the plain decoder are those of MAE, arXiv:2111.06377. Nothing here
imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from frugal.common.errors import InputError
from frugal.common.models.blocks import Activation
from frugal.common.models.vit import ImageTower
from frugal.common.ranges import Count, check_ranges
from frugal.common.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from frugal.milan.model import MaskedImageModel
    from frugal.milan.objective import Reconstruction


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What tells the target of every patch from the encoded ones; thrown away after pretraining."""

    kind: Literal["prompting", "plain"] = "prompting"
    """prompting: encoded tokens stay as they are and hidden ones gather from them (MILAN). plain:
    all tokens change in ordinary blocks (MAE)."""
    width: Count = 512
    depth: Count = 8
    """Blocks."""
    heads: Count = 16

    def __post_init__(self) -> None:
        check_ranges(self, "model.decoder")

    def tower(self, image: ImageTower) -> ImageTower:
        """The shape of the decoder's blocks and positions, on the grid of an encoder.

        Raises:
            InputError: if there is no such decoder.
        """
        try:
            return ImageTower(
                width=self.width,
                depth=self.depth,
                heads=self.heads,
                mlp_width=4 * self.width,
                patch_size=image.patch_size,
                image_size=image.image_size,
                positions="sincos",
                norm_epsilon=image.norm_epsilon,
            )
        except InputError as error:
            raise InputError(str(error).replace("image.", "model.decoder.")) from None


@dataclass(frozen=True, kw_only=True)
class MaskedModel:
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

    def build(self, generator: torch.Generator | None = None, *, outputs: int) -> MaskedImageModel:
        """The model, on the CPU in float32, with weights drawn from ``generator`` (or seed 0).

        Args:
            generator: on the CPU.
            outputs: numbers predicted for every token.
        """
        from frugal.milan.model import build

        return build(self, generator, outputs=outputs)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen image tower that says what is reconstructed, and what in an image matters."""

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


@dataclass(frozen=True, kw_only=True)
class ReconstructFeatures:
    """Every token, seen or hidden, is to say what the teacher says of the whole image there.

    The loss is the squared distance of unit vectors, from 0 to 4 (arXiv:2208.06049, section 3.1).
    """

    teacher: Teacher = field(default_factory=Teacher)

    def check(self, recipe: Recipe) -> None:
        """Refuse what this objective cannot do."""
        _check(recipe)

    def build(self, recipe: Recipe) -> Reconstruction:
        """The objective with freshly drawn weights, on the CPU in float32, and its teacher.

        Raises:
            InputError: if there is no teacher, or its patches do not lie where the student's do.
        """
        from frugal.milan.objective import reconstruct_features

        return reconstruct_features(self, recipe)


@dataclass(frozen=True, kw_only=True)
class ReconstructPixels:
    """Every hidden patch is to show its pixels: MAE (arXiv:2111.06377)."""

    normalize_patches: bool = True
    """Bring the pixels of every patch to mean 0 and variance 1 first."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what this objective cannot do."""
        _check(recipe)

    def build(self, recipe: Recipe) -> Reconstruction:
        """The objective with freshly drawn weights, on the CPU in float32."""
        from frugal.milan.objective import reconstruct_pixels

        return reconstruct_pixels(self, recipe)


def _check(recipe: Recipe) -> None:
    if not isinstance(recipe.model, MaskedModel):
        raise InputError(
            "reconstruction needs a model with a decoder (frugal.milan.settings.MaskedModel), not "
            f"{type(recipe.model).__name__}"
        )
    if recipe.engine.cache_chunk is not None:
        raise InputError(
            "engine.cache_chunk is for losses that compare the samples of a batch; leave it out"
        )
    if recipe.reduction.text is not None:
        raise InputError(
            "reduction.text is given, but reconstruction reads no captions; leave it out"
        )
    if getattr(recipe.reduction.image, "mask_ratio", None) == 0:
        raise InputError(
            "reduction.image.mask_ratio is 0, which hides nothing that could be reconstructed; "
            "the published ratio is 0.75"
        )
