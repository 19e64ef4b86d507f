"""Two towers, a token reduction and a contrastive loss: the objective of four of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.contracts import Batch, ColorChange, Objective, Tower
from frugal.common.data.color import NO_CHANGE
from frugal.common.distributed import mean_over_valid
from frugal.common.errors import InputError
from frugal.common.models.bundle import TokenizerSource
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.flops import dual_encoder_flops
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive_loss import (
    BOTH,
    LARGEST_LOG_SCALE,
    Direction,
    clip_log_scale,
    contrastive_loss,
    sigmoid_loss,
)
from frugal.common.objectives.token_loss import TokenLoss
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.ranges import Count, NotNegative, check_choices, check_ranges
from frugal.common.recipe import GroupsBy, ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView

_GRAY = 128
"""Where a picture shows a patch that the tower does not see."""


@dataclass(frozen=True, kw_only=True)
class Contrastive(ObjectiveConfig):
    """Tell every pair's partners from all others of the global batch."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's loss, or SigLIP's, for which the model needs an initial_logit_bias."""
    directions: tuple[Direction, ...] = BOTH
    """Which side is the query that is to find its partner; the loss is the mean over them."""
    clamp: Literal["after_step", "forward", "never"] = "after_step"
    """How the logit scale stays within 1 and 100: the parameter itself after every step, or only
    where it is used, as in FLIP's published runs, or not at all, as in CiT's."""
    positives: Literal["partner", "equal_captions", "group"] = "partner"
    """Which captions an image belongs to: its own alone; those equal to it, too, which are no
    mistakes where it finds them; or those of all samples of its group (data.fields.group)."""
    token_loss: NotNegative = 0.0
    """Factor on a second loss, by which images tell the tokens of their captions, rare ones above
    all (SuperCLIP, arXiv:2512.14480; 1 there). 0 leaves it out."""
    chunk: Count | None = None
    """Columns of the global batch compared at a time; by default few enough for 4 MiB of logits."""

    compares_samples: ClassVar[bool] = True
    caches_gradients: ClassVar[bool] = True

    @property
    @override
    def groups_by(self) -> GroupsBy | None:
        """Captions or a field, where more than the partner is positive."""
        ways: dict[str, GroupsBy] = {"equal_captions": "caption", "group": "field"}
        return ways.get(self.positives)

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
        check_choices(self, "objective")
        if not self.directions or len(set(self.directions)) < len(self.directions):
            raise InputError(
                f"objective.directions is {self.directions}; name image_to_text, text_to_image or "
                "both, each once"
            )
        if self.loss == "sigmoid" and set(self.directions) != set(BOTH):
            raise InputError(
                f"objective.directions is {self.directions}, but objective.loss=sigmoid has no "
                "directions; leave them out"
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse a model or data that do not fit the loss."""
        if recipe.data.caption_tokenizer is None:
            raise InputError(
                "a contrastive objective needs captions, but data.tokenizer is None, which reads "
                "images alone; choose a tokenizer"
            )
        if self.token_loss:
            self._check_token_loss(recipe)
        bias = recipe.model.initial_logit_bias
        if (bias is not None) != (self.loss == "sigmoid"):
            raise InputError(
                f"objective.loss={self.loss} does not go with model.initial_logit_bias={bias}: the "
                "sigmoid loss needs a bias (-10 in SigLIP) and the softmax loss has no use for one"
            )

    def _check_token_loss(self, recipe: Recipe) -> None:
        config = model_of(DualEncoderConfig, recipe.model)
        for part, tower, kind in (
            ("image", config.image, ImageTower),
            ("text", config.text, TextTower),
        ):
            if not isinstance(tower, kind):
                raise InputError(
                    f"objective.token_loss reads the patches of an image tower and the vocabulary "
                    f"of a text tower of this library, but model.{part} is a "
                    f"{type(tower).__name__}; leave it out, or choose a {kind.__name__}"
                )

    def build(self, recipe: Recipe) -> ContrastiveObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        generator = weight_generator(recipe.run.seed)
        config = model_of(DualEncoderConfig, recipe.model)
        model = config.build(generator)
        token_loss = None
        if self.token_loss:
            token_loss = TokenLoss(config.image.width, config.text.vocabulary)
            token_loss.initialize(generator)
        return self.objective_of(
            model,
            token_loss=token_loss,
            reduction=recipe.reduction.image,
            seed=recipe.run.seed,
            samples=recipe.schedule.samples,
            color=recipe.data.color_change or NO_CHANGE,
            tokenizer=recipe.data.caption_tokenizer,
        )

    def objective_of(self, model: DualEncoder, **options: Any) -> ContrastiveObjective:
        """The module that trains a model; a variant of this loss brings one of its own.

        Args:
            model: whose weights were just drawn.
            options: what else :class:`ContrastiveObjective` takes.
        """
        return ContrastiveObjective(model, self, **options)


class Encoded(NamedTuple):
    """What the loss needs to know of a batch, or the gradients of it."""

    images: Tensor
    """(B, E) unit vectors."""
    texts: Tensor
    """(B, E) unit vectors."""
    log_scale: Tensor
    """(1,) logarithm of the factor on the cosines."""
    logit_bias: Tensor | None
    """(1,) added to every logit; None but for the sigmoid loss."""
    patches: Tensor
    """(B,) patches that the tower saw of each image."""
    text_tokens: Tensor
    """(B,) tokens that the tower saw of each caption."""
    token_losses: Tensor | None = None
    """(B,) the second loss of each image, where there is one."""


class ContrastiveObjective(Objective):
    """Pairs of a batch to their loss over the batch of all processes."""

    model: DualEncoder
    auxiliary: ClassVar[tuple[str, ...]] = ("token_loss.",)

    def __init__(
        self,
        model: DualEncoder,
        config: Contrastive,
        *,
        reduction: ImageReduction,
        seed: int,
        samples: int | None = None,
        color: ColorChange = NO_CHANGE,
        tokenizer: TokenizerSource | None = None,
        token_loss: TokenLoss | None = None,
    ) -> None:
        """Take the model and train it.

        Args:
            model: the towers, with a bias if the loss is the sigmoid one.
            config: which loss.
            reduction: which patches stay; its noise is a function of seed and sample.
            seed: the run's.
            samples: that the run trains on, for reductions that change on the way.
            color: how the colors of images change; drawn from seed and sample too.
            tokenizer: of the data, in its configuration: weights go with the ids of one.
            token_loss: the layer of the second loss, where there is one.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.model = model
        self.token_loss = token_loss
        self._config = config
        self.reduction = reduction
        self._seed = seed
        self._samples = samples
        self._color = color

    @override
    def forward(  # type: ignore[override]
        self, batch: Batch, *, encode_only: bool = False, gradients: Encoded | None = None
    ) -> Any:
        """The loss of a batch, or one of the two halves of gradient caching.

        All three go through here because DDP, FSDP and ZeRO act when this is called.

        Args:
            batch: with captions.
            encode_only: stop before the loss.
            gradients: of the loss by what encoding this batch gives.

        Returns:
            (loss, metrics): the mean of the loss over the processes is that of their joint batch.
            With ``encode_only`` the :class:`Encoded`. With ``gradients`` a scalar whose gradient
            by every parameter is the loss's.
        """
        encoded = self._encode(batch)
        if encode_only:
            return encoded
        if gradients is not None:
            return _surrogate(encoded, gradients)
        return self.loss(encoded, batch)

    def _encode(self, batch: Batch) -> Encoded:
        batch = self._colored(batch)
        bias = self.model.logit_bias
        images, patches, token_losses = self._encode_images(batch)
        texts, text_tokens = self._encode_texts(batch)
        return Encoded(
            images=images,
            texts=texts,
            # copies: under ZeRO-3 and FSDP a parameter may be gone when this call returns
            log_scale=self.model.logit_scale.clone(),
            logit_bias=None if bias is None else bias.clone(),
            patches=patches,
            text_tokens=text_tokens,
            token_losses=token_losses,
        )

    def _encode_images(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, E) unit vectors, how many patches of each the tower saw, and (B,) second losses."""
        if batch.features is not None:  # the tower has seen the image before
            return self.model.project_image(batch.features), batch.sample_numbers * 0, None
        kept = self._keep(batch)
        counts = batch.sample_numbers.new_full((len(batch),), self.model.config.image.num_patches)
        counts = counts if kept is None else kept.counts
        if self.token_loss is None:
            return self.model.encode_image(batch.images, kept), counts, None
        images, patches = self.model.encode_image_and_patches(batch.images, kept)
        return images, counts, self.token_loss(patches, batch)

    def _encode_texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, E) unit vectors, and (B,) how many tokens of each the tower saw."""
        if batch.text_features is not None:  # the tower has seen the caption before
            return self.model.project_text(batch.text_features), batch.sample_numbers * 0
        if batch.token_ids is None:
            raise InputError(
                "a contrastive objective needs captions, but the data has none; choose a source "
                "of image-text pairs"
            )
        texts = self.model.encode_text(batch.token_ids, batch.text_lengths, batch.text_positions)
        return texts, self._text_tokens(batch, batch.token_ids)

    @override
    def begin_step(self, batches: Sequence[Batch]) -> None:
        if self.token_loss is not None:
            self.token_loss.count(batches)

    def _colored(self, batch: Batch) -> Batch:
        if batch.features is not None:
            return batch
        noise = SampleNoise(self._seed, batch.sample_numbers)
        return replace(batch, images=self._color.apply(batch.images, noise=noise))

    def _keep(self, batch: Batch) -> KeptPatches | None:
        view, noise = self._view(batch)
        return self.reduction.keep(view, noise=noise)

    @override
    def towers(self) -> Sequence[Tower]:
        """Both."""
        return (self.model.image, self.model.text)

    @override
    def patch_view(self, batch: Batch) -> tuple[PatchView, SampleNoise]:
        """What the image reduction sees of a batch, and where it gets its random numbers."""
        return self._view(self._colored(batch))

    def _view(self, colored: Batch) -> tuple[PatchView, SampleNoise]:
        images, numbers = colored.images, colored.sample_numbers
        view = PatchView.of(
            images,
            self.model.config.image,
            embed=lambda: self.model.image(images, output="embedded"),
            progress=None if self._samples is None else numbers / self._samples,
        )
        return view, SampleNoise(self._seed, numbers)

    def _text_tokens(self, batch: Batch, token_ids: Tensor) -> Tensor:
        tower = self.model.config.text
        if tower.packed and batch.text_lengths is not None:
            return batch.text_lengths.clamp(min=1)
        fills_up = tower.padding_matters and batch.text_positions is None
        slots = tower.length if fills_up else token_ids.shape[1]
        return token_ids.new_full((len(batch),), slots)

    def loss(self, encoded: Encoded, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of encoded pairs, in float32, and what to report beside it.

        Args:
            encoded: this process's pairs.
            batch: which of them count, and which belong together.

        Returns:
            (loss, metrics) as ``forward`` does.
        """
        groups = None if self._config.groups_by is None else batch.groups
        if self._config.groups_by is not None and groups is None:
            raise InputError(
                f"objective.positives is {self._config.positives}, but the data tell no groups of "
                "samples; choose partner"
            )
        log_scale = encoded.log_scale
        if self._config.clamp == "forward":
            log_scale = clip_log_scale(log_scale)
        if encoded.logit_bias is None:
            loss, accuracy = contrastive_loss(
                encoded.images,
                encoded.texts,
                log_scale,
                valid=batch.valid,
                groups=groups,
                directions=self._config.directions,
                chunk=self._config.chunk,
            )
        else:
            loss, accuracy = sigmoid_loss(
                encoded.images,
                encoded.texts,
                log_scale,
                encoded.logit_bias,
                valid=batch.valid,
                groups=groups,
                chunk=self._config.chunk,
            )
        tower = self.model.config.image
        patches = encoded.patches.float().mean()
        metrics = {}
        if encoded.token_losses is not None:
            second = mean_over_valid(encoded.token_losses, batch.valid)
            metrics["token_loss"] = second.detach()
            loss = loss + self._config.token_loss * second
        metrics |= {
            "accuracy": accuracy,
            "logit_scale": log_scale.detach().float().exp().squeeze(),
            "image_tokens": patches + (patches > 0) * (tower.class_token != "none"),
            "text_tokens": encoded.text_tokens.float().mean(),
            "mask_ratio": 1 - patches / tower.num_patches,
        }
        return loss, metrics

    @override
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Parameters, by name, that the engine keeps within bounds after every step."""
        if self._config.clamp != "after_step":
            return {}
        return {"model.logit_scale": (0.0, LARGEST_LOG_SCALE)}

    @override
    def step_flops(self, metrics: dict[str, float]) -> float:
        """Forward and backward FLOPs of one sample; the backward pass costs twice the forward."""
        config = self.model.config
        patches = max(metrics["image_tokens"] - (config.image.class_token != "none"), 0.0)
        forward = dual_encoder_flops(config, patches=patches, tokens=metrics["text_tokens"])
        if self.token_loss is not None:
            forward += self.token_loss.flops
        return 3 * forward

    @torch.no_grad()
    def draw(self, batch: Batch) -> np.ndarray | None:
        """Images above, what the tower sees of them below: (3, 2 H, B W) uint8."""
        if batch.features is not None:
            return None
        batch = self._colored(batch)
        images = self._as_bytes(batch.images)  # (B, 3, H, W)
        kept = self._keep(batch)
        seen = images
        if kept is not None:
            tower = self.model.config.image
            stays = kept.mask(tower.num_patches).view(-1, 1, *tower.grid)
            for side in (2, 3):
                stays = stays.repeat_interleave(tower.patch_size, dim=side)  # (B, 1, H, W)
            seen = images.where(stays, _GRAY)
        rows = [row.permute(1, 2, 0, 3).flatten(2) for row in (images, seen)]  # (3, H, B W)
        return torch.cat(rows, dim=1).cpu().numpy()

    @torch.no_grad()
    def draw_reduction(self, batch: Batch) -> np.ndarray | None:
        """What the image reduction draws of a batch, (3, H*, W*) uint8, where it draws itself."""
        if batch.features is not None:
            return None
        batch = self._colored(batch)
        view, noise = self._view(batch)
        return self.reduction.draw(view, self._as_bytes(batch.images), noise=noise)

    def _as_bytes(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return images
        tower = self.model.config.image
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _surrogate(encoded: Encoded, gradients: Encoded) -> Tensor:
    """A scalar whose gradient by what was encoded are the given gradients."""
    total = (encoded.images * gradients.images).sum() + (encoded.texts * gradients.texts).sum()
    total = total + (encoded.log_scale * gradients.log_scale).sum()
    if encoded.logit_bias is not None and gradients.logit_bias is not None:
        total = total + (encoded.logit_bias * gradients.logit_bias).sum()
    if encoded.token_losses is not None and gradients.token_losses is not None:
        total = total + (encoded.token_losses * gradients.token_losses).sum()
    return total
