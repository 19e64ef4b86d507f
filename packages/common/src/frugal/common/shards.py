"""Look at shards, index them, and turn other stores into them.

``python -m frugal.common.shards index|check|convert``; exit code 0 if all is well, 1 if something
is damaged, 2 if the command cannot be done as given.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from frugal.common.cli import command_words, exit_politely
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.decoding import decode_rgb, open_image
from frugal.common.data.patterns import find_files, find_streams, is_stream, needs_index
from frugal.common.data.samples import Fields, RawSample, Reader, Shard, assemble
from frugal.common.data.sources import EMPTY, build_index, ensure_index, open_indexed, open_shard
from frugal.common.data.stores.folder import FileList, refuse_without_words
from frugal.common.data.stores.grouping import REPEATED
from frugal.common.data.stores.index import find_index, read_summary
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.stores.tfrecord import RecordReader
from frugal.common.data.writing import NewSample, as_new_sample, new_folder, write_tars
from frugal.common.errors import InputError

_PERCENTILES = (0, 5, 50, 95, 100)
_SHOWN = 10

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
    missing = [path for path in paths if rebuild or find_index(path) is None]
    with _pool(processes, len(missing)) as pool:
        done = pool.map(partial(_index_one, rebuild=rebuild), missing)
        mistakes = [mistake for mistake in done if mistake]
    _say(f"indexed {len(missing) - len(mistakes)} of {len(paths)} shards")
    samples = 0
    passed_over, remarks = PassedOver(), PassedOver()
    for path in paths:
        if find_index(path) is None:
            continue  # its mistake is told below
        try:
            summary = read_summary(path)
        except InputError as error:
            mistakes.append(str(error))
            continue
        samples += summary.num_samples
        passed_over.update(summary.passed_over)
        remarks.update(summary.remarks)
        for line in summary.lines(path):
            _say(line)
    _say(f"{samples:,} samples")
    for line in [*remarks.lines(""), *passed_over.lines()]:
        _say(line)
    for mistake in mistakes:
        sys.stderr.write(f"error: {mistake}\n")
    return 2 if mistakes else 0


def _index_one(path: Path, *, rebuild: bool) -> str:
    """Index a shard; what went wrong, or nothing."""
    try:
        build_index(path, rebuild=rebuild)
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
    num_details: int = 0
    """How many there are beside those."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    remarks: PassedOver = field(default_factory=PassedOver)
    repaired: Counter[str] = field(default_factory=Counter)
    """Samples by what is wrong with a part of them that another part makes up for."""
    without_caption: list[str] = field(default_factory=list)
    """The first images without a caption, by their keys."""
    about_lists: list[str] = field(default_factory=list)
    """What lists hold, and what was passed over or guessed."""

    def add(self, other: Contents) -> None:
        """Add what was found elsewhere."""
        self.samples += other.samples
        self.passed_over.update(other.passed_over)
        self.remarks.update(other.remarks)
        self.bytes += other.bytes
        self.decoded += other.decoded
        self.details += other.details
        self.about_lists += other.about_lists
        self.without_caption += other.without_caption
        for name in ("members", "captions", "sizes", "damage", "repaired"):
            getattr(self, name).update(getattr(other, name))

    def count_without_caption(self) -> None:
        """Count images without a caption as training does; where none has one, none is meant to."""
        without = self.captions[0]
        if without and self.captions.total() > without:
            self.damage["no caption"] += without
            self.details += [f"{key}: no caption" for key in self.without_caption[:_SHOWN]]
            self.num_details += max(without - _SHOWN, 0)

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
        yield from self.remarks.lines("")
        yield from self.passed_over.lines()
        yield f"damage: {_listed(self.damage)}"
        yield from _repaired(self.repaired)
        yield from self.about_lists
        yield from self.details[:_SHOWN]
        if (more := len(self.details[_SHOWN:]) + self.num_details) > 0:
            yield f"... and {more:,} more"

    def describe_shard(self, name: str) -> str | None:
        """One line on a shard of which something was left out; None on the others."""
        if not self.damage and not self.passed_over:
            return None
        sound = self.captions.total()
        left_out = sum(self.passed_over.counts.values())
        members = f", {left_out:,} members passed over" if left_out else ""
        return f"{name}: {sound:,} of {self.samples:,} samples sound, damage: " + (
            _listed(self.damage) + members
        )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items())) or "none"


