"""From the published files of YFCC100M to shards: texts are cleaned, images come from archives.

``python -m frugal.cit.yfcc texts yfcc100m_dataset.tsv --out texts.parquet`` reads the metadata
table (tab-separated: number, ..., title, description, user tags, machine tags), ``python -m
frugal.cit.yfcc shards texts.parquet --images images --out shards`` writes webdataset tars.

Sources: YFCC100M (Thomee et al., arXiv:1503.01817), the subset of 15 million of CLIP, and the
preparation of CiT (arXiv:2301.02241).
"""

from __future__ import annotations

import bz2
import gzip
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from urllib.parse import unquote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from frugal.common.cli import command_words, run_politely
from frugal.common.data.writing import MOST_SAMPLES, NewSample, new_folder, write_tars
from frugal.common.errors import InputError
from frugal.common.files import LARGEST_FILE

FIELDS = ("title", "desc", "tag")
"""The texts of a photo, as keys of published pairs name them."""
SCHEMA = pa.schema([("id", pa.int64()), *((name, pa.string()) for name in FIELDS)])
_ID, _TITLE, _DESCRIPTION, _USER_TAGS, _MACHINE_TAGS = 0, 8, 9, 10, 11
_MARKUP = re.compile(r"<a\b[^>]*>|</a>|</?[bi]>", re.IGNORECASE)
_LINK = re.compile(r"(?<!\w)(?:http|www)\S+")
_ROWS_AT_ONCE = 65_536


def clean(text: str) -> str:
    """A field of the table as a person would read it: decoded, without markup and links."""
    return _LINK.sub("", _MARKUP.sub("", unquote_plus(text)))


def texts_of(columns: list[str]) -> dict[str, str]:
    """Title, description and tags of a row of the table, cleaned and stripped."""
    tags = ",".join(tag for c in (_USER_TAGS, _MACHINE_TAGS) if (tag := columns[c].strip()))
    found = (columns[_TITLE], columns[_DESCRIPTION], tags)
    return {name: clean(text).strip() for name, text in zip(FIELDS, found, strict=True)}


@dataclass
class _Rows:
    """Counts of what became of the rows of the table."""

    read: int = 0
    kept: int = 0
    damaged: int = 0
    """Without a number, or with too few columns."""
    repaired: int = 0
    """With bytes that are no UTF-8, in whose place a replacement character stands."""
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in SCHEMA.names}
    )

    def take(self) -> pa.Table:
        """The rows kept since the last call."""
        table = pa.table(self.columns, schema=SCHEMA)
        for column in self.columns.values():
            column.clear()
        self.kept += len(table)
        return table


def texts(
    dataset: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    available: Path | None = None,
    subset: Path | None = None,
) -> int:
    """Clean the texts of YFCC100M, or of a subset of it.

    Args:
        dataset: the metadata table, plain, .gz or .bz2.
        out: the file to write, .parquet: id, title, desc, tag.
        available: numbers of the photos that there are (a .npy file); all by default.
        subset: a table whose first column holds the wanted numbers, such as CLIP's list of 15
            million. Its photos stay without any text too; without a subset such ones are left out.
    """
    wanted = [_read_numbers(available)] if available is not None else []
    if subset is not None:
        wanted.append(_read_subset(subset))
    rows = _Rows()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    with pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
        for columns in _table(dataset, rows):
            number = int(columns[_ID])
            if not all(_holds(numbers, number) for numbers in wanted):
                continue
            found = texts_of(columns)
            if subset is None and not any(found.values()):
                continue
            for name, value in ({"id": number} | found).items():
                rows.columns[name].append(value)
            if len(rows.columns["id"]) == _ROWS_AT_ONCE:
                writer.write_table(rows.take())
        writer.write_table(rows.take())
    if rows.damaged > 0.01 * rows.read or not rows.read:
        aside.unlink()
        raise InputError(
            f"{rows.damaged:,} of the {rows.read:,} rows of {dataset} do not begin with a number "
            "or have fewer than 12 columns; give the metadata table with numbered rows"
        )
    aside.replace(out)
    sys.stdout.write(
        f"kept {rows.kept:,} of {rows.read:,} rows in {out} ({rows.damaged:,} damaged)\n"
    )
    if rows.repaired:
        sys.stdout.write(
            f"{rows.repaired:,} rows are not UTF-8: U+FFFD stands for what cannot be read\n"
        )
    return 0


_UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file that was cut or altered raises."""


def _holds(numbers: np.ndarray, number: int) -> bool:
    place = int(np.searchsorted(numbers, number))
    return place < len(numbers) and int(numbers[place]) == number


def _open(path: Path) -> BinaryIO:
    opener: Callable[..., Any] = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, open)
    try:
        return opener(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as file:
        try:
            for line in file:
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except _UNREADABLE as error:
            raise InputError(f"{path} cannot be read to its end ({error}); copy it again") from None


def _table(path: Path, rows: _Rows) -> Iterator[list[str]]:
    """The rows of the metadata table that have a number and all columns; counts the others."""
    for line in _lines(path):
        rows.read += 1
        columns = line.split("\t")
        if len(columns) > _MACHINE_TAGS and columns[_ID].isascii() and columns[_ID].isdecimal():
            rows.repaired += "\ufffd" in line
            yield columns
        else:
            rows.damaged += 1


def _read_numbers(path: Path) -> np.ndarray:
    """The sorted numbers in a .npy file."""
    try:
        numbers = np.load(path, allow_pickle=False)
        return np.unique(np.asarray(numbers).astype(np.int64).reshape(-1))
    except (OSError, ValueError, EOFError, TypeError, MemoryError, AttributeError) as error:
        raise InputError(
            f"{path} is no .npy file of numbers ({error}); give one such as flickr_unique_ids.npy"
        ) from None


def _read_subset(path: Path) -> np.ndarray:
    """The sorted numbers in the first column of a table."""
    firsts = (line.partition("\t")[0].strip() for line in _lines(path))
    try:
        return np.unique(np.fromiter((int(first) for first in firsts if first), np.int64))
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{path} has something else than a number in its first column ({error}); give a table "
            "such as yfcc100m_subset_data.tsv"
        ) from None


def shards(
    table: Annotated[Path, tyro.conf.Positional],
    *,
    images: Path,
    out: Path,
    samples_per_shard: int = MOST_SAMPLES,
) -> int:
    """Write photos with their texts as tars: jpg, and json with title, desc and tag.

    Photos without any text, and those whose image is not there, are left out and counted.

    Args:
        table: what the command texts wrote.
        images: folder of archives: photo AABBBCCC lies in AA/BBB.zip as CCC.jpg.
        out: folder for 00000.tar and on; new or empty.
        samples_per_shard: samples in each tar but the last; at most 10,000.
    """
    if not images.is_dir():
        raise InputError(f"--images {images} is no folder; give the one that holds AA/BBB.zip")
    rows = _rows(table)
    new_folder(out, samples_per_shard=samples_per_shard)
    left_out: Counter[str] = Counter()
    samples = _samples(rows, _Archives(images), left_out)
    written, number = write_tars(out, samples, samples_per_shard=samples_per_shard)
    if not written:
        raise InputError(
            f"none of the photos of {table} lies in {images}; it must hold archives such as "
            "12/345.zip with 678.jpg for photo 12345678"
        )
    counted = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items()))
    sys.stdout.write(
        f"wrote {written:,} photos in {number:,} shards to {out}; left out: {counted or 'none'}\n"
    )
    return 0


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({error}); make it with `python -m "
            "frugal.cit.yfcc texts`"
        ) from None
    if missing := [name for name in SCHEMA.names if name not in file.schema_arrow.names]:
        raise InputError(f"{path} has no column {missing[0]}; make it with frugal.cit.yfcc texts")
    return (row for b in file.iter_batches(4_096, columns=SCHEMA.names) for row in b.to_pylist())


class _Archives:
    """The images of a folder of archives; the one that was read last stays open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._archive: zipfile.ZipFile | None = None

    def image(self, key: str) -> bytes | str:
        """The image of a photo by its key of 8 digits, or what is wrong."""
        try:
            archive = self._open(f"{key[:2]}/{key[2:5]}.zip")
            member = archive.getinfo(f"{key[5:]}.jpg")
            if member.file_size > LARGEST_FILE:
                return "unreadable"
            return archive.read(member) or "empty image"
        except (FileNotFoundError, KeyError):
            return "no image"
        except (*_UNREADABLE, zipfile.BadZipFile, NotImplementedError, RuntimeError):
            return "unreadable"

    def _open(self, name: str) -> zipfile.ZipFile:
        if self._archive is None or name != self._name:
            if self._archive is not None:
                self._archive.close()
                self._archive = None
            self._archive, self._name = zipfile.ZipFile(self._folder / name), name
        return self._archive


def _samples(
    rows: Iterable[dict[str, Any]], archives: _Archives, left_out: Counter[str]
) -> Iterator[NewSample]:
    for row in rows:
        about = {name: row[name] for name in FIELDS if row[name]}
        if not about:
            left_out["no text"] += 1
            continue
        key = f"{row['id']:08d}"
        image = archives.image(key)
        if isinstance(image, str):
            left_out[image] += 1
            continue
        yield NewSample(image=image, extension="jpg", about=about, key=key)


def main() -> None:
    """The body of ``python -m frugal.cit.yfcc``."""
    commands: dict[str, Callable[..., int]] = {"texts": texts, "shards": shards}

    def command() -> None:
        tyro.extras.subcommand_cli_from_dict(
            commands, args=command_words(), prog="python -m frugal.cit.yfcc", sort_subcommands=False
        )

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
