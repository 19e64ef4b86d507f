"""CiT's objective: two towers of which a part is trained.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241, section 3.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from frugal.cit.published_vision import read_vision
from frugal.common.checkpoint.init_from import Freedom, init_image, init_text
from frugal.common.contracts import Batch, Initializer
from frugal.common.errors import InputError
from frugal.common.evaluation.provenance import tower_digest
from frugal.common.models.batch_norm import counting
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.flops import projection_flops, projector_flops, tower_flops
from frugal.common.models.pretrained import TransformersText
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive import Contrastive, ContrastiveObjective, Encoded
from frugal.common.objectives.contrastive_loss import Direction
from frugal.common.recipe import Recipe, model_of


@dataclass(frozen=True, kw_only=True)
class LockedContrastive(Contrastive):
    """Images look for their captions, with towers of which a part may stay as it is.

    The projections (heads) and the logit scale are always trained. What is not trained computes as
    in evaluation: without dropout, and with batch norms' running statistics.
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
    """What a text tower of Frugal's own kind starts from: a run directory, or the folder of a model
    of another library whose text tower is of that kind, such as open_clip's."""

    @property
    @override
    def takes_vectors(self) -> bool:
        """Where nothing of the image tower is trained."""
        return self.train_image == "none"

    @property
    @override
    def takes_text_vectors(self) -> bool:
        """Where nothing of the text tower is trained, and no tokens are told."""
        return self.train_text == "none" and not self.token_loss

    def check(self, recipe: Recipe) -> None:
        """Refuse what the towers of a recipe do not have."""
        super().check(recipe)
        model = model_of(DualEncoderConfig, recipe.model)
        image, text = model.image, model.text
        if self.token_loss and self.train_image != "all":
            raise InputError(
                f"objective.token_loss teaches the patches of the image tower, of which "
                f"objective.train_image={self.train_image} trains none; leave one of them out"
            )
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
    def objective_of(self, model: DualEncoder, **options: Any) -> LockedObjective:
        return LockedObjective(model, self, **options)


_PROJECTOR = "a projector is left behind, or new where it is trained"
IMAGE_FREEDOM = Freedom(
    kind="the image tower",
    differences={
        "positions": "the tables themselves are compared",
        "projector_width": _PROJECTOR,
        "projector_outputs": _PROJECTOR,
    },
    needed={
        "projector.": "projector, and a random one would stay as it is; train it with "
        "--objective.train-image head, or leave --model.image.projector-width out"
    },
)
"""What an image tower may do otherwise than the one whose weights it takes."""


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
    def init_from(self, source: Path | ModelBundle | None, start: Initializer) -> None:
        """Take the weights that every tower starts from, unless a run is given.

        Raises:
            InputError: if they cannot be read or do not fit, or a frozen tower would be random.
        """
        if source is not None:
            start.take_all(self, source)
        else:
            self._init_image(start)
            self._init_text(start)
        if self._config.takes_vectors:
            self.frozen_image = tower_digest(self.model.image, self.model.config.image)
        if self._config.takes_text_vectors:
            self.frozen_text = tower_digest(self.model.text)

    def _init_image(self, start: Initializer) -> None:
        config, tower = self._config, self.model.image
        if not isinstance(tower.config, ImageTower):
            self._init_other("image", config.train_image, start.log)
        elif config.image_weights is not None:
            may_be_new = () if config.train_image == "none" else ("projector.",)
            freedom = replace(IMAGE_FREEDOM, may_be_new=may_be_new)
            init_image(tower, read_vision(config.image_weights), freedom, start)
        elif config.train_image != "all":
            raise InputError(
                f"objective.train_image is {config.train_image}, which would keep random weights "
                "as they are; give the image tower's as --objective.image-weights, start from a "
                "run with --run.start-from, or train it whole with --objective.train-image all"
            )

    def _init_text(self, start: Initializer) -> None:
        config, tower = self._config, self.model.text
        if not isinstance(tower.config, TextTower):
            self._init_other("text", config.train_text, start.log)
        elif config.text_weights is not None:
            init_text(tower, Path(config.text_weights), start, tokenizer=self.tokenizer)
        elif config.train_text != "all":
            raise InputError(
                f"objective.train_text is {config.train_text}, which would keep random weights "
                "as they are; give the text tower's as --objective.text-weights, start from a run "
                "with --run.start-from, or train it whole with --objective.train-text all"
            )

    def _init_other(self, part: str, trained: str, log: logging.Logger) -> None:
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
        patches = max(metrics["image_tokens"] - (config.image.class_token != "none"), 0.0)
        tokens = metrics["text_tokens"]
        image = tower_flops(config.image, patches) if patches else 0.0  # stored before
        text = tower_flops(config.text, tokens) if tokens else 0.0
        of_image = 3 if self._config.train_image == "all" else 1
        of_text = 3 if self._config.train_text == "all" else 1
        total = of_image * image + of_text * text + 3 * projection_flops(config)
        if self.token_loss is not None:
            total += 3 * self.token_loss.flops
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
