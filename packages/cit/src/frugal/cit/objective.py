"""CiT's objective: two towers of which a part is trained.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241, section 3.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from frugal.cit.tower_start import start_image, start_text
from frugal.common.contracts import Batch
from frugal.common.errors import InputError
from frugal.common.models.batch_norm import counting
from frugal.common.models.clip import DualEncoder
from frugal.common.models.flops import projection_flops, projector_flops, tower_flops
from frugal.common.models.pretrained import TransformersText
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive import Contrastive, ContrastiveObjective, Encoded
from frugal.common.objectives.contrastive_loss import Direction
from frugal.common.recipe import Recipe


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

    @override
    def _objective(self, model: DualEncoder, **options: Any) -> LockedObjective:
        return LockedObjective(model, self, **options)


class LockedObjective(ContrastiveObjective):
    """A contrastive objective that trains what its configuration names."""

    _config: LockedContrastive

    def __init__(self, model: DualEncoder, config: LockedContrastive, **options: Any) -> None:
        """Take the model and freeze what is not trained.

        Args:
            model: the towers.
            config: what is trained, and which loss.
            options: see :class:`~frugal.common.objectives.contrastive.ContrastiveObjective`.
        """
        super().__init__(model, config, **options)
        lock(model.image, {"head": "projector", "all": ""}.get(config.train_image))
        lock(model.text, {"pool": "model.pooler", "all": ""}.get(config.train_text))
        self.train()

    @override
    def _encode(self, batch: Batch) -> Encoded:
        with counting(batch.valid):
            return super()._encode(batch)

    @override
    def start_from(self, source: Path | None, *, interpolate: bool, log: logging.Logger) -> bool:
        """Take the weights that every tower starts from, unless a run is given.

        Raises:
            InputError: if they cannot be read or do not fit, or a frozen tower would be random.
        """
        if source is not None:
            return False
        self._start_image(interpolate=interpolate, log=log)
        self._start_text(interpolate=interpolate, log=log)
        return True

    def _start_image(self, *, interpolate: bool, log: logging.Logger) -> None:
        config, tower = self._config, self.model.image
        if not isinstance(tower.config, ImageTower):
            self._start_other("image", config.train_image, log)
        elif config.image_weights is not None:
            fresh_head = config.train_image != "none"
            start_image(
                tower,
                config.image_weights,
                interpolate=interpolate,
                fresh_projector=fresh_head,
                log=log,
            )
        elif config.train_image != "all":
            raise InputError(
                f"objective.train_image is {config.train_image}, which would keep random weights "
                "as they are; give the image tower's as --objective.image-weights, start from a "
                "run with --run.start-from, or train it whole with --objective.train-image all"
            )

    def _start_text(self, *, interpolate: bool, log: logging.Logger) -> None:
        config, tower = self._config, self.model.text
        if not isinstance(tower.config, TextTower):
            self._start_other("text", config.train_text, log)
        elif config.text_weights is not None:
            start_text(
                tower,
                config.text_weights,
                interpolate=interpolate,
                tokenizer=self.tokenizer,
                log=log,
            )
        elif config.train_text != "all":
            raise InputError(
                f"objective.train_text is {config.train_text}, which would keep random weights "
                "as they are; give the text tower's as --objective.text-weights, start from a run "
                "with --run.start-from, or train it whole with --objective.train-text all"
            )

    def _start_other(self, part: str, trained: str, log: logging.Logger) -> None:
        """Another library's tower."""
        tower = getattr(self.model, part)
        if tower.config.pretrained:
            tower.start(log=log)
        elif trained != "all":
            raise InputError(
                f"objective.train_{part} is {trained}, but model.{part}.pretrained is off, which "
                f"would keep random weights as they are; train it whole with "
                f"--objective.train-{part} all"
            )

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; a frozen part has no backward pass.

        Where something in a tower is trained behind a frozen part, the backward pass stops there.
        """
        config = self.model.config
        patches = metrics["image_tokens"] - (config.image.class_token != "none")
        image = tower_flops(config.image, patches)
        text = tower_flops(config.text, metrics["text_tokens"])
        of_image = 3 if self._config.train_image == "all" else 1
        of_text = 3 if self._config.train_text == "all" else 1
        total = of_image * image + of_text * text + 3 * projection_flops(config)
        if self._config.train_image == "head":
            total += 2 * projector_flops(config.image)
        return total


def lock(tower: nn.Module, trained: str | None) -> None:
    """Freeze a tower but for one of its parts, and the projection.

    Args:
        tower: the whole.
        trained: name of the part; "" for everything, None for nothing.
    """
    for name, parameter in tower.named_parameters():
        is_free = trained is not None and f"{name}.".startswith(f"{trained}." if trained else "")
        if not (is_free or name.startswith("projection.")):
            parameter.requires_grad_(False)
