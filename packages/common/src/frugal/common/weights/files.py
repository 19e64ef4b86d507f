"""Files of tensors that others wrote, read without running anything that stands in them.

A file may hold several sets of weights: plain and averaged ones, a teacher and a student, a base
and a momentum encoder. One is taken; which one, and what is left, is always said.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.files import SwellingError, read_json_object, reason_of
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.in_words import some
from frugal.common.models.torch_files import load_torch
from frugal.common.weights.torchscript import is_torchscript, read_torchscript

State = dict[str, Tensor]

_LOG = logging.getLogger("frugal")
_SCALAR, _RECONSTRUCT = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    np.dtypes.UInt32DType,
]
"""What training scripts put beside tensors, and what does nothing when it is made: settings, paths,
numbers and arrays of NumPy."""
_NESTS = ("model", "state_dict", "model_state_dict")
"""Keys under which the weights of a model usually stand, in the order in which they are taken."""
_NO_WEIGHTS = (
    "optimizer", "optimiser", "optimizers", "optimizer_states", "optimizer_state_dict", "scaler",
    "scheduler", "lr_scheduler", "lr_schedulers", "amp", "loss_scaler", "callbacks", "loops",
)  # fmt: skip
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What data parallelism, compilation and checkpointing put into names."""
_BOOKKEEPING = ("attn_mask", "n_averaged")
"""Last parts of names that are no weights: masks that are computed, counts of averages."""
_BASES = ("base_encoder", "encoder_q", "student", "model", "clip_model", "backbone", "encoder")
"""In front of names: which of several models in one set is taken unless another is asked for."""
_INDEX = ".index.json"
"""Behind the name of a file of weights that lies in parts."""
_MOST_SETS = 10_000
FLAG = "--weights-key"


def read_content(path: Path, *, mapped: bool = False) -> Any:
    """What a safetensors or PyTorch file holds; of a TorchScript archive its state.

    Args:
        path: the file, or the index (``*.index.json``) of one in parts.
        mapped: leave the tensors of a PyTorch file on disk until they are used.

    Raises:
        InputError: if it cannot be read, or holds more than tensors and plain values.
    """
    check_whole(path)
    if path.name.endswith(_INDEX):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read as safetensors: {why_no_safetensors(path, error)}"
            ) from None
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return load_torch(path, mapped=mapped)
    except Exception as error:  # noqa: BLE001 - torch.load raises errors of every kind
        raise InputError(
            f"{path} cannot be read as a PyTorch file of tensors and plain values: "
            f"{why_unreadable(path, error)}"
        ) from None


def check_whole(path: Path) -> None:
    """See that a file is there, all parts of an index too, and that none is a pointer of Git LFS.

    Raises:
        InputError: naming what is not.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path")
    is_index = path.name.endswith(_INDEX)
    parts = _parts(path, _places(path)) if is_index else [path]
    for part in parts:
        with part.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise InputError(
                    f"{part} is a pointer of Git LFS that stands for the file; fetch the file "
                    "itself with git lfs pull"
                )


_POINTER = b"version https://git-lfs"


def why_no_safetensors(path: Path, error: Exception) -> str:
    """Why a file was not read as safetensors, and what to do."""
    if zipfile.is_zipfile(path):
        return "it is a PyTorch file by its content; call it .pt"
    if isinstance(error, OSError):
        return reason_of(error)
    return "its header is damaged, or it is cut short; copy it again"


def why_unreadable(path: Path, error: Exception) -> str:
    """Why torch did not read a file of tensors, and what to do."""
    named = re.search(r"(?:GLOBAL|global:?|Unsupported class)\s+([A-Za-z_][\w.]*\.\w+)", str(error))
    if named:
        return (
            f"it holds an object of {named[1]}, whose code would have to be run; save the weights "
            "alone, torch.save(model.state_dict(), FILE), where that code is installed"
        )
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty; copy it again"
    if isinstance(error, SwellingError):
        return reason_of(error)
    if isinstance(error, zipfile.BadZipFile):
        return "it is cut short or altered; copy it again"
    if _is_safetensors(path):
        return "it is a safetensors file by its content; call it .safetensors"
    if "legacy .tar" in str(error):
        return "it was saved before torch 0.4; save it again with a newer torch"
    if isinstance(error, RuntimeError) and "zip archive" in str(error):
        return "it is cut short or altered; copy it again"
    if isinstance(error, OSError):
        return reason_of(error)
    return "it is none, or is cut short; copy it again"


def _is_safetensors(path: Path) -> bool:
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt"):
        return True
    return False


def _places(index: Path) -> dict[str, Any]:
    """The part of every tensor by its name, as an index says."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map, so that it is no index of weights")
    return places


