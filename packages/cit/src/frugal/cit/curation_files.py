"""What every curation chose, as a file of the run directory.

``curation/000003.parquet`` holds the pairs of period 3 in the order in which they are trained on,
and in its metadata how they were found. It is written aside and renamed when complete, and its
bytes are a function of the curation alone: a run that was interrupted writes the same again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugal.cit.curation import Chosen, Curation, Example, Facts
from frugal.cit.metadata import TargetClass
from frugal.cit.pool import Pool
from frugal.common.checkpoint.manifest import file_checksum
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of

if TYPE_CHECKING:  # types of a library that takes longer to import than torch
    import pyarrow as pa

FOLDER = "curation"
_ABOUT = b"frugal.cit"


def text_name(names: Sequence[str], place: int) -> str:
    """What a text of a sample is called: its field, or a number among several captions."""
    return names[place] if names else f"caption{place}"


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if names else int(name.removeprefix("caption"))


class CurationFiles:
    """The curations of one run directory."""

    def __init__(
        self, run_dir: Path, pool: Pool, classes: Sequence[TargetClass], text_names: Sequence[str]
    ) -> None:
        self._folder = run_dir / FOLDER
        self._pool = pool
        self._classes = classes
        self._text_names = text_names

    def path(self, period: int) -> Path:
        """Where the curation of a period is kept."""
        return self._folder / f"{period:06d}.parquet"

    def write(self, curation: Curation) -> int:
        """Keep a curation; the checksum of its file.

        Raises:
            InputError: if it cannot be written.
        """
        import pyarrow.parquet as pq

        path = self.path(curation.facts.period)
        aside = path.with_name(f".{path.name}.writing")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(self._table(curation), aside, compression="zstd")
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            raise InputError(
                f"the curation {path} cannot be written ({error.strerror or error}); make room or "
                "the folder writable, and start the same command again"
            ) from None
        return file_checksum(path)

    def _table(self, curation: Curation) -> pa.Table:
        """Path of the shard, number and key of the sample, name of the text, cosine, class."""
        import pyarrow as pa

        chosen = curation.chosen
        shards, number_of_shard = np.unique(chosen.shards, return_inverse=True)
        texts, number_of_text = np.unique(chosen.texts, return_inverse=True)
        shard_names = [self._pool.shards[shard].name for shard in shards.tolist()]
        text_names = [text_name(self._text_names, text) for text in texts.tolist()]
        columns = {
            "shard": _dictionary(number_of_shard, shard_names),
            "index": pa.array(chosen.indices),
            "key": pa.array(self._keys(chosen), pa.string()),
            "text": _dictionary(number_of_text, text_names),
            "similarity": pa.array(chosen.similarity),
            "nearest": _dictionary(chosen.classes, [item.name for item in self._classes]),
        }
        about = asdict(curation.facts) | {"examples": [asdict(e) for e in curation.examples]}
        metadata = {_ABOUT: json.dumps(about, sort_keys=True).encode()}
        return pa.table(columns).replace_schema_metadata(metadata)

    def _keys(self, chosen: Chosen) -> list[str]:
        """The key of every pair; shard by shard, so that each is opened once."""
        keys = [""] * len(chosen)
        for row in np.argsort(chosen.shards, kind="stable").tolist():
            shard = int(chosen.shards[row])
            key = self._pool.readers.reader(shard).key(int(chosen.indices[row]))
            keys[row] = key.removeprefix(f"{self._pool.shards[shard].name}/")
        return keys

    def read(self, period: int, checksum: int) -> Curation:
        """The curation of a period.

        Raises:
            InputError: if it is not there any more, or not the one that a checkpoint belongs to.
        """
        import pyarrow.parquet as pq

        path = self.path(period)
        problem = "is missing"
        if path.is_file():
            problem = (
                "" if file_checksum(path) == checksum else "was altered (its checksum differs)"
            )
        if problem:
            raise InputError(
                f"{path} {problem}, and the newest checkpoint goes on in the middle of what it "
                "lists; restore the file, or remove the checkpoints of this period to curate anew "
                "from the one before"
            )
        table = pq.read_table(path)
        facts, examples = read_about(path)
        return Curation(self._chosen(table), facts, examples)

    def _chosen(self, table: pa.Table) -> Chosen:
        number_of_shard = {shard.name: number for number, shard in enumerate(self._pool.shards)}
        names = [item.name for item in self._classes]
        number_of_class = {name: number for number, name in reversed(list(enumerate(names)))}
        return Chosen(
            _decode(table["shard"], number_of_shard.__getitem__).astype(np.int64),
            table["index"].to_numpy(),
            _decode(table["text"], lambda t: _place(self._text_names, t)).astype(np.int16),
            table["similarity"].to_numpy(),
            _decode(table["nearest"], number_of_class.__getitem__).astype(np.int32),
        )


def read_about(path: Path) -> tuple[Facts, list[Example]]:
    """How the pairs in a file were found, and some captions that were looked at.

    Raises:
        InputError: if it is no file of a curation.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = parse_json((pq.read_schema(path).metadata or {})[_ABOUT])
        examples = [Example(**example) for example in about.pop("examples")]
        return Facts(**about), examples
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no file of a curation ({reason_of(error)}); give the run directory of a "
            "run of CiT"
        ) from None


def curations_of(run_dir: Path) -> list[Path]:
    """The files of all curations of a run, in order."""
    return sorted((run_dir / FOLDER).glob("[0-9]*.parquet"))


def _dictionary(numbers: np.ndarray, names: list[str]) -> pa.DictionaryArray:
    """A column of names, each written once, from the number of its name for every row."""
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(
        pa.array(numbers.astype(np.int32)), pa.array(names, pa.string())
    )


def _decode(column: pa.ChunkedArray, number_of: Any) -> np.ndarray:
    """From a column of names to numbers, each name looked up once."""
    parts = []
    for chunk in column.chunks:
        numbers = np.array([number_of(name) for name in chunk.dictionary.to_pylist()])
        parts.append(numbers[chunk.indices.to_numpy()])
    return np.concatenate(parts)
