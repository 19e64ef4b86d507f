"""Writes t5x checkpoints in every style that is found: with the msgpack package, gzip and numpy.

Made from a description of the layout, without a look at how it is read.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

Chunks = Callable[[tuple[int, ...]], tuple[int, ...]]


def whole(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One chunk."""
    return shape


def sides_of(*sides: int) -> Chunks:
    """Chunks of at most these sides, over and over: 5 of 12 leaves a ragged edge of 2."""
    return lambda shape: tuple(
        min(length, side) for length, side in zip(shape, itertools.cycle(sides), strict=False)
    )


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a checkpoint is written."""

    driver: str = "file"
    path_on_top: bool = False
    path_prefix: str = ""
    chunks: Chunks = whole
    compressor: str | None = "gzip"
    separator: str | None = "."
    order: str = "C"
    dtype: str = "<f4"
    fill_value: Any = None
    leave_out_zeros: bool = False
    inline: Callable[[str], bool] = field(default=lambda name: False)
    chunked_from: int | None = None
    """Inline arrays of more values are split into pieces of this many."""
    raw_as_text: bool = False
    """As flax wrote arrays before msgpack had bytes."""


def truncate_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values, as uint16."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2")


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as a file holds them."""
    return truncate_to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def decode(values: np.ndarray, dtype: str) -> np.ndarray:
    """What a file of that dtype says of float32 values, as float32."""
    if dtype == "bfloat16":
        return (truncate_to_bfloat16(values).astype("<u4") << 16).view("<f4")
    return values.astype(dtype).astype("<f4")


def array_extension(values: Any, *, style: Style | None = None, code: int = 1) -> msgpack.ExtType:
    """Flax's extension for an array (1) or a numpy scalar (3)."""
    style = style or Style()
    values = np.asarray(values)
    name = values.dtype.name
    if style.dtype != "<f4" and values.dtype == np.float32:
        name = style.dtype if style.dtype == "bfloat16" else np.dtype(style.dtype).name
        values = encode(values, style.dtype)
    raw = values.tobytes("C")
    packed = [list(values.shape), name, raw]
    return msgpack.ExtType(code, msgpack.packb(packed, use_bin_type=not style.raw_as_text))


def _inline(values: np.ndarray, style: Style) -> Any:
    limit = style.chunked_from
    if limit is None or values.size <= limit:
        return array_extension(values, style=style)
    flat = values.reshape(-1)
    pieces = [flat[start : start + limit] for start in range(0, flat.size, limit)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): length for i, length in enumerate(values.shape)},
        "chunks": {str(i): array_extension(piece, style=style) for i, piece in enumerate(pieces)},
    }


def compress(raw: bytes, compressor: str | None) -> bytes:
    """The bytes of a chunk file."""
    if compressor is None:
        return raw
    return gzip.compress(raw, 1) if compressor == "gzip" else zlib.compress(raw, 1)


def write_array(folder: Path, values: np.ndarray, style: Style) -> tuple[int, ...]:
    """One zarr v2 array; the shape of its chunks."""
    folder.mkdir(parents=True)
    chunks = style.chunks(values.shape)
    described: dict[str, Any] = {
        "chunks": list(chunks),
        "compressor": None if style.compressor is None else {"id": style.compressor, "level": 1},
        "dtype": style.dtype,
        "fill_value": style.fill_value,
        "filters": None,
        "order": style.order,
        "shape": list(values.shape),
        "zarr_format": 2,
    }
    if style.separator is not None:
        described["dimension_separator"] = style.separator
    (folder / ".zarray").write_text(json.dumps(described))
    counts = [-(-length // chunk) for length, chunk in zip(values.shape, chunks, strict=True)]
    for place in itertools.product(*map(range, counts)):
        box = tuple(
            slice(n * chunk, (n + 1) * chunk) for n, chunk in zip(place, chunks, strict=True)
        )
        part = values[box]
        if style.leave_out_zeros and not part.any():
            continue
        block = np.full(chunks, 7.0, dtype=np.float32)  # what lies beyond an edge means nothing
        block[tuple(slice(0, n) for n in part.shape)] = part
        key = (style.separator or ".").join(map(str, place)) or "0"
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = encode(block, style.dtype).tobytes(order=style.order)
        file.write_bytes(compress(raw, style.compressor))
    return chunks


def _nest(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def write_checkpoint(
    folder: Path,
    params: Mapping[str, np.ndarray],
    *,
    step: int | None = 2,
    moments: Mapping[str, np.ndarray] | None = None,
    style: Style | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """One ``checkpoint_N`` folder, index and arrays; returns the folder.

    Args:
        folder: made anew.
        params: float32 by slash-joined path.
        step: in the index; None leaves the whole state out.
        moments: by path below ``param_states/0``.
        style: of everything.
        extra: put into the index as they are, by path below ``optimizer``.
    """
    style = style or Style()
    folder.mkdir(parents=True)
    optimizer: dict[str, Any] = {"target": {}}
    if step is not None:
        state: dict[str, Any] = {"step": array_extension(np.int32(step))}
        count = array_extension(np.int32(step), code=3)
        state["param_states"] = {"0": {"count": count}, "1": {"inner_state": {}}}
        optimizer["state"] = state
    named = {f"target/{name}": values for name, values in params.items()}
    named |= {f"state/param_states/0/{name}": v for name, v in (moments or {}).items()}
    for name, values in named.items():
        if style.inline(name):
            _nest(optimizer, name, _inline(values, style))
            continue
        below = name.replace("/", ".")
        chunks = write_array(folder / below, values, style)
        path = f"{style.path_prefix}{below}/"
        store: dict[str, Any] = {"driver": style.driver}
        if style.driver == "gcs":
            store["bucket"] = "t5x-dummy-bucket"
        leaf: dict[str, Any] = {
            "driver": "zarr",
            "dtype": "float32",
            "kvstore": store,
            "metadata": {
                "shape": list(values.shape),
                "chunks": list(chunks),
                "compressor": {"id": "gzip", "level": 1},
            },
        }
        (leaf if style.path_on_top else store)["path"] = path
        _nest(optimizer, name, leaf)
    for name, value in (extra or {}).items():
        _nest(optimizer, name, value)
    index = msgpack.packb({"version": 3, "optimizer": optimizer}, strict_types=True)
    (folder / "checkpoint").write_bytes(index)
    return folder


def zip_folder(folder: Path, archive: Path) -> Path:
    """The content of a folder as a zip file."""
    return Path(shutil.make_archive(str(archive.with_suffix("")), "zip", folder))
