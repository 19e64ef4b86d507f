"""The pairs that a run trained on, as a table and as shards that can be trained on again.

``python -m frugal.cit.trained_pairs count RUN --out pairs.parquet`` says how often every pair was
trained on; ``python -m frugal.cit.trained_pairs write pairs.parquet --out shards`` copies them.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro

from frugal.cit.curated_data import CuratedData
from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.cli import command_words, run_politely
from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields, Reader
from frugal.common.data.sources import open_indexed
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.writing import (
    MOST_SAMPLES,
    NewSample,
    as_new_sample,
    new_folder,
    write_tars,
)
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of, write_json
from frugal.common.recipe_json import from_json, load_recipe, to_json

SCHEMA = pa.schema(
    [
        ("pair", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("text", pa.string()),
        ("times", pa.int64()),
    ]
)
"""``key_text`` as published, path of the shard, number and key of the sample in it, name of the
text, and how often the pair was trained on."""
_BY = ["shard", "index", "key", "text"]
_ABOUT = b"frugal.cit.fields"
ROWS_AT_ONCE = 4_000_000
"""Rows of curations that are summed up at a time."""


def count(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
) -> int:
    """Count how often a run trained on every pair, up to its newest checkpoint.

    Damaged pairs, which a batch holds but no loss sees, are counted too: the counts add up to
    updates times batch size.

    Args:
        run: a run directory.
        out: the file to write, .parquet.
    """
    total, pairs = count_pairs(run, out)
    sys.stdout.write(f"{total:,} pairs trained on, {pairs:,} of them different, in {out}\n")
    return 0


def count_pairs(run: Path, out: Path, *, rows_at_once: int = ROWS_AT_ONCE) -> tuple[int, int]:
    """As :func:`count`; how many pairs were trained on and how many different ones.

    Raises:
        InputError: if it is no run of CiT, or the file of a curation is missing.
    """
    recipe = load_recipe(run / "recipe.json")
    if not isinstance(recipe.data, CuratedData):
        raise InputError(f"{run} is a run that chose no pairs itself; give a run of CiT")
    step, period = find_checkpoint(run).step, recipe.data.period
    files = [
        (_curation(run, first // period), (min(first + period, step) - first) * recipe.batch_size)
        for first in range(0, step, period)
    ]
    buckets = -(-sum(rows for _, rows in files) // rows_at_once)
    total = different = 0
    fields = json.dumps(to_json(recipe.data.fields)).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing")
    with pq.ParquetWriter(aside, SCHEMA.with_metadata({_ABOUT: fields}), compression="zstd") as to:
        for bucket in range(buckets):
            table = _sum(files, bucket=bucket, buckets=buckets)
            to.write_table(table.cast(to.schema))
            total += pc.sum(table["times"]).as_py() or 0
            different += len(table)
    aside.replace(out)
    return total, different


def _curation(run: Path, period: int) -> Path:
    path = run / "curation" / f"{period:06d}.parquet"
    if not path.is_file():
        raise InputError(f"{path} is missing, so that its pairs cannot be counted; restore it")
    return path


def _sum(files: Sequence[tuple[Path, int]], *, bucket: int, buckets: int) -> pa.Table:
    """The counts of the pairs of some of the shards."""
    parts = []
    for path, rows in files:
        left = rows
        for batch in pq.ParquetFile(path).iter_batches(columns=_BY):
            table = pa.Table.from_batches([batch[:left]])
            left -= len(table)
            for name in ("shard", "text"):
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, table[name].cast(pa.string()))
            if buckets > 1:
                table = table.filter(_in_bucket(table["shard"], bucket, buckets))
            parts.append(table.group_by(_BY).aggregate([([], "count_all")]))
    summed = pa.concat_tables(parts).group_by(_BY).aggregate([("count_all", "sum")])
    summed = summed.sort_by([(name, "ascending") for name in ("shard", "index", "text")])
    pair = pc.binary_join_element_wise(summed["key"], summed["text"], "_")
    columns = [pair, *(summed[name] for name in _BY), summed["count_all_sum"]]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True))).cast(SCHEMA)


def _in_bucket(shards: pa.ChunkedArray, bucket: int, buckets: int) -> pa.ChunkedArray:
    names = shards.unique().to_pylist()
    mine = [name for name in names if zlib.crc32(name.encode()) % buckets == bucket]
    return pc.is_in(shards, pa.array(mine, pa.string()))


def write(
    pairs: Annotated[Path, tyro.conf.Positional],
    *,
    out: Path,
    least: int = 1,
    repeat: bool = False,
    samples_per_shard: int = MOST_SAMPLES,
) -> int:
    """Write the pairs of a table as tars: the image, the one text that was chosen, how often.

    Args:
        pairs: what the command count wrote.
        out: folder for 00000.tar and on; new or empty.
        least: leave out pairs that were trained on less often.
        repeat: write every pair as often as it was trained on, so that an epoch has them so often.
        samples_per_shard: samples in each tar but the last; at most 10,000.
    """
    if least < 1:
        raise InputError(f"--least is {least}, must be at least 1")
    table, fields = _open(pairs)
    new_folder(out, samples_per_shard=samples_per_shard)
    damage: Counter[str] = Counter()
    samples = _samples(table, fields, least=least, repeat=repeat, damage=damage)
    written, shards = write_tars(out, samples, samples_per_shard=samples_per_shard)
    left_out = ", ".join(f"{kind} {number:,}" for kind, number in sorted(damage.items()))
    sys.stdout.write(
        f"wrote {written:,} pairs in {shards:,} shards to {out}; left out: {left_out or 'none'}\n"
    )
    return 1 if damage else 0


def relevant(run: Annotated[Path, tyro.conf.Positional]) -> int:
    """Say what share of the pairs that a run trained on are relevant, where their samples say it.

    As those of frugal.common.scenes do, whose JSON has ``relevant``. The share is kept in
    evaluation/curation.json of the run.

    Args:
        run: a run directory.
    """
    out = run / "relevant.parquet"
    total, _ = count_pairs(run, out)
    table, fields = _open(out)
    chosen = Counter[bool]()
    reader, opened = None, ""
    for row in (row for batch in table.iter_batches() for row in batch.to_pylist()):
        if reader is None or row["shard"] != opened:
            opened, reader = row["shard"], _tar(Path(row["shard"]), fields, reader)
        chosen[_is_relevant(reader, row)] += row["times"]
    if reader is not None:
        reader.close()
    share = chosen[True] / total
    write_json(run / "evaluation" / "curation.json", {"curation_precision": share})
    sys.stdout.write(f"{share:.1%} of {total:,} pairs trained on are relevant\n")
    return 0


def _tar(path: Path, fields: Fields, before: TarReader | None) -> TarReader:
    """The reader of another shard."""
    if before is not None:
        before.close()
    reader = _open_shard(path, fields)
    if not isinstance(reader, TarReader):
        raise InputError(f"{path} is no tar, whose samples may say that they are relevant")
    return reader


def _is_relevant(reader: TarReader, row: dict[str, Any]) -> bool:
    member = reader.members(row["index"]).get("json")
    try:
        about = {} if member is None else parse_json(reader.content(member))
    except ValueError:
        about = {}
    if not isinstance(about, dict) or not isinstance(about.get("relevant"), bool):
        raise InputError(
            f"sample {row['key']} of {row['shard']} does not say whether it is relevant; only data "
            "that were drawn by frugal.common.scenes do"
        )
    return about["relevant"]


def _open(path: Path) -> tuple[pq.ParquetFile, Fields]:
    try:
        file = pq.ParquetFile(path)
        described = parse_json((file.schema_arrow.metadata or {})[_ABOUT])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no table of pairs ({reason_of(error)}); make one with `python -m "
            "frugal.cit.trained_pairs count RUN`"
        ) from None
    return file, from_json(described, source=str(path))


def _samples(
    table: pq.ParquetFile, fields: Fields, *, least: int, repeat: bool, damage: Counter[str]
) -> Iterator[NewSample]:
    """Every pair that can be read; counts the others."""
    opened, reader = "", None
    for batch in table.iter_batches(batch_size=4_096):
        for row in batch.to_pylist():
            if row["times"] < least:
                continue
            if reader is None or row["shard"] != opened:
                if reader is not None:
                    reader.close()
                opened, reader = row["shard"], _open_shard(Path(row["shard"]), fields)
            try:
                sample = _sample(reader, row, fields)
            except Damaged as damaged:
                damage[damaged.kind] += 1
                continue
            for _ in range(row["times"] if repeat else 1):
                yield sample


def _open_shard(path: Path, fields: Fields) -> Reader:
    if not path.exists():
        raise InputError(f"the pairs lie in {path}, which does not exist any more; restore it")
    return open_indexed(path, fields)[0].open(fields)


def _sample(reader: Reader, row: dict[str, Any], fields: Fields) -> NewSample:
    raw = reader.read(row["index"])
    names = [name.removeprefix("json.") for name in fields.caption]
    place = names.index(row["text"]) if fields.separate else int(row["text"][len("caption") :])
    if reader.key(row["index"]).rpartition("/")[2] != row["key"].rpartition("/")[2]:
        raise Damaged("checksum", "the shard holds other samples than it did")
    if place >= len(raw.captions) or not raw.captions[place].strip():
        raise Damaged("no caption")
    one = type(raw)(raw.image, [raw.captions[place]], raw.label)
    source = f"{row['shard']}/{row['key']}"
    about = {name: row[name] for name in ("pair", "text", "times")}
    return as_new_sample(one, source=source, **about)


def main() -> None:
    """The body of ``python -m frugal.cit.trained_pairs``."""
    commands: dict[str, Callable[..., int]] = {"count": count, "relevant": relevant, "write": write}

    def command() -> None:
        code = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=command_words(),
            prog="python -m frugal.cit.trained_pairs",
            sort_subcommands=False,
        )
        if code:
            sys.exit(code)

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
