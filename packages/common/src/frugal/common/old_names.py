"""What stands in the recipes of earlier versions, and what it is called now.

Whoever renames a part of a recipe, moves it or renames one of its fields adds a row here, so that
runs and checkpoints of all earlier versions still load.
"""

from __future__ import annotations

_TRANSFER = {
    "augmentation.RandAugmentedCrop": "augmentation.RandAugmentedCrop",
    "augmentation.SingleDrawCrop": "augmentation.SingleDrawCrop",
    "classification.Accuracy": "accuracy.Accuracy",
    "classification.Classification": "classification.Classification",
    "classification.ClassifierConfig": "classifier.ClassifierConfig",
    "classification.LinearProbe": "linear_probing.LinearProbing",
    "mixing.Mixing": "mixing.Mixing",
    "mixing.RandomErasing": "mixing.RandomErasing",
    "photometric.PhotometricDistortion": "photometric.PhotometricDistortion",
    "segmentation.MeanIoU": "mean_iou.MeanIoU",
    "segmentation.Segmentation": "segmentation.Segmentation",
    "segmentation.SegmenterConfig": "segmenter.SegmenterConfig",
    "segmentation_data.ScaledCrop": "segmentation_data.ScaledCrop",
    "segmentation_data.SegmentationData": "segmentation_data.SegmentationData",
}
"""Parts that were MILAN's, and are of any image tower."""
TYPES = {
    "frugal.milan.settings.DecoderConfig": "frugal.milan.decoders.DecoderConfig",
    "frugal.milan.settings.MaskedModel": "frugal.milan.model.MaskedModel",
    "frugal.milan.settings.ReconstructFeatures": "frugal.milan.objective.ReconstructFeatures",
    "frugal.milan.settings.ReconstructPixels": "frugal.milan.objective.ReconstructPixels",
    "frugal.milan.settings.Teacher": "frugal.milan.teacher.Teacher",
    "frugal.cit.settings.LockedContrastive": "frugal.cit.objective.LockedContrastive",
    "frugal.common.recipe.AdamW": "frugal.common.optim.optimizers.AdamW",
    "frugal.common.recipe.LARS": "frugal.common.optim.optimizers.LARS",
    "frugal.common.recipe.WarmupCosine": "frugal.common.optim.schedules.WarmupCosine",
    "frugal.milan.segmentation.WarmupLinear": "frugal.common.optim.schedules.WarmupLinear",
    "frugal.common.transfer.segmentation.WarmupLinear": (
        "frugal.common.optim.schedules.WarmupLinear"
    ),
    "frugal.common.data.colour.ColourJitter": "frugal.common.data.color.ColorJitter",
    "frugal.common.interop.imported_encoder.ImportedEncoder": (
        "frugal.common.weights.encoder_config.ImportedEncoder"
    ),
    "frugal.common.interop.imported_encoder.TrainedElsewhere": (
        "frugal.common.weights.encoder_config.TrainedElsewhere"
    ),
    "frugal.common.evaluation.config.Compositional": (
        "frugal.common.evaluation.compositional.Compositional"
    ),
    "frugal.common.evaluation.config.LinearProbe": (
        "frugal.common.evaluation.linear_probe.LinearProbe"
    ),
    "frugal.common.evaluation.config.Retrieval": "frugal.common.evaluation.retrieval.Retrieval",
    "frugal.common.evaluation.config.ZeroShot": "frugal.common.evaluation.zero_shot.ZeroShot",
    "frugal.common.models.config.DualEncoderConfig": "frugal.common.models.clip.DualEncoderConfig",
    "frugal.common.models.config.ImageTower": "frugal.common.models.vit.ImageTower",
    "frugal.common.models.config.TextTower": "frugal.common.models.text.TextTower",
    "frugal.common.objectives.config.Contrastive": (
        "frugal.common.objectives.contrastive.Contrastive"
    ),
} | {f"frugal.milan.{old}": f"frugal.common.transfer.{new}" for old, new in _TRANSFER.items()}
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