def _parts(index: Path, places: Mapping[str, Any]) -> list[Path]:
    """The files of an index, all of which are there."""
    parts = sorted({str(part) for part in places.values()})
    if odd := [part for part in parts if Path(part).name != part or part.endswith(_INDEX)]:
        raise InputError(f"{index} names {odd[0]!r}, which is no file of weights beside it")
    if missing := [part for part in parts if not (index.parent / part).is_file()]:
        raise InputError(
            f"{index} names {len(parts)} files, of which {len(missing)} are missing, the first "
            f"{missing[0]}; copy them too"
        )
    return [index.parent / part for part in parts]


def _read_parts(index: Path) -> State:
    """The tensors of all parts that an index names.

    Raises:
        InputError: if a part is missing, or does not hold what the index says.
    """
    places = _places(index)
    state: State = {}
    for part in _parts(index, places):
        state |= read_content(part)
    if lost := sorted(places.keys() - state.keys()):
        raise InputError(
            f"the files of {index} lack {some(lost)}, which it says they hold; copy them again"
        )
    return state


def read_weights(path: Path, *, key: str | None = None) -> State:
    """The tensors of a file by name: safetensors, a torch checkpoint, or TorchScript.

    Args:
        path: the file, or the index of one in parts.
        key: which of several sets of weights, as :data:`FLAG` gives it.

    Raises:
        InputError: if the file is missing, truncated, or holds no such tensors.
    """
    return state_in(read_content(path), source=str(path), key=key)


def weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The file of weights in a folder, by the first of its usual names; or the index of its parts.

    Raises:
        InputError: if there is none.
    """
    files = [
        path
        for name in names
        for path in (folder / name, folder / f"{name}{_INDEX}")
        if path.is_file()
    ]
    if not files:
        raise InputError(f"the folder {folder} holds none of {', '.join(names)}")
    if len(files) > 1:
        _LOG.warning(
            "%s holds several files of weights: %s is taken, %s left; keep the one that is meant",
            folder, files[0].name, ", ".join(path.name for path in files[1:]),
        )  # fmt: skip
    return files[0]


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def state_in(content: Any, *, source: str, key: str | None = None) -> State:
    """The named tensors in the content of a file: bare, or nested under a usual name.

    Args:
        content: what :func:`read_content` gives.
        source: for messages.
        key: which of several sets of weights: the keys that lead to it, joined by dots, or what
            stands in front of its names.

    Raises:
        InputError: if there are none, there is no such set, several could be meant, or a number
            is not finite.
    """
    sets = dict(_sets(content, "", source, itertools.count()))
    if not sets:
        raise InputError(
            f"{source} holds no state_dict{_held(content)}; give the weights of a model"
        )
    chosen = _chosen(sets, source, key)
    state = _bare(sets[chosen], source)
    if key is not None and chosen != key:
        state = without_prefix(state, f"{_inside(key, chosen)}.")
    refuse_not_finite(state, source=source)
    return state


def _held(content: Any) -> str:
    """What a file without tensors by name holds instead, to follow what it lacks."""
    if not isinstance(content, Mapping):
        return ""
    if not content:
        return ", but nothing at all"
    arrays = any(isinstance(value, np.ndarray) for value in content.values())
    kind = "arrays of NumPy and no tensors: " if arrays else ""
    return f"; it holds {kind}{some(list(map(str, content)))}"


def _sets(
    content: Any, path: str, source: str, met: Iterator[int]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping of names to weights, by the keys that lead to it; ``met`` counts all."""
    if not isinstance(content, Mapping):
        return
    # a small file may hold one mapping a thousand times in another, and that one too
    if next(met) > _MOST_SETS:
        raise InputError(
            f"{source} holds more than {_MOST_SETS:,} mappings inside one another; save the "
            "weights of a model alone"
        )
    if path.count(".") > 2:
        return
    tensors = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    if any(tensor.ndim for tensor in tensors.values()):
        yield path, tensors
    for name, part in content.items():
        if isinstance(name, str) and name not in _NO_WEIGHTS:
            yield from _sets(part, f"{path}.{name}" if path else name, source, met)


