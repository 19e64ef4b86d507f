"""A small contrastive objective, a batch and a plain engine, for tests of objectives."""

import contextlib
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import Batch
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive import Contrastive, ContrastiveObjective
from frugal.common.randomness import NoiseSource
from frugal.common.recipe import EngineOptions, RunOptions
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking

MODEL = DualEncoderConfig(
    image=ImageTower(
        width=16, depth=2, heads=2, mlp_width=32, patch_size=4, image_size=(8, 16), pooling="mean"
    ),
    text=TextTower(width=16, depth=1, heads=2, mlp_width=32, vocabulary=50, length=6),
    embed_dim=8,
)
SIGMOID = replace(MODEL, initial_logit_scale=math.log(10), initial_logit_bias=-10.0)


@dataclass(frozen=True)
class Uneven(ImageReduction):
    """Image i keeps its first 1 + i patches."""

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches:
        places = torch.arange(view.num_patches)
        return KeptPatches.where(places <= torch.arange(len(view.images))[:, None])


def recipe(config: Contrastive, **parts: Any) -> Any:
    values = {
        "model": MODEL,
        "objective": config,
        "data": SimpleNamespace(caption_tokenizer=object(), color_change=None),
        "reduction": SimpleNamespace(image=RandomMasking(mask_ratio=0.5)),
        "engine": EngineOptions(),
        "run": RunOptions(seed=3),
        "schedule": SimpleNamespace(samples=480),
    }
    return SimpleNamespace(**(values | parts))


def objective(config: Contrastive | None = None, **parts: Any) -> ContrastiveObjective:
    config = config or Contrastive()
    return config.build(recipe(config, **parts))


def batch_of(count: int = 7, *, first: int = 20) -> Batch:
    generator = torch.Generator().manual_seed(first)
    valid = torch.ones(count).bool()
    valid[2:3] = False
    return Batch(
        images=torch.randint(256, (count, 3, 8, 16), generator=generator, dtype=torch.uint8),
        sample_numbers=torch.arange(first, first + count),
        valid=valid,
        token_ids=torch.randint(1, 50, (count, 5), generator=generator),
        text_lengths=torch.randint(1, 6, (count,), generator=generator),
        groups=torch.arange(count) // 3,
        keys=[str(number) for number in range(count)],
    )


class Engine:
    """Plain autograd as an engine, which writes down how it is used."""

    def __init__(self, objective: ContrastiveObjective) -> None:
        self.objective = objective
        self.marks: list[bool] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.objective(*args, **kwargs)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        self.marks.append(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
