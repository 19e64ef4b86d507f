"""An image tower that another library trained, as parts of a recipe; none imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from frugal.common.models.vit import ImageTower
from frugal.common.recipe import ModelConfig, ModelInputs, ObjectiveConfig, Recipe, model_of

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ImportedEncoder(ModelConfig):
    """An image tower, and the linear layer on what it pools where it has one."""

    image: ImageTower
    num_classes: int | None = None
    """Numbers that the linear layer puts out; None without one."""

    @override
    def inputs(self) -> ModelInputs:
        """Images."""
        return ModelInputs(height_width=self.image.height_width, num_patches=self.image.num_patches)

    def build(self, generator: torch.Generator | None = None) -> nn.Sequential:
        """``image`` and ``head``, which weights are to be loaded into."""
        from collections import OrderedDict

        from torch import nn

        del generator  # nothing is drawn: such a model always comes with its weights
        parts: OrderedDict[str, nn.Module] = OrderedDict(image=self.image.module())
        if self.num_classes is not None:
            parts["head"] = nn.Linear(self.image.width, self.num_classes)
        return nn.Sequential(parts)


@dataclass(frozen=True, kw_only=True)
class TrainedElsewhere(ObjectiveConfig):
    """Stands where a recipe says what was minimized: nobody here did it, and nothing can go on."""

    def build(self, recipe: Recipe) -> Any:
        """What holds the model; it has no loss."""
        from collections import OrderedDict

        from torch import nn

        return nn.Sequential(OrderedDict(model=model_of(ImportedEncoder, recipe.model).build()))
