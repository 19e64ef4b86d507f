"""Run directories of small untrained models, as training leaves them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe, TokenizerConfig
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import EngineOptions, Recipe, Reductions
from frugal.common.recipe_json import to_json
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate
from frugal.common.run import Run

STEP = 20


def small(config: DualEncoderConfig, **options) -> DualEncoderConfig:
    """The same kind of towers in a size for tests; options of both: ``image``, ``text``, others."""
    image = {"width": 24, "depth": 2, "heads": 3, "mlp_width": 60, "patch_size": 8}
    text = {"width": 20, "depth": 2, "heads": 2, "mlp_width": 48, "length": 16}
    image |= {"image_size": 32, **options.pop("image", {})}
    text |= options.pop("text", {})
    return replace(
        config,
        image=replace(config.image, **image),
        text=replace(config.text, **text),
        **{"embed_dim": 12, **options},
    )


def write_run(
    folder: Path,
    model: DualEncoderConfig,
    *,
    tokenizer: TokenizerConfig | None = None,
    average: bool = False,
    spoil: float | None = None,
) -> Path:
    """A run directory whose norms are not 1 and biases not 0, so that a swap of two shows."""
    bias = model.initial_logit_bias
    recipe = Recipe(
        model=model,
        data=PairData(train=("pairs.tar",), tokenizer=tokenizer or ClipBpe()),
        reduction=Reductions(image=RandomMasking(mask_ratio=0.5), text=Truncate()),
        objective=Contrastive(loss="softmax" if bias is None else "sigmoid"),
        optimizer=AdamW(learning_rate=1e-3),
        schedule=WarmupCosine(samples=480),
        batch_size=24,
        engine=EngineOptions(ema_decay=0.9 if average else None),
        evaluation=(ZeroShot(), Retrieval()),
    )
    return write_run_of(folder, recipe, spoil=spoil)


def write_run_of(folder: Path, recipe: Recipe, *, spoil: float | None = None) -> Path:
    """The same of any recipe of image-text pairs."""
    average = recipe.engine.ema_decay is not None
    generator = torch.Generator().manual_seed(3)
    objective = recipe.objective.build(recipe)
    tensors = {}
    for name, weight in objective.state_dict().items():
        for kind in ("weight", "exp_avg", "exp_avg_sq", *(["ema"] if average else [])):
            noise = torch.randn(weight.shape, generator=generator)
            tensors[f"{kind}/{name}"] = weight + 0.05 * noise
    if spoil is not None:
        tensors["weight/model.image.norm.bias"][3] = spoil
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    recipe.data.save_tokenizer(folder / "tokenizer")
    write_tensors(folder, tensors)
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint of one process into a run directory."""
    run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
    state = {"step": STEP, "updates": STEP, "loss_scale": {}}
    CheckpointStore(run, keep=1).save(tensors, state)
