"""Whole training steps against open_clip's, in turns in one process: time, and share of the peak.

    python benchmarks/train_step.py --precision float32,bfloat16

Every row builds a step of ours and one of open_clip's model, loss and fused AdamW on the same
pixels and captions, and takes one of each by turns, so that whatever else a machine does meets
both. A ratio is the median of those of the pairs. FLOPs are counted as readers of the papers would,
of what each side computes: forward and backward passes of patches and tokens, and nothing else; the
peak is the best product of two large matrices in the same process.

dense-full is identical work: every patch and 77 tokens of every caption; both begin with the same
weights, and their losses are compared. dense-real has captions of real length, which we pack and
open_clip pads to 77 tokens. flip-R masks R of the patches, as open_clip's patch dropout does.
clipa-iN-tM is CLIPA's first stage, at as small an image and as short a text on both sides:
identical work again. cluster drops half of the patches in clusters, against open_clip's random
half. cit has a locked image tower on both sides. milan has no peer.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import cloudy_pictures, place, write

from frugal.cit.objective import LockedContrastive
from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.contracts import Batch, Objective
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.throughput import matmul_peak
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.flops import dual_encoder_flops, image_flops
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.named import clip_encoder
from frugal.common.models.vit import ImageTransformer
from frugal.common.models.weight_names import from_open_clip
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import EngineOptions, Recipe, Reductions, model_of
from frugal.common.reduction.image import ImageReduction, KeepAll, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate
from frugal.common.run import Run, make_logger
from frugal.flip.recipes import large
from frugal.milan.model import MaskedModel
from frugal.milan.objective import Reconstruction
from frugal.milan.recipes import vit_b16
from frugal.milan.targets import FeatureTarget
from frugal.milan.teacher import FrozenTeacher

LENGTHS = (3, 9, 11, 12, 13, 14, 15, 16, 17, 19, 38)
"""Tokens, start and end included, of which a tenth of Flickr8k's captions has fewer each."""
_SEARCHED = 256
"""Pictures that the threshold of clusters is searched on."""
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a step sees."""

    image_size: int = 224
    text_length: int = 77
    is_real: bool = False
    """Captions of real length, not full ones."""
    mask_ratio: float = 0.0
    clusters: bool = False
    locked: bool = False
    """The image tower is not trained."""
    milan: bool = False

    @property
    def is_identical(self) -> bool:
        """Both sides compute the same numbers."""
        return not (self.is_real or self.mask_ratio or self.locked or self.milan)


ROWS = {
    "dense-full": Row(),
    "dense-real": Row(is_real=True),
    "flip-0.5": Row(is_real=True, mask_ratio=0.5),
    "flip-0.75": Row(is_real=True, mask_ratio=0.75),
    "clipa-i50-t16": Row(image_size=112, text_length=16),
    "clipa-i37-t8": Row(image_size=96, text_length=8),
    "cluster": Row(is_real=True, mask_ratio=0.5, clusters=True),
    "cit": Row(is_real=True, locked=True),
    "milan": Row(milan=True),
}


@dataclass(frozen=True)
class Step:
    """One side of a row."""

    take: Callable[[], float]
    """Returns the loss."""
    flops: Callable[[], float]
    """Of one sample; to be asked after a step."""


def main() -> None:
    """Measure the rows, print a table, keep the numbers."""
    options = read_options()
    make_logger(1)
    rows: list[dict[str, Any]] = []
    for precision in options.precision.split(","):
        peak = matmul_peak(torch.device(options.device), getattr(torch, precision))
        print(
            f"{options.model}, {options.depth or 'all'} layers, batch {options.batch}, "
            f"{precision}, {'compiled' if options.compile else 'eager'}, {place(options.device)}; "
            f"peak {peak / 1e9:,.0f} GFLOP/s"
        )
        print(f"{'':15}{'samples/s':>11}{'of peak':>9}{'open_clip':>11}{'of peak':>9}{'ratio':>8}")
        for name in options.rows.split(","):
            row = measure(options, ROWS[name], precision)
            for side in ("ours", "open_clip"):
                if side in row:
                    speed = row[side]["samples_per_second"]
                    row[side]["share_of_peak"] = speed * row[side]["flops"] / peak
            rows.append({"row": name, "precision": precision, "peak": peak, **row})
            print(shown(name, row), flush=True)
    about = {key: vars(options)[key] for key in ("model", "depth", "batch", "steps", "compile")}
    write(
        options.out,
        {**about, "device": place(options.device), "torch": torch.__version__, "rows": rows},
    )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--model", default="vit-s16", choices=("vit-s16", "vit-b16", "vit-l16"))
    parser.add_argument("--depth", type=int, help="layers of each tower; by default all")
    parser.add_argument("--batch", type=int, default=16, help="pairs of one step")
    parser.add_argument("--steps", type=int, default=6, help="pairs of steps that are timed")
    parser.add_argument("--precision", default="float32", help="float32, bfloat16 or both")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_step.json"))
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    if unknown := set(options.precision.split(",")) - set(PRECISIONS):
        parser.error(f"there is no precision {', '.join(sorted(unknown))}")
    return options


def shown(name: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    ours, theirs = row["ours"], row.get("open_clip")
    line = f"{name:15}{ours['samples_per_second']:11.2f}{ours['share_of_peak']:9.0%}"
    if theirs is None:
        return line
    line += f"{theirs['samples_per_second']:11.2f}{theirs['share_of_peak']:9.0%}"
    low, high = row["ratios"]
    return f"{line}{row['ratio']:7.2f}x  ({low:.2f} to {high:.2f})"


def measure(options: argparse.Namespace, row: Row, precision: str) -> dict[str, Any]:
    """Samples/s of both sides, and the ratio of their seconds pair by pair."""
    torch.manual_seed(0)
    batch = random_batch(options, row)
    if row.milan:
        sides = {"ours": milan_step(options, batch, precision)}
    else:
        config = clip_config(options, row)
        model = open_clip_model(config, mask_ratio=row.mask_ratio)
        state = from_open_clip(model.state_dict(), config)
        sides = {
            "ours": our_step(options, row, precision, batch, config, state),
            "open_clip": open_clip_step(options, row, precision, batch, config, model),
        }
    losses = {name: [side.take() for _ in range(2)] for name, side in sides.items()}
    if row.is_identical and precision == "float32":
        torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-4, atol=0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.steps):
        for name, side in sides.items():
            start = time.perf_counter()
            assert side.take() > 0  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {
        name: {
            "samples_per_second": options.batch / statistics.median(seconds[name]),
            "flops": side.flops(),
            "seconds": seconds[name],
        }
        for name, side in sides.items()
    }
    if "open_clip" in found:
        pairs = zip(seconds["open_clip"], seconds["ours"], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        found |= {"ratio": statistics.median(ratios), "ratios": (ratios[0], ratios[-1])}
    del sides
    gc.collect()
    return found


def clip_config(options: argparse.Namespace, row: Row) -> DualEncoderConfig:
    """The towers of open_clip's model of that name."""
    name = {"vit-s16": "S/16", "vit-b16": "B/16", "vit-l16": "L/16"}[options.model]
    config = clip_encoder(name, image_size=row.image_size, text_length=row.text_length)
    config = replace(config, text=replace(config.text, packed=row.is_real))
    if options.depth is None:
        return config
    return replace(
        config,
        image=replace(config.image, depth=options.depth),
        text=replace(config.text, depth=options.depth),
    )


