"""Count the words of a corpus: ``python -m frugal.clipa.word_counts SHARDS ... --out FILE``.

Reads captions only, no images. The shares of the common words, the only ones that matter, are
known well from a few million captions: some of the shards of a large set are enough.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from frugal.clipa.frequency_masking import find_words, keep_probability
from frugal.common.cli import command_words, exit_politely
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.patterns import find_files, is_stream
from frugal.common.data.samples import Fields
from frugal.common.data.sources import open_indexed
from frugal.common.data.stores.folder import FileList
from frugal.common.errors import InputError

_THRESHOLDS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
_FIELDS = Fields()

Patterns = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass
class WordCounts:
    """The words of some captions."""

    captions: int = 0
    damaged: int = 0
    """Samples whose captions could not be read."""
    notes: list[str] = field(default_factory=list)
    """What is wrong with shards as a whole."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def words(self) -> int:
        """All words, repeated ones included."""
        return self.counts.total()

    def add(self, other: WordCounts) -> None:
        """Add what was counted elsewhere."""
        self.captions += other.captions
        self.damaged += other.damaged
        self.notes += other.notes
        self.counts.update(other.counts)

    def add_caption(self, caption: str) -> None:
        """Count the words of one caption."""
        text, spans = find_words(caption)
        self.captions += 1
        self.counts.update(text[start:stop] for start, stop in spans)

    def kept_words(self, threshold: float) -> float:
        """Words of a caption that stay on average."""
        total = self.words
        kept = sum(n * keep_probability(n / total, threshold) for n in self.counts.values())
        return kept / self.captions

    def content(self, *, least_share: float) -> Mapping[str, Any]:
        """The counts file; words that make up less than a share are counted, not listed."""
        fewest = least_share * self.words
        return {
            "captions": self.captions,
            "words": self.words,
            "distinct_words": len(self.counts),
            "least_share": least_share,
            "counts": {w: n for w, n in self.counts.most_common() if n >= fewest},
        }


def count_words(
    patterns: Patterns,
    *,
    out: Path,
    least_share: float = 1e-7,
    processes: int | None = None,
    fields: Fields = _FIELDS,
) -> int:
    """Count the words of captions and write them for frequency masking.

    Args:
        patterns: shards, folders or lists, as data.train takes them.
        out: the file to write.
        least_share: words that make up less of the corpus are not listed; the lowest threshold
            that frequency masking can then have.
        processes: shards read at a time; one per core if not given.
        fields: where captions are in a sample.
    """
    if not 0 <= least_share <= 1:
        raise InputError(f"--least-share is {least_share}, must lie between 0 and 1")
    if processes is not None and processes < 1:
        raise InputError(f"--processes is {processes}, must be at least 1")
    found = WordCounts()
    paths = find_shards(patterns)
    with ProcessPoolExecutor(min(processes or os.cpu_count() or 1, len(paths))) as pool:
        for part in pool.map(partial(_count_shard, fields=fields), paths):
            found.add(part)
    content = found.content(least_share=least_share)
    if not content["counts"]:
        raise InputError(
            f"no word that makes up {least_share:g} or more is found in the {found.captions:,} "
            f"captions of {', '.join(patterns)}; say where captions are with --fields.caption or "
            "--fields.csv-caption, or lower --least-share"
        )
    _write(out, content)
    for line in _describe(found, content, out):
        sys.stdout.write(line + "\n")
    return 0


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The files and folders of some patterns; what is passed over is told.

    Raises:
        InputError: if there are none, or they can only be read from their beginning on.
    """
    if not patterns:
        raise InputError("no shards are given; name at least one file, folder or pattern")
    stream = next((pattern for pattern in patterns if is_stream(pattern)), None)
    if stream is not None:
        raise InputError(
            f"{stream} cannot be counted where it is; copy some of its shards here and count those"
        )
    passed_over = PassedOver()
    files = [p for pattern in patterns for p in find_files(pattern, passed_over=passed_over)]
    for line in passed_over.lines():
        sys.stderr.write(line + "\n")
    return files


def _count_shard(path: Path, *, fields: Fields) -> WordCounts:
    shard, summary = open_indexed(path, fields)
    found = WordCounts(notes=[f"{path} is {summary.note}"] if summary.note else [])
    if isinstance(shard, FileList):
        found.notes += shard.warnings()
    reader = shard.open(fields)
    for number in range(shard.num_samples):
        try:
            captions = reader.captions(number)
        except Damaged:
            found.damaged += 1
            continue
        for caption in filter(None, captions):
            found.add_caption(caption)
    reader.close()
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose another --out"
        ) from None


def _describe(found: WordCounts, content: Mapping[str, Any], out: Path) -> list[str]:
    return [
        *found.notes,
        f"{found.captions:,} captions, {found.words:,} words, {len(found.counts):,} distinct; "
        f"{found.damaged:,} samples could not be read",
        f"{found.words / found.captions:.1f} words of a caption; of these stay on average",
        *(f"{found.kept_words(t):8.1f}  at threshold {t:g}" for t in _THRESHOLDS),
        f"{len(content['counts']):,} words written to {out}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    program = "python -m frugal.clipa.word_counts"
    return exit_politely(lambda: tyro.cli(count_words, prog=program, args=command_words(arguments)))


if __name__ == "__main__":
    sys.exit(main())
