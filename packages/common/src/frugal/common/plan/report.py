"""What is said of a recipe before it is trained, line by line, with how each number is known."""

from __future__ import annotations

import io
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from frugal.common.contracts import Objective
from frugal.common.data.config import StoredData
from frugal.common.errors import InputError
from frugal.common.models.flops import dual_encoder_flops
from frugal.common.models.named import clip_encoder
from frugal.common.models.vit import ImageTower
from frugal.common.plan.fake_step import (
    Moment,
    StepMemory,
    has_stored_vectors,
    step_memory,
    tokens_of,
)
from frugal.common.plan.partition import Memory, Zero, exchanged, host_memory, peak_memory
from frugal.common.recipe import Recipe

RESERVED = 1.5e9
"""Bytes of a GPU that CUDA, its libraries and NCCL take; assumed."""
FRAGMENTED = 0.05
"""Share of the memory that fragmentation leaves unused; assumed."""
_LEAST = 16
"""Samples of the smaller of two micro-batches between which memory is a straight line."""
_MOST = 2_048
"""Of the larger: of more samples a contrastive loss takes too many chunks to be quick."""
_DENSE_PIXELS = 224
_SHORT = 0.01
"""Seconds of a step below which a GPU waits for the host."""
_CHUNK = 64
"""Samples of the chunks from which it is known what further ones add."""


@cache
def facts() -> dict[str, Any]:
    """GPUs, published runs and published accuracies, with their sources."""
    return json.loads((files("frugal.common.plan") / "facts.json").read_text())


def usable_memory(gpu: str) -> float:
    """Bytes of a GPU that tensors may take."""
    return facts()["gpus"][gpu]["memory"] * (1 - FRAGMENTED) - RESERVED


def published_shares() -> dict[str, float]:
    """The share of the peak that published runs reached, by their names.

    Their FLOPs are counted by :mod:`frugal.common.models.flops`: forward and twice that backward.
    """
    shares = {}
    for run in facts()["runs"]:
        towers = clip_encoder(run["towers"])
        flops = sum(
            3 * dual_encoder_flops(towers, patches=patches, tokens=tokens) * samples
            for patches, tokens, samples in run["stages"]
        )
        shares[run["name"]] = flops / (run["gpu_hours"] * 3600 * run["peak"])
    return shares