def _chosen(sets: Mapping[str, Mapping[str, Any]], source: str, key: str | None) -> str:
    """The path of the set that is meant; says what is left."""
    usual = [path for path in sets if all(part in ("", *_NESTS) for part in path.split("."))]
    usual.sort(key=lambda path: [_rank(part) for part in path.split(".")])
    taken = key
    if key is not None and key not in sets:
        with_prefix = [
            p for p in (*usual, *sets) if any(_within(_inside(key, p), n) for n in sets[p])
        ]
        if not with_prefix:
            raise InputError(
                f"{source} holds no weights under {key!r}; there are {some(_keys(sets))}"
            )
        return with_prefix[0]
    if taken is None and (usual or len(sets) == 1):
        taken = (usual or list(sets))[0]
    if taken is None:
        raise InputError(
            f"{source} holds no state_dict of a usual name, but several others: "
            f"{', '.join(sets)}; {_choose(next(iter(sets)))}"
        )
    others = [path for path in sets if path not in ("", taken)]
    if others and key is None:
        _LOG.warning(
            "%s holds several sets of weights: %s is taken, %s left; %s",
            source, taken or "what stands in no set", ", ".join(others), _choose(others[0]),
        )  # fmt: skip
    elif taken not in usual and key is None:
        _LOG.info("%s holds weights under %s", source, taken)
    return taken


def _rank(part: str) -> int:
    """Of a key among the usual ones; what is not nested at all comes last."""
    return _NESTS.index(part) if part in _NESTS else len(_NESTS)


def _inside(key: str, path: str) -> str:
    """What stands in front of names in a set, where a key leads to the set too."""
    return _clean(key.removeprefix(f"{path}.") if path else key)


def _within(prefix: str, name: str) -> bool:
    return _clean(name).startswith(f"{prefix}.")


def _keys(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    fronts = {_clean(name).partition(".")[0] for names in sets.values() for name in names}
    return [*(path for path in sets if path), *sorted(fronts)]


def _choose(other: str) -> str:
    return (
        f"python -m frugal.common.import_weights and evaluate take another with {FLAG} {other}, "
        "and training starts from what is imported"
    )


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _bare(tensors: Mapping[str, Tensor], source: str) -> State:
    """The tensors without what wrappers put into their names, and without what is no weight."""
    state: State = {}
    for name, tensor in tensors.items():
        clean = _clean(name)
        if clean in state:
            raise InputError(
                f"{source} holds {clean} twice, once under the name {name}; save one of them alone"
            )
        is_plain = tensor.layout == torch.strided  # others are refused by name later
        if is_plain and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{source} says that {clean} has {tensor.numel():,} numbers, but holds fewer; copy "
                "it again"
            )
        if clean.rpartition(".")[2] not in _BOOKKEEPING:
            state[clean] = tensor
    return state


def part_with(state: State, landmark: str, *, source: str | Path) -> State:
    """The tensors of the one model in a set that has a tensor of this name, by their bare names.

    Whole models keep a tower under ``model.``, ``clip_model.``, ``backbone.`` or ``encoder.``;
    training codes keep two towers of one kind side by side.

    Args:
        state: what :func:`state_in` gives.
        landmark: a name that every such model has.
        source: for messages.

    Returns:
        ``state`` itself where no name ends so, or the landmark stands there as it is.

    Raises:
        InputError: if several models have it and none of them is the usual one.
    """
    if landmark in state:
        return state
    fronts = [n.removesuffix(f".{landmark}") for n in state if n.endswith(f".{landmark}")]
    if not fronts:
        return state
    usual = [front for front in _BASES if front in fronts]
    if len(fronts) > 1 and not usual:
        raise InputError(
            f"{source} holds several models: {', '.join(fronts)}; {_choose(fronts[0])}"
        )
    taken = usual[0] if len(fronts) > 1 else fronts[0]
    inner = without_prefix(state, f"{taken}.")
    if others := [front for front in fronts if front != taken]:
        _LOG.warning(
            "%s holds several models: %s is taken, %s left; %s",
            source, taken, ", ".join(others), _choose(others[0]),
        )  # fmt: skip
    if len(inner) < len(state):
        left = sorted({n.partition(".")[0] for n in state if not n.startswith(f"{taken}.")})
        _LOG.info("of %s what stands under %s is taken; left are %s", source, taken, some(left))
    return inner
