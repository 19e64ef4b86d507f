"""Look at shards, index them, and turn other stores into them.

``python -m frugal.common.shards index|check|convert``; exit code 0 if all is well, 1 if something
is damaged, 2 if the command cannot be done as given.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import decode_rgb, open_image
from frugal.common.data.index import find_index, read_summary
from frugal.common.data.records import RecordReader
from frugal.common.data.samples import Fields, RawSample, Reader
from frugal.common.data.sources import build_index, find_files, needs_index, open_shard
from frugal.common.data.tars import TarReader
from frugal.common.data.writing import NewSample, new_folder, write_tars
from frugal.common.errors import InputError
from frugal.common.exits import exit_politely

_PERCENTILES = (0, 5, 50, 95, 100)
_SHOWN = 10
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

_FIELDS = Fields()

Patterns = Annotated[tuple[str, ...], tyro.conf.Positional]


def index(patterns: Patterns, *, processes: int | None = None, rebuild: bool = False) -> int:
    """Write the side-car index of every shard that has none.

    Args:
        patterns: shards, as data.train takes them.
        processes: shards indexed at a time; one per core if not given.
        rebuild: replace indexes that there are, for shards that were replaced.
    """
    paths = [path for path in _files(patterns) if needs_index(path)]
    wanted = [path for path in paths if rebuild or find_index(path) is None]
    with _pool(processes, len(wanted)) as pool:
        mistakes = [mistake for mistake in pool.map(_index_one, wanted) if mistake]
    _say(f"indexed {len(wanted) - len(mistakes)} of {len(paths)} shards")
    samples = 0
    for path in paths:
        if find_index(path) is None:
            continue  # its mistake is told below
        try:
            summary = read_summary(path)
        except InputError as error:
            mistakes.append(str(error))
            continue
        samples += summary.num_samples
        if summary.note:
            _say(f"{path} is {summary.note}")
    _say(f"{samples:,} samples")
    for mistake in mistakes:
        sys.stderr.write(f"error: {mistake}\n")
    return 2 if mistakes else 0


def _index_one(path: Path) -> str:
    """Index a shard; what went wrong, or nothing."""
    try:
        build_index(path)
    except InputError as error:
        return str(error)
    return ""


@dataclass
class Contents:
    """What was found in some shards."""

    samples: int = 0
    bytes: int = 0
    members: Counter[str] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    """Images by how many captions they have."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (width, height)."""
    decoded: int = 0
    damage: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def add(self, other: Contents) -> None:
        """Add what was found elsewhere."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.decoded += other.decoded
        self.details += other.details
        for name in ("members", "captions", "sizes", "damage"):
            getattr(self, name).update(getattr(other, name))

    def describe(self) -> Iterator[str]:
        """The report, line by line."""
        yield f"{self.samples:,} samples, {self.bytes:,} bytes"
        members = sorted(self.members.items())
        yield "members: " + (", ".join(f"{name} {count:,}" for name, count in members) or "none")
        captions = sorted(self.captions.items())
        yield "captions per image: " + ", ".join(f"{n} ({count:,})" for n, count in captions)
        for axis, name in enumerate(("width", "height")):
            values = [size[axis] for size in self.sizes.elements()]
            if values:
                found = np.percentile(values, _PERCENTILES, method="nearest").astype(int)
                yield f"{name} at 0/5/50/95/100 %: " + "/".join(map(str, found))
        yield f"decoded {self.decoded:,} images"
        damage = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.damage.items()))
        yield f"damage: {damage or 'none'}"
        yield from self.details[:_SHOWN]
        if len(self.details) > _SHOWN:
            yield f"... and {len(self.details) - _SHOWN:,} more"


def check(
    patterns: Patterns,
    *,
    decode: int | Literal["all"] = 1000,
    processes: int | None = None,
    fields: Fields = _FIELDS,
) -> int:
    """Read every byte of shards and say what they contain and what is damaged.

    Args:
        patterns: shards, folders or lists, as data.train takes them.
        decode: images to decode, spread over the shards, or all.
        processes: shards checked at a time; one per core if not given.
        fields: where images and captions are in a sample.
    """
    paths = _files(patterns)
    share = None if decode == "all" else -(-decode // len(paths))
    contents = Contents()
    with _pool(processes, len(paths)) as pool:
        for found in pool.map(partial(_check_one, fields=fields, decode=share), paths):
            contents.add(found)
    _say(f"{len(paths):,} shards")
    for line in contents.describe():
        _say(line)
    return 1 if contents.damage else 0


def _check_one(path: Path, *, fields: Fields, decode: int | None) -> Contents:
    contents = Contents()
    try:
        if needs_index(path) and find_index(path) is None:
            build_index(path)
        shard, note = open_shard(path, fields)
        reader = shard.open(fields)
    except InputError as error:
        contents.damage["shard"] += 1
        contents.details.append(str(error))
        return contents
    if note:
        contents.damage["shard"] += 1
        contents.details.append(f"{path} is {note}")
    contents.samples = shard.num_samples
    contents.bytes = path.stat().st_size if path.is_file() else 0
    every = max(-(-shard.num_samples // decode), 1) if decode else 1
    for number in range(shard.num_samples):
        try:
            _check_sample(reader, number, contents, decode=decode != 0 and number % every == 0)
        except Damaged as damaged:
            contents.damage[damaged.kind] += 1
            contents.details.append(f"{reader.key(number)}: {damaged}")
    reader.close()
    return contents


def _check_sample(reader: Reader, number: int, contents: Contents, *, decode: bool) -> None:
    if isinstance(reader, TarReader):
        members = reader.members(number)
        contents.members.update(members.keys())
        for member in members.values():
            reader.content(member)
    elif isinstance(reader, RecordReader):
        contents.members.update(reader.features(number).keys())
    raw = reader.read(number)
    contents.captions[len(raw.captions)] += 1
    image = open_image(raw.image)
    contents.sizes[image.size] += 1
    if decode:
        decode_rgb(image)
        contents.decoded += 1


def convert(
    patterns: Patterns,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    fields: Fields = _FIELDS,
) -> int:
    """Write TFRecords, CSV lists, class folders or tars as tars in img2dataset's layout.

    Damaged samples are left out and counted.

    Args:
        patterns: what to convert, as data.train takes it.
        out: folder for 00000.tar and on; new or empty.
        samples_per_shard: samples in each tar but the last; at most 10,000.
        fields: where images and captions are in a sample.
    """
    new_folder(out, samples_per_shard=samples_per_shard)
    paths = _files(patterns)
    for path in paths:
        if needs_index(path) and find_index(path) is None:
            build_index(path)
    damage: Counter[str] = Counter()
    samples = _undamaged(paths, fields, damage)
    written, number = write_tars(out, samples, samples_per_shard=samples_per_shard)
    left_out = ", ".join(f"{kind} {count:,}" for kind, count in sorted(damage.items()))
    _say(f"wrote {written:,} samples in {number:,} shards to {out}; left out: {left_out or 'none'}")
    return 1 if damage else 0


def _undamaged(paths: Sequence[Path], fields: Fields, damage: Counter[str]) -> Iterator[NewSample]:
    """Every sample; counts those left out."""
    for path in paths:
        shard, _ = open_shard(path, fields)
        reader = shard.open(fields)
        for number in range(shard.num_samples):
            try:
                sample = as_new_sample(reader.read(number), source=reader.key(number))
            except Damaged as damaged:
                damage[damaged.kind] += 1
                continue
            yield sample
        reader.close()


def as_new_sample(raw: RawSample, *, source: str, **about: Any) -> NewSample:
    """A sample as it is written: the first caption as text, all of them in its JSON.

    Args:
        raw: as it is stored; pictures of other formats than tars usually hold become PNG.
        source: where it comes from.
        about: what else its JSON tells.

    Raises:
        Damaged: if the picture cannot be read.
    """
    image = open_image(raw.image)
    extension = _EXTENSIONS.get(image.format or "")
    described: dict[str, Any] = {"source": source, **about}
    if raw.captions:
        described["caption"] = raw.captions[0]
    if len(raw.captions) > 1:
        described["captions"] = raw.captions
    return NewSample(
        image=raw.image if extension else _as_png(decode_rgb(image)),
        extension=extension or "png",
        about=described,
        text=raw.captions[0] if raw.captions else None,
        label=raw.label,
    )


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _files(patterns: Sequence[str]) -> list[Path]:
    if not patterns:
        raise InputError("no shards are given; name at least one file, folder or pattern")
    return [path for pattern in patterns for path in find_files(pattern)]


def _pool(processes: int | None, jobs: int) -> ProcessPoolExecutor:
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}, must be at least 1")
    return ProcessPoolExecutor(max(min(processes or os.cpu_count() or 1, jobs), 1))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit code."""
    commands: dict[str, Callable[..., int]] = {"index": index, "check": check, "convert": convert}
    return exit_politely(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m frugal.common.shards", args=arguments, sort_subcommands=False
        )
    )


if __name__ == "__main__":
    sys.exit(main())