def random_batch(options: argparse.Namespace, row: Row) -> Batch:
    """Cloudy pictures and captions of random tokens, full ones or as long as real ones."""
    count, length = options.batch, row.text_length
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((count,), length)
    if row.is_real:
        place = torch.rand(count, generator=generator) * (len(LENGTHS) - 1)
        low, table = place.long(), torch.tensor(LENGTHS, dtype=torch.float)
        lengths = (table[low] + (place - low) * (table[low + 1] - table[low])).round().long()
    token_ids = torch.randint(1, 49406, (count, length), generator=generator)
    # open_clip pools where the largest number stands
    token_ids[torch.arange(count), lengths - 1] = 49407
    token_ids *= torch.arange(length) < lengths[:, None]
    batch = Batch(
        images=cloudy_pictures(count, row.image_size, generator),
        token_ids=token_ids,
        text_lengths=lengths,
        sample_numbers=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
    )
    return batch.to(options.device)


def our_step(
    options: argparse.Namespace,
    row: Row,
    precision: str,
    batch: Batch,
    config: DualEncoderConfig,
    state: dict[str, torch.Tensor],
) -> Step:
    """A step of our engine, as in training."""
    recipe = replace(
        our_recipe(options, precision),
        model=config,
        reduction=Reductions(image=our_reduction(row, batch, config), text=Truncate()),
        objective=LockedContrastive(train_image="none") if row.locked else Contrastive(),
    )
    objective = recipe.objective.build(recipe)
    objective.model.load_state_dict(state)
    return engine_step(objective, recipe, batch)


