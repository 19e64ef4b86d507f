"""Writes the data set: training shards, and the sets that evaluations read.

Under the output folder::

    train/00000.tar ...         img2dataset's layout: jpg, txt and json of every sample
    zero_shot/                  clip_benchmark's layout: one thing per picture and its class;
                                test/ holds all classes, train/ (for probes) none held out
    retrieval/                  clip_benchmark's layout: no caption fits two pictures
    compositional/              SugarCrepe's layout: <kind>.json and images/
    segmentation/               ADE20K's layout, if wanted: images/ and annotations/, in both
                                training/ and validation/; the background is the first class
    scenes.json                 the settings and the vocabulary; written last

Every file is a function of the settings alone, so that an interrupted drawing is finished by
drawing over it, and processes share the work file by file.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_bytes
from frugal.common.randomness import sample_generator
from frugal.common.scenes.captions import TEMPLATES
from frugal.common.scenes.compositional import KINDS, sample_contrast
from frugal.common.scenes.drawing import draw
from frugal.common.scenes.samples import (
    encode,
    retrieval_numbers,
    sample_files,
    segmentation_files,
)
from frugal.common.scenes.settings import ADDED, Settings
from frugal.common.scenes.world import COLORS, SHAPES, TEXTURES, class_names, held_out

_INFO = "scenes.json"
_UNFINISHED = "scenes.json.unfinished"


@dataclass(frozen=True)
class _Part:
    """One file's worth of work."""

    split: str
    path: str
    """Of the shard or the folder, under the output folder."""
    shard: int
    numbers: Sequence[int]
    """Which samples of the split it holds."""


def _write_shard(settings: Settings, part: _Part) -> int:
    """Writes one tar; returns its number of pictures."""
    path = settings.out / part.path
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position, number in enumerate(part.numbers):
            key = f"{part.shard:05d}{position:04d}"
            for extension, content in sample_files(settings, part.split, number, key).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return len(part.numbers)


def _write_contrasts(settings: Settings, part: _Part) -> int:
    """Writes one kind of compositional items with their images; returns their number."""
    kind = part.split.removeprefix("compositional/")
    items = {}
    for number in part.numbers:
        generator = sample_generator(settings.seed, f"scenes/{part.split}", number)
        contrast = sample_contrast(kind, generator)
        filename = f"{kind}_{number:05d}.{settings.format}"
        pixels = draw(contrast.scene, settings.image_size)
        image_path = settings.out / "compositional" / "images" / filename
        image_path.write_bytes(encode(pixels, settings.format))
        items[str(number)] = {
            "filename": filename,
            "caption": contrast.caption,
            "negative_caption": contrast.negative_caption,
            "changed": contrast.changed,
            "scene": contrast.scene.to_json(),
        }
    (settings.out / part.path).write_text(json.dumps(items, indent=1))
    return len(part.numbers)


def _write_masked(settings: Settings, part: _Part) -> int:
    """Writes pictures and their masks, each a file; returns the number of pictures."""
    folder, _, name = part.split.partition("/")
    suffixes = {"images": settings.format, "annotations": "png"}
    for number in part.numbers:
        for kind, content in segmentation_files(settings, part.split, number).items():
            file = settings.out / folder / kind / name / f"{number:08d}.{suffixes[kind]}"
            file.write_bytes(content)
    return len(part.numbers)


def _write_part(settings: Settings, part: _Part) -> int:
    """Writes one file, or one part of a folder; returns its number of pictures."""
    if part.split.startswith("compositional"):
        return _write_contrasts(settings, part)
    if part.split.startswith("segmentation"):
        return _write_masked(settings, part)
    return _write_shard(settings, part)


def _write_parts(settings: Settings, parts: Sequence[_Part], processes: int) -> int:
    """Writes all shards, shared out among processes; returns the number of pictures."""
    write_one = partial(_write_part, settings)
    if processes == 1:
        return sum(map(write_one, parts))
    context = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads' locks
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return sum(pool.map(write_one, parts))


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shards(settings: Settings, split: str, numbers: Sequence[int]) -> Iterator[_Part]:
    """Cuts a split into shards, named as its layout asks."""
    for shard, start in enumerate(range(0, len(numbers), settings.shard_size)):
        name = f"{shard:05d}.tar" if split == "train" else f"{shard}.tar"
        part = numbers[start : start + settings.shard_size]
        yield _Part(split, f"{split}/{name}", shard, part)


