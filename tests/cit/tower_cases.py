"""Small towers of every kind, published files of them, and runs, for the tests of CiT's models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig

from frugal.cit.objective import LockedContrastive, LockedObjective
from frugal.cit.recipes import dual_encoder, published_optimizer
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.contracts import Batch
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.models.pretrained import TransformersText
from frugal.common.models.vit import ImageTower
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions
from frugal.common.recipe_json import to_json
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate
from frugal.common.run import Run

LOG = logging.getLogger("test")
ROWS = 90
PLAIN = ImageTower(width=24, depth=2, heads=3, mlp_width=48, patch_size=8, image_size=32)
MOCO = replace(PLAIN, projector_width=20, projector_outputs=12)
BERT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def stirred(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Moved away from its first value, so that a swap of two shows; a variance stays positive."""
    if not tensor.is_floating_point():
        return tensor + 3
    return tensor + 0.05 * torch.rand(tensor.shape, generator=generator)


def write_bert(folder: Path, **options: Any) -> Path:
    """A small BERT as transformers saves one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModel.from_config(BertConfig(**{**BERT, **options}))
        generator = torch.Generator().manual_seed(6)
        model.load_state_dict({n: stirred(t, generator) for n, t in model.state_dict().items()})
    model.save_pretrained(folder)
    return folder


def recipe_of(image: Any, text: Any, tokenizer: Path, **objective: Any) -> Recipe:
    """A recipe with these towers."""
    return Recipe(
        model=replace(dual_encoder(image, text), embed_dim=10),
        data=PairData(train=("pairs.tar",), tokenizer=HuggingFace(name=str(tokenizer))),
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        objective=LockedContrastive(**{"train_image": "all", **objective}),
        optimizer=published_optimizer(),
        schedule=WarmupCosine(samples=480),
        batch_size=24,
    )


def objective_of(recipe: Recipe) -> LockedObjective:
    """What the recipe trains."""
    return recipe.objective.build(recipe)


def write_run(folder: Path, recipe: Recipe) -> Path:
    """A run directory of a recipe, every weight and statistic moved away from its first value."""
    objective, generator = objective_of(recipe), torch.Generator().manual_seed(3)
    free = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    tensors = {}
    for name, tensor in objective.state_dict().items():
        kind = "weight" if name in free else "buffer"
        tensors[f"{kind}/{name}"] = stirred(tensor, generator)
        if kind == "weight":
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = torch.zeros_like(tensor)
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    recipe.data.save_tokenizer(folder / "tokenizer")
    run = Run(folder, 0, 1, 0, torch.device("cpu"), LOG)
    state = {"step": 20, "updates": 20, "loss_scale": {}}
    CheckpointStore(run, keep=1).save(tensors, state)
    return folder


def batch_of(samples: int = 6, *, invalid: int = 0, size: int = 32, seed: int = 0) -> Batch:
    """Noise with captions of several lengths; the last samples are damaged."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(samples) % 5 + 3
    token_ids = torch.randint(5, ROWS, (samples, 8), generator=generator)
    token_ids *= torch.arange(8) < lengths[:, None]
    images = torch.randint(256, (samples, 3, size, size), generator=generator, dtype=torch.uint8)
    valid = torch.arange(samples) < samples - invalid
    return Batch(
        images=images * valid[:, None, None, None],
        sample_numbers=torch.arange(samples),
        valid=valid,
        token_ids=token_ids * valid[:, None],
        text_lengths=lengths * valid,
    )


def text_of(folder: Path, **options: Any) -> TransformersText:
    """A BERT in a folder as a text tower of 16 tokens."""
    return TransformersText(name=str(folder), **{"length": 16, **options})


def moco_file(path: Path, state: dict[str, Tensor]) -> Path:
    """A file as MoCo v3's training leaves it, around the state of a base encoder."""
    named = {f"module.base_encoder.{name}": tensor for name, tensor in state.items()}
    named |= {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in state.items()}
    named["module.predictor.0.weight"] = torch.zeros(3, 3)
    content = {"epoch": 300, "arch": "vit_base", "state_dict": named}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, path)
    return path