def check(
    patterns: Patterns,
    *,
    decode: int | Literal["all"] = 1000,
    processes: int | None = None,
    fields: Fields = _FIELDS,
) -> int:
    """Read every byte of shards and say what they contain and what is damaged.

    Args:
        patterns: shards, folders or lists, as data.train takes them; pipe: commands and URLs too.
        decode: images to decode, spread over the shards, or all.
        processes: shards checked at a time; one per core if not given.
        fields: where images and captions are in a sample.
    """
    shards: list[Path | str] = []
    for pattern in _given(patterns):
        shards += find_streams(pattern) if is_stream(pattern) else find_files(pattern)
    share = None if decode == "all" else -(-decode // len(shards))
    contents = Contents()
    odd = []
    with _pool(processes, len(shards)) as pool:
        found = pool.map(partial(_check_one, fields=fields, decode=share), shards)
        for shard, one in zip(shards, found, strict=True):
            contents.add(one)
            if line := one.describe_shard(str(shard)):
                odd.append(line)
    contents.count_without_caption()
    _say(f"{len(shards):,} shards")
    for line in contents.describe():
        _say(line)
    if len(shards) > 1:
        for line in _first_of(odd):
            _say(line)
    return 1 if contents.damage or not contents.samples else 0


def _first_of(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _check_one(shard: Path | str, *, fields: Fields, decode: int | None) -> Contents:
    contents = Contents()
    try:
        if isinstance(shard, str):
            _check_stream(shard, contents, fields=fields, decode=decode)
        else:
            _check_file(shard, contents, fields=fields, decode=decode)
    except InputError as error:
        contents.damage["shard"] += 1
        contents.details.append(str(error))
    return contents


def _check_file(path: Path, contents: Contents, *, fields: Fields, decode: int | None) -> None:
    shard, summary = open_indexed(path, fields)
    reader = shard.open(fields)
    lines = summary.lines(path)
    contents.details += lines
    if lines:
        contents.damage["shard"] += 1
    if repeated := summary.remarks.counts.get(REPEATED):
        contents.damage["repeated key"] += repeated
    contents.passed_over.update(summary.passed_over)
    contents.remarks.update(summary.remarks)
    contents.about_lists += _about_list(shard)
    contents.samples = shard.num_samples
    if not shard.num_samples:
        contents.remarks.add(EMPTY, str(path))
    contents.bytes = path.stat().st_size if path.is_file() else 0
    every = max(-(-shard.num_samples // decode), 1) if decode else 1
    for number in range(shard.num_samples):
        try:
            decodes = decode != 0 and number % every == 0
            raw = _read_all(reader, number, contents)
            _check_raw(reader.key(number), raw, contents, decode=decodes)
        except Damaged as damaged:
            contents.damage[damaged.kind] += 1
            contents.details.append(f"{reader.key(number)}: {damaged}")
    reader.close()


def _check_stream(url: str, contents: Contents, *, fields: Fields, decode: int | None) -> None:
    for key, members in stream_tar(url, passed_over=contents.passed_over):
        contents.samples += 1
        try:
            if isinstance(members, Damaged):
                raise members
            contents.members.update(members.keys())
            contents.bytes += sum(map(len, members.values()))
            raw = assemble(fields, members, members.__getitem__)
            decodes = decode is None or contents.decoded < decode
            _check_raw(key, raw, contents, decode=decodes)
        except Damaged as damaged:
            contents.damage[damaged.kind] += 1
            contents.details.append(f"{key}: {damaged}")


def _about_list(shard: Shard) -> list[str]:
    """What a list holds, and what of it was passed over or guessed."""
    if not isinstance(shard, FileList):
        return []
    return [*([f"{shard.name}: {shard.counted}"] if shard.counted else []), *shard.warnings()]


def _repaired(repaired: Counter[str]) -> Iterator[str]:
    for reason, count in repaired.most_common(_SHOWN):
        yield f"repaired: {count:,} samples, of another field than the first ({reason})"


def _read_all(reader: Reader, number: int, contents: Contents) -> RawSample:
    """A sample, with all of its members read; raises ``Damaged``."""
    if isinstance(reader, TarReader):
        members = reader.members(number)
        contents.members.update(members.keys())
        for member in members.values():
            reader.content(member)
    elif isinstance(reader, RecordReader):
        contents.members.update(reader.features(number).keys())
    return reader.read(number)


def _check_raw(key: str, raw: RawSample, contents: Contents, *, decode: bool) -> None:
    image = open_image(raw.image)
    if decode:
        decode_rgb(image)
        contents.decoded += 1
    if raw.repaired:
        contents.repaired[raw.repaired] += 1
    contents.captions[len(raw.captions)] += 1
    if not raw.captions and len(contents.without_caption) < _SHOWN:
        contents.without_caption.append(key)
    contents.sizes[image.size] += 1


def convert(
    patterns: Patterns,
    out: Path,
    *,
    samples_per_shard: int = 10_000,
    fields: Fields = _FIELDS,
) -> int:
    """Write TFRecords, CSV lists, class folders or tars as tars in img2dataset's layout.

    Damaged samples are left out and counted. Pictures are copied as they are, and decoded by
    `check` only: one that is cut in the middle stays, and counts as damaged in training.

    Args:
        patterns: what to convert, as data.train takes it.
        out: folder for 00000.tar and on; new or empty.
        samples_per_shard: samples in each tar but the last; at most 10,000.
        fields: where images and captions are in a sample.
    """
    new_folder(out, samples_per_shard=samples_per_shard)
    paths = _files(patterns)
    for path in paths:
        ensure_index(path)
    found = Contents()
    samples = _undamaged(paths, fields, found)
    written, number = write_tars(out, samples, samples_per_shard=samples_per_shard)
    for line in [*found.details, *found.remarks.lines(""), *found.passed_over.lines()]:
        _say(line)
    for line in [*_repaired(found.repaired), *found.about_lists]:
        _say(line)
    if without := found.captions[0]:
        _say(f"{without:,} of the samples written have no caption")
    _say(
        f"wrote {written:,} samples in {number:,} shards to {out}; left out: "
        f"{_listed(found.damage)} (of {found.samples:,} samples in {len(paths):,} shards)"
    )
    return 1 if found.damage or found.details or not written else 0


def _undamaged(paths: Sequence[Path], fields: Fields, found: Contents) -> Iterator[NewSample]:
    """Every sample; counts those left out."""
    for path in paths:
        shard, summary = open_shard(path, fields)
        found.samples += shard.num_samples
        if not shard.num_samples:
            found.remarks.add(EMPTY, shard.name)
        found.details += summary.lines(path)
        found.passed_over.update(summary.passed_over)
        found.remarks.update(summary.remarks)
        found.about_lists += _about_list(shard)
        if isinstance(shard, FileList):
            _remark_without_words(shard)
        reader = shard.open(fields)
        damage: Counter[str] = Counter()
        for number in range(shard.num_samples):
            try:
                raw = reader.read(number)
                sample = as_new_sample(raw, source=reader.key(number))
            except Damaged as damaged:
                damage[damaged.kind] += 1
                continue
            if raw.repaired:
                found.repaired[raw.repaired] += 1
            found.captions[len(raw.captions)] += 1
            yield sample
        reader.close()
        if damage:
            found.damage.update(damage)
            count = f"{damage.total():,} of its {shard.num_samples:,} samples"
            _say(f"{path}: left out {count}: {_listed(damage)}")


def _remark_without_words(shard: FileList) -> None:
    """Say where classes make no captions."""
    try:
        refuse_without_words(shard)
    except InputError as error:
        _say(f"no captions are written: {error}")


def _given(patterns: Sequence[str]) -> Sequence[str]:
    if not patterns:
        raise InputError("no shards are given; name at least one file, folder or pattern")
    return patterns


def _files(patterns: Sequence[str]) -> list[Path]:
    stream = next((pattern for pattern in _given(patterns) if is_stream(pattern)), None)
    if stream is not None:
        raise InputError(
            f"{stream} can only be read from its beginning on, which is enough for `check`; copy "
            "the shards to a disk first"
        )
    passed_over = PassedOver()
    files = [p for pattern in patterns for p in find_files(pattern, passed_over=passed_over)]
    for line in passed_over.lines():
        _say(line)
    return files


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
            commands,
            prog="python -m frugal.common.shards",
            args=command_words(arguments),
            sort_subcommands=False,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
