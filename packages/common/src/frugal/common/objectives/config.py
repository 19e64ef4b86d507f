"""The objectives as recipes name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from frugal.common.data.color import NO_CHANGE
from frugal.common.errors import InputError
from frugal.common.randomness import weight_generator
from frugal.common.ranges import Count, check_ranges
from frugal.common.recipe import Recipe

if TYPE_CHECKING:
    from frugal.common.objectives.contrastive import ContrastiveObjective

Direction = Literal["image_to_text", "text_to_image"]
BOTH: tuple[Direction, ...] = ("image_to_text", "text_to_image")


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Tell every pair's partners from all others of the global batch."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """CLIP's loss, or SigLIP's, for which the model needs an initial_logit_bias."""
    directions: tuple[Direction, ...] = BOTH
    """Who looks for whom; the loss is the mean over the directions."""
    clamp: Literal["after_step", "forward", "never"] = "after_step"
    """How the logit scale stays within 1 and 100: the parameter itself after every step, or only
    where it is used, as in FLIP's published runs, or not at all, as in CiT's."""
    chunk: Count | None = None
    """Columns of the global batch compared at a time; by default few enough for 4 MiB of logits."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
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
        if getattr(recipe.data, "tokenizer", self) is None:
            raise InputError(
                "a contrastive objective needs captions, but data.tokenizer is None, which reads "
                "images alone; choose a tokenizer"
            )
        bias = getattr(recipe.model, "initial_logit_bias", None)
        if (bias is not None) != (self.loss == "sigmoid"):
            raise InputError(
                f"objective.loss={self.loss} does not go with model.initial_logit_bias={bias}: the "
                "sigmoid loss needs a bias (-10 in SigLIP) and the softmax loss has no use for one"
            )

    def build(self, recipe: Recipe) -> ContrastiveObjective:
        """The objective with freshly drawn weights, on the CPU in float32."""
        model = recipe.model.build(weight_generator(recipe.run.seed))
        model.checkpoint_activations = recipe.engine.checkpoint_activations
        if recipe.engine.compile:
            model.image.compile()
            model.text.compile()
        return self._kind()(
            model,
            self,
            reduction=recipe.reduction.image,
            seed=recipe.run.seed,
            samples=recipe.schedule.samples,
            color=getattr(recipe.data, "color", NO_CHANGE),
            tokenizer=getattr(recipe.data, "tokenizer", None),
        )

    def _kind(self) -> type[ContrastiveObjective]:
        from frugal.common.objectives.contrastive import ContrastiveObjective

        return ContrastiveObjective
