"""What tests of the report need: logs, a finished run, and pages taken apart."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.named import clip_encoder
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions
from frugal.common.recipe_json import to_json
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate
from frugal.common.report import write_report
from frugal.common.run import Run, make_logger

REPORT = "frugal.common.report"
NUMBERS = {
    "zero_shot_top1": 0.8125,
    "zero_shot_top1_held_out": 0.5,
    "zero_shot_classes": 6,
    "zero_shot_classes_held_out": 1,
    "image_retrieval_recall_at_1": 0.25,
    "text_retrieval_recall_at_1": 0.375,
    "retrieval_candidates": 500,
    "samples_seen": 90_112,
    "train_seconds": 211.3,
    "samples_per_second": 426.5,
    "world_size": 2,
    "engine": "deepspeed",
}
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements in order; refuses tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def log(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps(count: int, per_step: int = 64, **extra) -> list[dict]:
    return [
        {
            "step": step,
            "samples": step * per_step,
            "loss": 4 / step,
            "accuracy": 1 - 1 / step,
            "learning_rate": 1e-3 / step,
            "samples_per_second": 400.0,
            **extra,
        }
        for step in range(1, count + 1)
    ]


def picture(height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def written(folder: Path, **options) -> Page:
    given = {"numbers": NUMBERS, "stages": {}} | options
    return Page(write_report(folder, **given).read_text(encoding="utf-8"))


def small_recipe(scenes: Path) -> Recipe:
    model = clip_encoder("S/8", image_size=32, text_length=20)
    small = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
    return Recipe(
        model=replace(
            model,
            image=replace(model.image, **small),
            text=replace(model.text, **small),
            embed_dim=8,
        ),
        data=PairData(train=("nowhere",), tokenizer=ClipBpe()),
        reduction=Reductions(image=RandomMasking(mask_ratio=0.75), text=Truncate()),
        objective=Contrastive(),
        optimizer=AdamW(learning_rate=1e-3),
        schedule=WarmupCosine(samples=640),
        batch_size=64,
        evaluation=(ZeroShot(data=scenes), Retrieval(data=scenes), Compositional(data=scenes)),
    )


def finished_run(folder: Path, recipe: Recipe, *, seconds: float) -> Path:
    """A run directory as training leaves it, without the training."""
    log(folder, steps(10))
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    weights = recipe.objective.build(recipe).state_dict()
    state = {
        "step": 10, "samples": 640, "seconds": seconds, "world_size": 2, "engine": "deepspeed",
        "recipe": to_json(recipe),
    }  # fmt: skip
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    CheckpointStore(run, keep=1).save(tensors, state)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    return folder
