"""What stands in the recipes of earlier versions, and what it is called now.

Whoever renames a part of a recipe, moves it or renames one of its fields adds a row here, so that
runs and checkpoints of all earlier versions still load.
"""

from __future__ import annotations

TYPES = {
    "frugal.common.data.colour.ColourJitter": "frugal.common.data.color.ColorJitter",
    "frugal.common.interop.imported_encoder.ImportedEncoder": (
        "frugal.common.weights.imported_encoder.ImportedEncoder"
    ),
    "frugal.common.interop.imported_encoder.TrainedElsewhere": (
        "frugal.common.weights.imported_encoder.TrainedElsewhere"
    ),
}
FIELDS = {
    "centred": "centered",
    "colour": "color",
    "grey": "gray",
    "initialisation": "initialization",
    "normalisation": "normalization",
    "normalise_patches": "normalize_patches",
    "optimiser": "optimizer",
}
"""Of any part."""
VALUES = {("fallback", "centre"): "center"}
"""By the field, under its name of today, and the value that it had."""
