"""What every library's writer needs: options that it lacks, and the proof.

Whatever is written is read back by the library that it is for, and compared with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder
from frugal.common.models.bundle import ImageSpec, ModelBundle
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.weights.library import UnsupportedOption

_CAPTIONS = [
    "a photo of a cat",
    "Two red circles, left of 3 blue squares!",
    "it's the dog's ball; isn't it GREAT? (naïve café, 7½)",
    "a very long caption " * 30,
]


def unsupported_projector(tower: ImageTower) -> UnsupportedOption | None:
    """What no other library has behind its vision transformers."""
    if tower.projector_width is None:
        return None
    return UnsupportedOption(
        f"model.image.projector_width={tower.projector_width}",
        "its vision transformers have no MLP with batch norms behind what they pool",
    )


def unsupported_tower(
    bundle: ModelBundle, *parts: Literal["image", "text"]
) -> UnsupportedOption | None:
    """The first of these towers that is none of this library's."""
    kinds = {"image": (bundle.image, ImageTower), "text": (bundle.text, TextTower)}
    for part, (tower, kind) in kinds.items():
        if part in parts and not isinstance(tower, kind):
            option = f"model.{part}={type(tower).__name__}"
            return UnsupportedOption(option, "that is a tower of another library")
    return None


class TwoTowers(NamedTuple):
    """A dual encoder whose parts are known."""

    model: DualEncoder
    config: DualEncoderConfig
    tokenizer: Tokenizer
    transform: CenterCrop

    @property
    def captions_end(self) -> bool:
        """Whether a caption ends with a token that does not begin it too."""
        end = self.tokenizer.end_id
        return end is not None and end not in self.tokenizer.prefix


def two_towers(bundle: ModelBundle) -> TwoTowers:
    """A dual encoder, about to be written.

    Raises:
        InputError: if the model is another library's, or its tokenizer cannot be loaded or has ids
            that the model has no row for.
    """
    model, config, tokenizer = bundle.model, bundle.config, bundle.tokenizer
    if not (isinstance(model, DualEncoder) and isinstance(config, DualEncoderConfig)):
        raise InputError(
            f"{bundle.source.path} is a model of {bundle.source.library} with parts that towers of "
            "this library do not have; it is exported by that library"
        )
    assert tokenizer is not None
    rows = config.text.vocabulary
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer of {bundle.source.path} has {tokenizer.vocab_size:,} entries for the "
            f"{rows:,} rows of the model's token table; export the run with the tokenizer it was "
            "trained with"
        )
    return TwoTowers(model, config, tokenizer, bundle.transform)


# ------------------------------------------------------------------------------------------------
# The proof


class Embedded(NamedTuple):
    """What a model makes of some images and captions."""

    images: Tensor
    """(B, E) unit vectors."""
    texts: Tensor
    """(C, E) unit vectors."""
    logit: Tensor
    """(1,) the logarithm of the scale on the cosines; (2,) with the bias of a sigmoid loss."""


class Seen(NamedTuple):
    """What an image tower makes of some images."""

    scores: Tensor | None
    """(B, C) what its head puts out, or, where there is none, (B, D) what it pools."""
    tokens: Tensor | None = None
    """(B, [1 +] N, D) after the last norm; before it, where that acts on the pooled vector."""


def embedding_difference(
    bundle: ModelBundle, embed: Callable[[Path, Tensor, list[str]], Embedded], folder: Path
) -> float:
    """How far another library's embeddings are from the model's, for noise and a few captions.

    Args:
        bundle: a dual encoder.
        embed: what the library makes of (B, 3, H, W) uint8 images and of captions with a written
            folder.
        folder: as it was written.

    Returns:
        The largest difference of a number; infinite if one is not finite.
    """
    towers, images = two_towers(bundle), noise_images(bundle.image)
    embedder = Embedder(
        towers.model,
        towers.tokenizer,
        context_length=towers.config.text.length,
        device=torch.device("cpu"),
    )
    logit: list[Tensor] = [towers.model.logit_scale]
    if towers.model.logit_bias is not None:
        logit.append(towers.model.logit_bias)
    with torch.no_grad():
        here = Embedded(embedder.images(images), embedder.texts(_CAPTIONS), torch.cat(logit))
        there = embed(folder, images, _CAPTIONS)
    worst = 0.0
    for one, other in zip(here, there, strict=True):
        if one.shape != other.shape or not (one - other).isfinite().all():
            return float("inf")
        worst = max(worst, (one - other).abs().max().item())
    return worst


@torch.no_grad()
def tower_difference(
    encoder: ImageEncoder, see: Callable[[Path, Tensor], Seen], folder: Path
) -> float:
    """The same of an image tower alone: the largest difference, over the largest number.

    Args:
        encoder: the tower.
        see: what the library makes of (B, 3, H, W) uint8 images with a written folder.
        folder: as it was written.
    """
    images, transformer = noise_images(encoder.tower), encoder.build(needs_norm=False).eval()
    scores = transformer.forward_pooled if encoder.scores is None else encoder.scores
    here, there = (scores(images), transformer.forward_tokens(images)), see(folder, images)
    return max(
        largest_difference(one, other)
        for one, other in zip(here, there, strict=True)
        if other is not None
    )


def largest_difference(here: Tensor, there: Tensor) -> float:
    """That of two numbers at one place, over the largest of the first where that is above 1.

    Returns:
        Infinity if the shapes differ or a number is not finite.
    """
    if here.shape != there.shape or not (here - there).isfinite().all():
        return float("inf")
    return float((here - there).abs().max()) / max(1.0, float(here.abs().max()))


def noise_images(image: ImageSpec) -> Tensor:
    """(4, 3, H, W) uint8, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, *image.height_width)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