@dataclass(frozen=True)
class Cost:
    """What of a run follows from its FLOPs."""

    flops: float
    """Of one sample, forward and backward."""
    dense_flops: float
    """Of the same sample whole: every patch of at least 224 pixels, every token."""
    samples: int
    repeated: float = 1.0
    """Times these FLOPs that are computed, where some are for a second time."""

    @property
    def computed(self) -> float:
        """FLOPs of a sample that take time.

        Recomputed activations do not count: published runs of large models, from whose time the
        share of the peak is known, recompute them too.
        """
        return self.flops * self.repeated

    @classmethod
    def of(cls, recipe: Recipe, objective: Objective, tokens: dict[str, float]) -> Cost:
        """That of a recipe, of an objective without numbers, at some tokens of a sample."""
        dense = dict(tokens)
        tower = recipe.model.image
        if isinstance(tower, ImageTower):
            patches = max(tower.num_patches, (_DENSE_PIXELS // tower.patch_size) ** 2)
            dense["image_tokens"] = float(patches + (tower.class_token != "none"))
        captions = recipe.model.inputs().captions
        if captions is not None:
            dense["text_tokens"] = float(captions.length)
        return cls(
            objective.step_flops(tokens), objective.step_flops(dense), recipe.schedule.samples
        )

    def gpu_hours(self, gpu: str, share: float) -> float:
        """Of the whole run at a share of the peak."""
        return self.computed * self.samples / (facts()["gpus"][gpu]["peak"] * share) / 3600


def cost_of(recipe: Recipe) -> Cost:
    """The cost of a recipe, without taking a step."""
    return Cost.of(recipe, recipe.objective.outline(recipe), tokens_of(recipe))


class Plan:
    """A recipe on some GPUs."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        gpus: int,
        gpu: str,
        text_tokens: int | None = None,
        share: float | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            recipe: to be trained.
            gpus: how many, with a process each.
            gpu: one of :func:`facts`.
            text_tokens: mean tokens of a caption, where captions are computed without padding.
            share: of the peak; by default the median of published runs.
        """
        self.recipe, self.gpus, self.gpu = recipe, gpus, gpu
        self.text_tokens = text_tokens
        found = sorted(published_shares().values())
        self.shares = (share, share, share) if share else (
            found[0], statistics.median(found), found[-1]
        )  # fmt: skip
        self._taken: dict[tuple[int, bool], StepMemory] = {}

    @property
    def local_batch(self) -> int:
        """Samples of a micro-batch of a process."""
        return self.recipe.local_batch(self.gpus)

    @cached_property
    def step(self) -> StepMemory:
        """That of the recipe itself."""
        chunk = self.recipe.engine.cache_chunk
        return self._take(self.local_batch, self.recipe) if chunk is None else self.cached(chunk)

    def cached(self, chunk: int) -> StepMemory:
        """A step of the micro-batch in chunks, of which one is taken; the rest is a straight line.

        From the second chunk on every gradient is there, and so are the inputs and the features of
        all.
        """
        chunk, samples = min(chunk, self.local_batch), self.local_batch
        one = self._take(chunk, self._with(cache_chunk=chunk))
        further = samples - chunk
        if not further:
            return one
        grown = self._growth

        def later(moment: Moment) -> Moment:
            loss = further * grown.loss * (moment.loss > 0)
            features = further * grown.activations
            return Moment(one.num_trained, moment.activations + features + loss, moment.loss + loss)

        whole = samples / chunk
        return replace(
            one,
            moments=tuple(map(later, one.moments)),
            batch=round(one.batch * whole),
            exchanged=round(one.exchanged * whole),
        )

    @cached_property
    def _growth(self) -> Moment:
        """Bytes of features, and of the loss, that each sample of a further chunk adds."""
        chunk = min(_CHUNK, max(self.local_batch // 4, 1))
        engine = self._with(cache_chunk=chunk, checkpoint_activations=False)
        few, many = (self._take(chunks * chunk, engine).moments for chunks in (2, 3))

        def grown(of: Callable[[Moment], int]) -> int:
            return -(-(max(map(of, many)) - max(map(of, few))) // chunk)

        features = grown(lambda moment: moment.activations * (not moment.loss))
        return Moment(0, max(features, 0), max(grown(lambda moment: moment.loss), 0))

    def _with(self, **options: Any) -> Recipe:
        """The recipe with another engine."""
        return replace(self.recipe, engine=replace(self.recipe.engine, **options))

    @cached_property
    def repeated(self) -> float:
        """What is computed, over what is where no part of it is computed twice for the cache."""
        if self.recipe.engine.cache_chunk is None:
            return 1.0
        samples = 2 * max(min(_LEAST, self.local_batch) // 2, 1)
        chunk = samples // 2
        plain, cached = (FlopCounterMode(display=False) for _ in range(2))
        self._take(samples, self._with(cache_chunk=None), beside=plain)
        self._take(samples, self._with(cache_chunk=chunk), beside=cached)
        return cached.get_total_flops() / plain.get_total_flops()

    def _take(self, samples: int, recipe: Recipe, **options: Any) -> StepMemory:
        precision = self.recipe.engine.precision
        return step_memory(
            recipe,
            samples=samples,
            world_size=self.gpus,
            dtype=torch.bfloat16 if precision == "auto" else getattr(torch, precision),
            text_tokens=self.text_tokens,
            **options,
        )

    def taken(self, samples: int, *, recompute: bool) -> StepMemory:
        """A step of one plain micro-batch."""
        key = samples, recompute
        if key not in self._taken:
            plain = self._with(checkpoint_activations=recompute, cache_chunk=None)
            self._taken[key] = self._take(samples, plain)
        return self._taken[key]

    def memory(
        self, step: StepMemory, zero: Zero | None, *, accumulate: int | None = None
    ) -> Memory:
        """The fullest moment of one process."""
        engine = self.recipe.engine
        return peak_memory(
            step,
            zero,
            world_size=self.gpus,
            moments=self.moments,
            accumulate=accumulate or engine.accumulate,
            averages=engine.ema_decay is not None,
        )

    def largest(self, zero: Zero | None, *, recompute: bool) -> int:
        """Samples of the largest micro-batch that fits; 0 if none does."""
        return largest_batch(
            partial_taken(self, recompute=recompute),
            lambda step: self.memory(step, zero).total <= usable_memory(self.gpu),
            multiple=2 if self.recipe.objective.compares_samples is False else 1,
        )

    def largest_chunk(self, zero: Zero | None, *, below: int) -> int:
        """Samples of a chunk that fits, with which the step is taken again; 0 if none does."""
        room, chunk = usable_memory(self.gpu), below
        before: tuple[int, int] | None = None
        while chunk > 0:
            memory = self.memory(self.cached(chunk), zero)
            if memory.total <= room:
                return chunk
            each = memory.activations / chunk
            if before is not None:  # features of all samples do not go with the chunk
                each = (before[1] - memory.total) / (before[0] - chunk)
            before = chunk, memory.total
            chunk -= max(math.ceil((memory.total - room) / max(each, 1.0)), 1)
        return 0

    @cached_property
    def outline(self) -> Objective:
        """The objective without numbers."""
        return self.recipe.objective.outline(self.recipe)

    @cached_property
    def moments(self) -> float:
        """Numbers that the optimizer keeps for each that is trained."""
        kinds = self.recipe.optimizer.moments_of(self.outline)
        sizes = {name: self.outline.get_parameter(name).numel() for name in kinds}
        return sum(sizes[name] * len(kinds[name]) for name in kinds) / sum(sizes.values())

    @cached_property
    def cost(self) -> Cost:
        """From the tokens that the step saw."""
        return replace(Cost.of(self.recipe, self.outline, self.step.tokens), repeated=self.repeated)

    def samples_per_second(self, share: float) -> float:
        """Of all GPUs."""
        return self.gpus * facts()["gpus"][self.gpu]["peak"] * share / self.cost.computed


def partial_taken(plan: Plan, *, recompute: bool) -> Callable[[int], StepMemory]:
    """Takes steps of a plan by their samples."""
    return lambda samples: plan.taken(samples, recompute=recompute)


def largest_batch(
    take: Callable[[int], StepMemory], fits: Callable[[StepMemory], bool], *, multiple: int = 1
) -> int:
    """The largest micro-batch that fits; 0 if none does.

    Steps are taken at two sizes, the second of which is near the result; between and beyond them
    every moment of a step is a straight line.

    Args:
        take: a step of so many samples.
        fits: whether there is room for it.
        multiple: the result divides by.
    """
    few = take(_LEAST)
    second = 2 * _LEAST
    for _ in range(2):
        many = take(second)
        line = _Line(_LEAST, few, second, many)
        found = _last_true(lambda samples: fits(line.at(samples)), multiple)  # noqa: B023
        following = min(found + found % 2, _MOST)
        if found <= 2 * _LEAST or abs(following - second) <= 0.1 * second:
            break
        second = following
    return found


@dataclass(frozen=True)
class _Line:
    """Steps of any number of samples, between and beyond two."""

    first: int
    few: StepMemory
    second: int
    many: StepMemory

    def at(self, samples: int) -> StepMemory:
        """A step of so many."""
        share = (samples - self.first) / (self.second - self.first)

        def between(low: int, high: int) -> int:
            return max(round(low + share * (high - low)), 0)

        moments = tuple(
            Moment(a.gradients, between(a.activations, b.activations), between(a.loss, b.loss))
            for a, b in zip(self.few.moments, self.many.moments, strict=True)
        )
        return replace(self.few, moments=moments, batch=between(self.few.batch, self.many.batch))


def _last_true(holds: Callable[[int], bool], multiple: int) -> int:
    """The last multiple for which something holds that holds up to it; 0 if for none."""
    low, high = 0, 1
    while holds(high * multiple) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * multiple) else (low, middle)
    return low * multiple


@dataclass(frozen=True)
class Line:
    """One line of a plan."""

    name: str
    text: str
    known: str
    """exact, counted, measured, published, extrapolated or assumed; and how."""


def lines(
    plan: Plan, zero: Zero | None, *, engine: str, about: str, price: float | None
) -> Iterator[Line]:
    """Every line of a plan but the table of memory."""
    recipe, step, cost = plan.recipe, plan.step, plan.cost
    frozen = f", {_scaled(step.frozen)} frozen" if step.frozen else ""
    yield Line("parameters", f"{_scaled(step.num_trained)} trained{frozen}", "exact")
    tokens = ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in step.tokens.items())
    is_uneven = recipe.reduction.image.is_uneven
    known = "expected" if is_uneven else "exact"
    known += "; of captions at most" * ("text_tokens" in step.tokens and plan.text_tokens is None)
    yield Line("tokens of a sample", tokens, known)
    yield Line(
        "FLOPs of a sample",
        f"{_scaled(cost.flops)}FLOP forward and backward, {cost.flops / cost.dense_flops:.2f} "
        f"of whole images of {_DENSE_PIXELS} pixels or more and whole captions",
        "exact, matrix products",
    )
    if cost.repeated > 1:
        yield Line(
            "computed twice",
            f"{cost.repeated:.2f} times these FLOPs are computed, as engine.cache_chunk encodes "
            "every sample once more",
            "counted in steps on fake tensors",
        )
    if recipe.engine.checkpoint_activations:
        yield Line(
            "recomputed",
            "activations are computed once more, about a third on top, which speed and time leave "
            "out",
            "as in published runs of large models",
        )
    yield from _memory_lines(plan, zero, engine)
    gathered = recipe.optimizer.gathered(plan.outline)
    sent = exchanged(step, zero, world_size=plan.gpus, gathered=gathered)
    parts = ", ".join(f"{size / 1e9:.2f} GB of {name}" for name, size in sent.items() if size)
    yield Line("communication", f"{parts or 'none'}, sent by each GPU in a step", "counted")
    low, middle, high = plan.shares
    given = low == high
    known = "extrapolated from the share that was given" if given else (
        f"extrapolated from published runs at {low:.0%} to {high:.0%} of the peak"
    )  # fmt: skip
    if recipe.engine.precision == "float32":
        known += "; the peak is that of bfloat16, which float32 products do not reach"
    if not any(step.tokens.values()):
        known += "; to read what is stored takes longer"
    hours = [cost.gpu_hours(plan.gpu, share) for share in (high, middle, low)]
    seconds = plan.local_batch / plan.samples_per_second(middle) * plan.gpus
    if seconds < _SHORT:
        known += "; a step this short waits for its kernels to be launched and will be slower"
    yield Line(
        "speed",
        f"{plan.samples_per_second(middle):,.0f} samples/s at {middle:.0%} of the peak",
        known,
    )
    least, usual, most = (_duration(each / plan.gpus) for each in hours)
    spread = "" if given else f" ({least} to {most})"
    yield Line(
        "time",
        f"{usual}{spread}, {hours[1]:,.{0 if hours[1] >= 10 else 2}f} GPU-hours, for "
        f"{cost.samples:,} samples in {recipe.steps:,} steps",
        known,
    )
    money = "give --price, of a GPU and hour" if price is None else f"{price * hours[1]:,.0f}"
    yield Line("cost", money, "unknown" if price is None else known)
    if (rate := decoding_rate(recipe)) is not None:
        needed = plan.samples_per_second(middle) / plan.gpus / rate
        yield Line(
            "loading",
            f"{math.ceil(needed)} loader processes for each GPU, of {rate:.0f} images/s each",
            "measured here, on a drawn picture of 640 x 480 pixels",
        )
    yield from _accuracy_lines(recipe, about)


def _scaled(value: float) -> str:
    """Three digits and a unit: 139.8 M, 12.3 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} "


def _duration(hours: float) -> str:
    """In hours, or in minutes or seconds where it is less than one of them."""
    for unit, in_hours in (("hours", 1.0), ("minutes", 1 / 60)):
        if hours >= in_hours:
            return f"{hours / in_hours:,.1f} {unit}"
    return f"{hours * 3600:,.1f} seconds"


def _memory_lines(plan: Plan, zero: Zero | None, engine: str) -> Iterator[Line]:
    memory, room = plan.memory(plan.step, zero), usable_memory(plan.gpu)
    recipe = plan.recipe
    chunk = recipe.engine.cache_chunk
    what = f"{plan.local_batch:,} samples" + (f" in chunks of {chunk:,}" if chunk else "")
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / 1e9:.2f}"
        for name, value in vars(memory).items()
        if value
    )
    yield Line(
        "memory of a GPU",
        f"{memory.total / 1e9:.1f} of {room / 1e9:.1f} GB with {engine}, {what}: {parts}",
        "a step on fake tensors; room for CUDA and fragmentation is assumed"
        + ("; what further chunks add is extrapolated" if chunk else ""),
    )
    host = host_memory(plan.step, zero, world_size=plan.gpus, moments=plan.moments)
    if host:
        yield Line("memory of the host", f"{host / 1e9:.1f} GB for each GPU", "exact")
    if memory.total <= room:
        return
    largest = plan.largest(zero, recompute=recipe.engine.checkpoint_activations)
    caches = recipe.objective.caches_gradients and largest > 0
    if caches:
        most = largest if chunk is None else min(chunk - 1, largest)
        largest = plan.largest_chunk(zero, below=min(most, plan.local_batch))
    if largest == 0:
        advice = "not even one sample fits: recompute activations, or take another file or GPU"
    elif caches:
        advice = (
            f"it does not fit: give --engine.cache-chunk {largest} (the same loss; about a third "
            "more time)"
        )
    else:
        parts_needed = math.ceil(plan.local_batch / largest) * recipe.engine.accumulate
        advice = (
            f"it does not fit: micro-batches of {largest} do, as --engine.accumulate {parts_needed}"
        )
    yield Line("advice", advice, "extrapolated from two steps")


def memory_table(plan: Plan, files: dict[str, Zero | None]) -> Iterator[str]:
    """Memory by part for every DeepSpeed file, plain and recomputed, as rows of a table."""
    names = list(vars(Memory(weights=0)))
    yield (
        "| GB of a GPU | micro-batch | "
        + " | ".join(n.replace("_", " ") for n in names)
        + (" | all | largest micro-batch |")
    )
    yield "|---|" + "---|" * (len(names) + 3)
    for recompute in (False, True):
        for name, zero in files.items():
            largest = plan.largest(zero, recompute=recompute)
            samples = min(plan.local_batch, largest or 2)
            memory = plan.memory(plan.taken(samples, recompute=recompute), zero)
            cells = [f"{value / 1e9:.2f}" for value in vars(memory).values()]
            yield (
                f"| {name}{', recomputed' if recompute else ''} | {samples} | "
                f"{' | '.join(cells)} | {memory.total / 1e9:.1f} | {largest or 'none'} |"
            )


def decoding_rate(recipe: Recipe, *, seconds: float = 0.4) -> float | None:
    """Images that one core decodes, crops and resizes in a second; None where there are none."""
    if not isinstance(recipe.data, StoredData) or has_stored_vectors(recipe):
        return None
    draws = np.random.default_rng(0)
    coarse = Image.fromarray(draws.integers(256, size=(60, 80, 3), dtype=np.uint8))
    photo = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = draws.integers(-6, 7, size=photo.shape)
    file = io.BytesIO()
    Image.fromarray((photo + grain).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    size, count = recipe.model.inputs().height_width, 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        recipe.data.augmentation.decode(file.getvalue(), size=size, generator=draws)
        count += 1
    return count / spent


def _accuracy_lines(recipe: Recipe, about: str) -> Iterator[Line]:
    if "%" in about:
        yield Line("accuracy", about, "published")
    if recipe.model.text_tower() is None or (size := _towers(recipe)) is None:
        return
    ladder = facts()["ladder"]
    for row in ladder["rows"]:
        if row["towers"] == size:
            yield Line(
                "accuracy of plain CLIP",
                f"{row['top1']} % on ImageNet with {row['samples'] / 1e9:g} billion samples of "
                f"{row['data']}; this run has {recipe.schedule.samples / 1e9:.2g} billion",
                "published",
            )


def _towers(recipe: Recipe) -> str | None:
    """The name of an image tower of the ladder's sizes."""
    tower = recipe.model.image
    for size in {row["towers"] for row in facts()["ladder"]["rows"]}:
        like = clip_encoder(size).image
        if isinstance(tower, ImageTower) and (tower.width, tower.depth, tower.patch_size) == (
            like.width, like.depth, like.patch_size
        ):  # fmt: skip
            return size
    return None


def known_files(folder: Path) -> dict[str, Zero | None]:
    """Accelerate, and every DeepSpeed file of a folder by its name."""
    found: dict[str, Zero | None] = {"Accelerate": None}
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"there is no DeepSpeed file in {folder}; give another --deepspeed-files")
    return found | {path.stem: Zero.read(path) for path in paths}