def _parts(settings: Settings) -> list[_Part]:
    """All files of samples that the settings ask for."""
    splits: dict[str, Sequence[int]] = {
        "train": range(settings.train_samples),
        "zero_shot/test": range(settings.zero_shot_samples),
        "zero_shot/train": range(settings.probe_samples),
        "retrieval/test": retrieval_numbers(settings),
    }
    parts = [
        part for split, numbers in splits.items() for part in _shards(settings, split, numbers)
    ]
    training = settings.segmentation_samples
    for name, count in (("training", training), ("validation", math.ceil(training / 4))):
        for start in range(0, count, settings.shard_size):
            numbers = range(start, min(start + settings.shard_size, count))
            parts.append(_Part(f"segmentation/{name}", "segmentation", 0, numbers))
    if settings.compositional_samples:
        numbers = range(settings.compositional_samples)
        for kind in KINDS:
            split = f"compositional/{kind}"
            parts.append(_Part(split, f"{split}.json", 0, numbers))
    return parts


def _write_layout(out: Path, parts: Sequence[_Part]) -> None:
    """Makes the folders, and the small text files that clip_benchmark reads."""
    for part in parts:
        (out / part.path).parent.mkdir(parents=True, exist_ok=True)
    splits = [part.split for part in parts]
    for split in ("zero_shot/test", "zero_shot/train", "retrieval/test"):
        if split in splits:
            (out / split / "nshards.txt").write_text(f"{splits.count(split)}\n")
    if (out / "zero_shot").exists():
        texts = {
            "classnames.txt": class_names(),
            "zeroshot_classification_templates.txt": TEMPLATES,
            "held_out.txt": held_out(),
            "dataset_type.txt": ["classification"],
        }
        for name, lines in texts.items():
            (out / "zero_shot" / name).write_text("".join(f"{line}\n" for line in lines))
    if (out / "retrieval").exists():
        (out / "retrieval" / "dataset_type.txt").write_text("retrieval\n")
    if (out / "compositional").exists():
        (out / "compositional" / "images").mkdir(exist_ok=True)
    for folder, _, name in (split.partition("/") for split in splits):
        if folder == "segmentation":
            for kind in ("images", "annotations"):
                (out / folder / kind / name).mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{line}\n" for line in ["background", *class_names()])
            (out / folder / "classnames.txt").write_text(lines)


def _information(settings: Settings) -> str:
    """The text of scenes.json."""
    about = {
        "settings": settings.identity(),
        "colors": list(COLORS),
        "shapes": list(SHAPES),
        "textures": list(TEXTURES),
        "class_names": class_names(),
        "held_out": held_out(),
        "mask_values": "0 is the background, 1 + class index a thing",
    }
    if settings.segmentation_samples:
        about["segmentation_values"] = "1 is the background, 2 + class index a thing"
    return json.dumps(about, indent=1) + "\n"


def _parts_left(settings: Settings) -> list[_Part] | None:
    """What is to be drawn; None where the same data set stands in the output folder, complete.

    Raises:
        InputError: if something else does.
    """
    out, parts = settings.out, _parts(settings)
    if not out.exists():
        return parts
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    found = next((name for name in (_INFO, _UNFINISHED) if (out / name).is_file()), None)
    if found is None:
        if any(out.iterdir()):
            raise InputError(
                f"--out {out} holds files that are not a drawn data set; give an empty folder"
            )
        return parts
    try:
        saved = dict(parse_json(read_bytes(out / found))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out / found} cannot be read; give another --out") from None
    asked = settings.identity()
    adds = ADDED in asked and ADDED not in saved
    saved.setdefault(ADDED, asked.get(ADDED))
    changed = [name for name in asked if saved.get(name) != asked[name]]
    if changed:
        name = changed[0]
        raise InputError(
            f"--out {out} was drawn with {name} = {saved.get(name)!r}, not {asked[name]!r}; give "
            "another folder or remove it"
        )
    if found == _UNFINISHED:
        return parts
    return [part for part in parts if part.split.startswith("segmentation")] if adds else None


def write(settings: Settings) -> str:
    """Draws the data set, unless it is there already.

    Returns:
        One sentence that says what was done.

    Raises:
        InputError: if a setting is out of range, or the output folder holds anything else or
            cannot be written.
    """
    settings.check()
    parts = _parts_left(settings)
    if parts is None:
        return f"{settings.out} already holds these scenes; nothing to do"
    started = time.perf_counter()
    processes = min(settings.processes or _cores(), max(len(parts), 1))
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / _UNFINISHED).write_text(_information(settings))
        _write_layout(settings.out, parts)
        pictures = _write_parts(settings, parts, processes)
        (settings.out / _UNFINISHED).replace(settings.out / _INFO)
    except OSError as error:
        raise InputError(f"--out {settings.out} cannot be written: {error.strerror}") from None
    seconds = time.perf_counter() - started
    return (
        f"drew {pictures:,} pictures to {settings.out} in {seconds:.1f} s "
        f"({pictures / seconds:,.0f}/s with {processes} processes)"
    )
