"""The objective: which words stand in the caption of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.contracts import Batch, Objective, Tower
from frugal.common.errors import InputError
from frugal.common.randomness import SampleNoise, weight_generator
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.image import ImageReduction, PatchView
from frugal.superclass.model import WordModel, WordNetwork


@dataclass(frozen=True, kw_only=True)
class PredictWords(ObjectiveConfig):
    """Softmax cross-entropy with the words of the caption as equally likely targets."""

    @override
    def check(self, recipe: Recipe) -> None:
        """Refuse a model that predicts no words, and data that may not be read as captions."""
        if not isinstance(recipe.model, WordModel):
            raise InputError(
                f"objective PredictWords trains a WordModel, but model is a "
                f"{type(recipe.model).__name__}; choose another objective"
            )
        if recipe.reduction.text is None:
            raise InputError(
                "objective PredictWords needs captions: set reduction.text, such as Truncate()"
            )

    @override
    def build(self, recipe: Recipe) -> WordObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        model = model_of(WordModel, recipe.model).build(weight_generator(recipe.run.seed))
        return WordObjective(model, recipe.reduction.image, seed=recipe.run.seed)


class WordObjective(Objective):
    """Maps a batch to the mean cross-entropy of its captions' words."""

    model: WordNetwork

    def __init__(self, model: WordNetwork, reduction: ImageReduction, *, seed: int) -> None:
        super().__init__()
        self.model = model
        self.reduction = reduction
        self._seed = seed

    @override
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a micro-batch; the loss is a mean over the valid samples."""
        view, noise = self.patch_view(batch)
        kept = self.reduction.keep(view, noise=noise)
        logits = self.model(batch.images, kept).float()  # (B, V)
        target = words_of(batch, logits.shape[1])  # (B, V), rows that add up to 1
        losses = -(target * logits.log_softmax(1)).sum(1)  # (B,)
        valid = batch.valid.float()
        best = logits.argmax(1, keepdim=True)
        hits = (target.gather(1, best) > 0).squeeze(1).float()
        tower = self.model.config.image
        patches = view.num_patches if kept is None else kept.counts.float().mean()
        count = valid.sum().clamp(min=1)
        return (losses * valid).sum() / count, {
            "accuracy": (hits * valid).sum().detach() / count,
            "image_tokens": losses.new_tensor(0.0) + patches + (tower.class_token != "none"),
        }

    @override
    def towers(self) -> Sequence[Tower]:
        """The image tower: what the engine compiles and recomputes."""
        return (self.model.image,)

    @override
    def patch_view(self, batch: Batch) -> tuple[PatchView, SampleNoise]:
        """What the image reduction sees of a batch, and where it gets its random numbers."""
        view = PatchView.of(batch.images, self.model.config.image)
        return view, SampleNoise(self._seed, batch.sample_numbers)


def words_of(batch: Batch, vocab_size: int) -> Tensor:
    """(B, V) float32: 1/K at each of the K distinct tokens of a caption; zeros without a caption.

    Raises:
        InputError: if the data has no captions.
    """
    if batch.token_ids is None or batch.text_lengths is None:
        raise InputError("words can only be predicted of data with captions; choose other data")
    ids = batch.token_ids  # (B, T), padded on the right
    slots = torch.arange(ids.shape[1], device=ids.device)
    is_token = (slots < batch.text_lengths[:, None]).float()
    words = is_token.new_zeros(len(ids), vocab_size).scatter_reduce_(1, ids, is_token, "amax")
    return words / words.sum(1, keepdim=True).clamp(min=1)
