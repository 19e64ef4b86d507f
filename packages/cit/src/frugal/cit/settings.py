"""CiT's towers, what of them is trained and how, as parts of a recipe.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from frugal.common.errors import InputError
from frugal.common.models.named import image_tower
from frugal.common.models.pretrained import PretrainedDualEncoderConfig, TransformersText
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.objectives.contrastive_loss import Direction
from frugal.common.recipe import AdamW, Recipe, WarmupCosine

if TYPE_CHECKING:
    from frugal.cit.objective import LockedObjective

_HALF = (0.5, 0.5, 0.5)


def moco_tower(name: str = "B/16", **options: Any) -> ImageTower:
    """MoCo v3's vision transformer with its projector, whose 256 numbers are what is pooled.

    Source: Chen et al., arXiv:2104.02057. The position table is that of the file, so that a run
    gives the file back bit for bit.
    """
    return image_tower(name, **{"projector_width": 4096, **options})


def augreg_tower(name: str = "B/32", **options: Any) -> ImageTower:
    """The vision transformers of Steiner et al., arXiv:2106.10270: B/32, B/16 and L/16."""
    return image_tower(name, **{"mean": _HALF, "std": _HALF, **options})


def swag_tower(name: str = "B/16", **options: Any) -> ImageTower:
    """The vision transformers of Singh et al., arXiv:2201.08371: B/16, L/16 and H/14."""
    return image_tower(name, **options)


def dual_encoder(image: Any, text: Any = None) -> PretrainedDualEncoderConfig:
    """An image tower beside SimCSE's BERT (or another text tower), meeting in 512 dimensions."""
    return PretrainedDualEncoderConfig(image=image, text=text or TransformersText())


@dataclass(frozen=True, kw_only=True)
class LockedContrastive(Contrastive):
    """Images look for their captions, with towers of which a part may stay as it is.

    The projections and the logit scale are always trained. What is not trained computes as in
    evaluation: without dropout, and with batch norms' running statistics.
    """

    directions: tuple[Direction, ...] = ("image_to_text",)
    train_image: Literal["none", "head", "all"] = "head"
    """Of the image tower: nothing, its projector alone, or everything."""
    train_text: Literal["none", "pool", "all"] = "all"
    """Of the text tower: nothing, its pooler alone, or everything."""
    image_weights: str | None = None
    """What an image tower of Frugal's own kind starts from: a file of MoCo v3, SWAG, timm, CLIP or
    DINO, a folder or a name on the Hugging Face hub (of timm's vision transformers, say), or a run
    directory. Towers of other libraries name their weights themselves."""
    text_weights: str | None = None
    """What a text tower of Frugal's own kind starts from: a run directory."""

    def check(self, recipe: Recipe) -> None:
        """Refuse what the towers of a recipe do not have."""
        super().check(recipe)
        image, text = recipe.model.image, recipe.model.text
        has_projector = isinstance(image, ImageTower) and image.projector_width is not None
        if self.train_image == "head" and not has_projector:
            raise InputError(
                "objective.train_image is head, but model.image has no projector (projector_width) "
                "that could be trained alone; choose none or all"
            )
        has_pooler = isinstance(text, TransformersText) and text.pooling == "pooler"
        if self.train_text == "pool" and not has_pooler:
            raise InputError(
                "objective.train_text is pool, but model.text has no pooler that could be trained "
                "alone; choose none or all"
            )
        if self.image_weights is not None and not isinstance(image, ImageTower):
            raise InputError(
                f"objective.image_weights is {self.image_weights}, but model.image names its "
                "weights itself; leave it out"
            )
        if self.text_weights is not None and not isinstance(text, TextTower):
            raise InputError(
                f"objective.text_weights is {self.text_weights}, but model.text names its weights "
                "itself; leave it out"
            )
        if has_projector and self.train_image != "none" and recipe.engine.cache_chunk is not None:
            raise InputError(
                "engine.cache_chunk encodes a batch in parts, but the batch norms of the projector "
                "need it whole; leave it out, or set objective.train_image to none"
            )

    def _kind(self) -> type[LockedObjective]:
        from frugal.cit.objective import LockedObjective

        return LockedObjective


def published_optimizer(**options: Any) -> AdamW:
    """AdamW with its three groups: projections 1.0, matrices and tables 0.2, vectors 0.

    The published runs decay the logit scale too and never clamp it: that is
    ``no_decay=("bias", "norm")`` here, and ``clamp="never"`` of the objective.
    """
    settings: dict[str, Any] = {
        "learning_rate": 5e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.2,
        "projection_weight_decay": 1.0,
        "no_decay": ("vector",),
    }
    return AdamW(**{**settings, **options})


def published_schedule(updates: int, batch_size: int) -> WarmupCosine:
    """Warm-up over a 25th of the updates from 0, then half a cosine down to 1e-5."""
    return WarmupCosine(
        samples=updates * batch_size,
        warmup_samples=updates // 25 * batch_size,
        floor=1e-5,
    )