def our_recipe(options: argparse.Namespace, precision: str) -> Recipe:
    """What all rows have in common."""
    words: dict[str, Any] = {"precision": precision, "compile": options.compile}
    engine = EngineOptions(device=options.device, **words)
    return replace(large(), batch_size=options.batch, engine=engine)


def our_reduction(row: Row, batch: Batch, config: DualEncoderConfig) -> ImageReduction:
    """Which patches stay."""
    if not row.clusters:
        return RandomMasking(mask_ratio=row.mask_ratio) if row.mask_ratio else KeepAll()
    generator = torch.Generator().manual_seed(1)
    pictures = cloudy_pictures(_SEARCHED, config.image.height_width[0], generator)
    view = PatchView.of(pictures.to(batch.images.device), config.image)
    noise = SampleNoise(0, torch.arange(_SEARCHED, device=batch.images.device))
    return ClusterMasking(target_mask_ratio=row.mask_ratio).calibrate(
        [(view, noise)], gather=lambda value: [value], log=logging.getLogger(__name__)
    )


def engine_step(objective: Objective, recipe: Recipe, batch: Batch) -> Step:
    """Forward and backward pass, clipping and AdamW."""
    device = torch.device(recipe.engine.device)
    engine = AccelerateEngine(
        objective, recipe, Run(Path("runs/benchmarks"), 0, 1, 0, device, make_logger(1))
    )
    means: dict[str, float] = {}

    def take() -> float:
        loss, metrics = engine.forward(batch)
        engine.backward(loss)
        engine.step(1e-4)
        means.update({name: float(value) for name, value in metrics.items()})
        return loss.item()

    return Step(take, lambda: objective.step_flops(means))


def open_clip_model(config: DualEncoderConfig, *, mask_ratio: float) -> torch.nn.Module:
    """open_clip's model of the same sizes."""
    from open_clip.model import CLIP

    image, text = config.image, config.text
    vision = {
        "image_size": image.image_size, "patch_size": image.patch_size, "width": image.width,
        "head_width": image.width // image.heads, "layers": image.depth,
        "patch_dropout": mask_ratio,
    }  # fmt: skip
    words = {
        "context_length": text.length, "vocab_size": text.vocabulary, "width": text.width,
        "heads": text.heads, "layers": text.depth,
    }  # fmt: skip
    return CLIP(config.embed_dim, vision, words)


def open_clip_step(
    options: argparse.Namespace,
    row: Row,
    precision: str,
    batch: Batch,
    config: DualEncoderConfig,
    model: torch.nn.Module,
) -> Step:
    """A step of open_clip's trainer, normalization of the pixels included."""
    from open_clip.loss import ClipLoss

    model = model.to(options.device).train()
    if row.locked:
        lock: Any = model.lock_image_tower
        lock()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    compute = torch.compile(model) if options.compile else model
    loss_of, dtype = ClipLoss(), getattr(torch, precision)
    mean, std = (
        torch.tensor(values, device=options.device).mul(255).view(3, 1, 1)
        for values in (config.image.mean, config.image.std)
    )

    def take() -> float:
        optimizer.zero_grad()
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            features = compute((batch.images - mean) / std, batch.token_ids)
            loss = loss_of(*features[:3])
        loss.backward()
        optimizer.step()
        return loss.item()

    patches = round(config.image.num_patches * (1 - row.mask_ratio))
    flops = 3 * dual_encoder_flops(config, patches=patches, tokens=config.text.length)
    if row.locked:
        flops -= 2 * image_flops(config.image, patches)
    return Step(take, lambda: flops)


def milan_step(options: argparse.Namespace, batch: Batch, precision: str) -> Step:
    """Student and teacher of ``vit-b16``, at the size that is measured."""
    ours = our_recipe(options, precision)
    recipe = replace(vit_b16(), batch_size=ours.batch_size, engine=ours.engine)
    config = clip_config(options, Row())
    masked = model_of(MaskedModel, vit_b16().model)
    shape = {key: getattr(config.image, key) for key in ("width", "depth", "heads", "mlp_width")}
    masked = replace(masked, image=replace(masked.image, **shape))
    state = ImageTransformer(config.image, config.embed_dim).state_dict()
    tower = ImageEncoder(config.image, state, "drawn")
    teacher = FrozenTeacher(tower, pixels_mean=config.image.mean, pixels_std=config.image.std)
    teacher.tower.to(options.device)
    objective = Reconstruction(
        masked.build(outputs=config.embed_dim),
        FeatureTarget(teacher),
        reduction=recipe.reduction.image,
        seed=0,
    )
    return engine_step(objective, replace(recipe, model=masked), batch)


if __name__ == "__main__":
    main()
