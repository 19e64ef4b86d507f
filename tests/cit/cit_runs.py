"""Small runs of CiT and what they chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from support import TINY

MODULE = "frugal.cit.train"


def words(pool: Path) -> tuple[str, ...]:
    """The tiny demo on a pool: 4 curations of 5 updates, each of about 500 captions."""
    return (
        *TINY,
        f"--data.train={pool / 'train'}",
        f"--data.metadata.sources={pool / 'zero_shot' / 'classnames.txt'}",
        "--data.period=5", "--data.scan=40", "--data.threshold=0.999", "--data.min-ratio=0.25",
    )  # fmt: skip


def curations(run: Path) -> dict[str, dict[str, Any]]:
    """What every curation of a run chose, and how, by the name of its file."""
    found = {}
    for file in sorted((run / "curation").iterdir()):
        table = pq.read_table(file)
        found[file.name] = table.to_pydict() | {"about": table.schema.metadata}
    return found


def pairs(run: Path) -> list[list[tuple[str, int, str]]]:
    """Shard, number and text of the pairs of every curation, in order."""
    return [
        list(zip(table["shard"], table["index"], table["text"], strict=True))
        for table in curations(run).values()
    ]
