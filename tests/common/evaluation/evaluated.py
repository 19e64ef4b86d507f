"""A small model as evaluations and clip_benchmark take one."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from frugal.common.data.tokenizers import ClipBpe
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.models.named import clip_encoder
from frugal.common.recipe import EngineOptions
from frugal.common.reduction.random_masking import RandomMasking

SMALL = {"width": 24, "depth": 1, "heads": 2, "mlp_width": 32}
LENGTH = 24


def recipe(
    size: int | tuple[int, int] = 32, *, length: int = LENGTH, evaluation=()
) -> SimpleNamespace:
    """What evaluations read of a recipe."""
    model = clip_encoder("S/8", image_size=size, text_length=length)
    model = replace(
        model,
        image=replace(model.image, **SMALL),
        text=replace(model.text, **SMALL),
        embed_dim=12,
    )
    return SimpleNamespace(
        model=model,
        data=SimpleNamespace(caption_tokenizer=ClipBpe()),
        engine=EngineOptions(),
        evaluation=evaluation,
        run=SimpleNamespace(seed=0, dir=None),
        reduction=SimpleNamespace(image=RandomMasking(mask_ratio=0.5), text=None),
    )


def telling(plan: SimpleNamespace) -> nn.Module:
    """A fresh model that sees differences between images."""
    model = plan.model.build().eval()
    with torch.no_grad():
        for weight in model.image.parameters():
            weight.mul_(4)
    return model


class OpenClipLike(nn.Module):
    """The model as clip_benchmark wants one: captions are rows of tokens alone."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        return self.model.encode_text(token_ids, (token_ids != 0).sum(1))


def tokenizer(length: int = LENGTH) -> Callable[[list[str]], Tensor]:
    """From captions to rows of tokens."""
    loaded = ClipBpe().load()

    def tokenize(texts: list[str]) -> Tensor:
        rows = [loaded.assemble(loaded.encode(text), length) for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    return tokenize


def number(value) -> float:
    """A number out of an array of one element, as ``float`` did before NumPy 2.4.

    clip_benchmark 1.6.2 counts right answers with that.
    """
    return value.item() if hasattr(value, "item") else float(value)


def multi_label_tars(folder: Path, targets: np.ndarray) -> Path:
    """clip_benchmark's layout, three images to a shard."""
    generator = np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    for shard, start in enumerate(range(0, len(targets), 3)):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for place in range(start, min(start + 3, len(targets))):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                image, target = io.BytesIO(), io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                np.save(target, targets[place])
                for ending, content in (("png", image), ("npy", target)):
                    entry = tarfile.TarInfo(f"s{place:04d}.{ending}")
                    entry.size = content.tell()
                    content.seek(0)
                    tar.addfile(entry, content)
    (folder / "test" / "nshards.txt").write_text(str(-(-len(targets) // 3)))
    (folder / "dataset_type.txt").write_text("multilabel\n")
    (folder / "classnames.txt").write_text("dog\ncat\nkite\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\n")
    return folder


def made(num_images: int = 40) -> SampleResults:
    """Every kind of number, some of them of several rows per image."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (num_images,), generator=generator)
    image = torch.randint(num_images, (3 * num_images,), generator=generator)
    tables = {
        "right": (torch.rand(num_images, generator=generator) < 0.6).to(torch.uint8),
        "labels": labels,
        "two": (labels < 1).to(torch.uint8),
        "margin": torch.randn(num_images, generator=generator).round(decimals=1),
        "found": (torch.rand(3 * num_images, generator=generator) < 0.4).to(torch.uint8),
        "image": image,
        "both": torch.randint(2, (num_images, 2), generator=generator).to(torch.uint8),
    }
    measures = {
        "mean": Measure("mean", "right"),
        "groups": Measure("mean_of_groups", "right", groups="labels"),
        "auc": Measure("roc_auc", "margin", groups="two"),
        "rows": Measure("mean", "found", image="image"),
        "halves": Measure("mean_of_means", "both"),
    }
    return SampleResults({"data_sha256": "x"}, num_images, tables, measures)
