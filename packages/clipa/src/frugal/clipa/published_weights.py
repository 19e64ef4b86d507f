"""CLIPA's published weights under our names: PyTorch files in open_clip's layout, JAX npz files.

A PyTorch file is a state of open_clip's ``CLIP``, alone or as ``state_dict`` of a training
checkpoint. An npz file holds the slash-joined paths of big_vision's two towers, alone or in a
train state under ``params/`` (``opt/target/`` in old ones); bfloat16 stands in it as two raw bytes.
What neither says is the number of heads (PyTorch) or the image size (npz, whose position table is
computed).
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_swelling
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.flax_names import flax_blocks, flax_norm
from frugal.common.models.torch_files import load_torch
from frugal.common.models.weight_names import OPEN_CLIP, Rule, State, read_names
from frugal.common.weights.files import (
    part_with,
    state_in,
    why_no_safetensors,
    why_unreadable,
)

# ------------------------------------------------------------------------------------------------
# JAX


def _tower(ours: str, theirs: str) -> list[Rule]:
    return [
        *flax_blocks(ours, f"{theirs}/Transformer/encoderblock_{{i}}"),
        *flax_norm(f"{ours}.norm", f"{theirs}/encoder_norm"),
        Rule(f"{ours}.projection.weight", f"{theirs}/head/kernel", "transposed"),
    ]


_BIG_VISION = (
    Rule("image.patch_embed.weight", "img/embedding/kernel"),
    Rule("image.cls_token", "img/cls"),
    *_tower("image", "img"),
    Rule("text.token_embedding.weight", "txt/Embed_0/embedding"),
    Rule("text.pos_embed", "txt/pos_embedding"),
    *_tower("text", "txt"),
    Rule("logit_scale", "t", "scalar"),
)


def from_big_vision(params: Mapping[str, Tensor]) -> State:
    """Parameters of big_vision's two towers, or some of them, under our names.

    Args:
        params: tensors by slash-joined path, without a prefix.

    Raises:
        InputError: if it is another kind of model.
    """
    flat = {name: _without_heads(name, tensor) for name, tensor in params.items()}
    return read_names(flat, _BIG_VISION, source="the CLIPA npz")


def _without_heads(name: str, tensor: Tensor) -> Tensor:
    """Attention as matrices, with the heads one after another, and the patch kernel as ours."""
    if name == "img/embedding/kernel":  # (p, p, 3, D) to (D, 3, p, p) to (D, P)
        return tensor.permute(3, 2, 0, 1).flatten(1)
    if name.endswith("Attention_0/out/kernel"):  # (H, C, D) to (D, D)
        return tensor.flatten(0, -2)
    if re.search(r"Attention_0/(query|key|value)/kernel$", name):  # (D, H, C) to (D, D)
        return tensor.flatten(1)
    if re.search(r"Attention_0/(query|key|value)/bias$", name):  # (H, C) to (D,)
        return tensor.flatten()
    return tensor


# ------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Published:
    """The weights of a file, under our names."""

    state: State
    """float32. The image's position table is in it where the file has one, fixed or learned."""
    heads: tuple[int, int] | None
    """Of the image and the text tower, where the file says."""


def read_published(path: Path) -> Published:
    """The weights of a published file, or of the folder that holds it.

    Each tensor is converted alone, so that little more than the result is ever in memory.

    Raises:
        InputError: if there is no such file, it is damaged, or it is another kind of model.
    """
    file = _weight_file(path)
    if file.suffix == ".npz":
        return _read_npz(file)
    weights = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
    state: State = {}
    for names in _groups(weights.names):
        theirs = {_open_clip_name(name): weights.read(name) for name in names}
        state |= read_names(theirs, OPEN_CLIP, source=str(file))
    state = {name: tensor.float() for name, tensor in state.items()}
    refuse_not_finite(state, source=str(file))
    return Published(state, heads=None)


_PREFERRED = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
              "open_clip_pytorch_model.bin")  # fmt: skip


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    endings = {".npz", ".safetensors", ".bin", ".pt", ".pth"}
    found = sorted(file for file in path.iterdir() if file.suffix in endings)
    preferred = [path / name for name in _PREFERRED if path / name in found]
    if len(found) != 1 and not preferred:
        names = ", ".join(file.name for file in found) or "no weights"
        raise InputError(f"{path} holds {names}; give the file to convert")
    return (preferred or found)[0]


@dataclass(frozen=True)
class _Weights:
    names: list[str]
    read: Callable[[str], Tensor]


def _open_safetensors(path: Path) -> _Weights:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = why_no_safetensors(path, error)
        raise InputError(f"{path} cannot be read as safetensors: {reason}") from None
    return _Weights(list(file.keys()), file.get_tensor)


def _open_torch(path: Path) -> _Weights:
    try:
        content = load_torch(path, mapped=True)
    except Exception as error:  # noqa: BLE001 - torch.load raises errors of every kind
        reason = why_unreadable(path, error)
        raise InputError(
            f"{path} cannot be read as a PyTorch file of plain tensors: {reason}"
        ) from None
    tensors = part_with(state_in(content, source=str(path)), "logit_scale", source=path)
    return _Weights(list(tensors), tensors.__getitem__)


def _open_clip_name(name: str) -> str:
    """A name of open_clip's ``CLIP``: without what data parallelism and compilation put in front.

    ``CustomTextCLIP`` keeps the text tower in a module of its own; here it has none.
    """
    for prefix in ("module.", "_orig_mod.", "text."):
        name = name.removeprefix(prefix)
    return name


def _groups(names: Iterable[str]) -> Iterable[list[str]]:
    """Names of one block, or of what is no block, at a time: what belongs together stays so."""

    def block(name: str) -> str:
        found = re.match(r".*(resblocks\.|encoderblock_)\d+", name)
        return found[0] if found else ""

    for _, group in groupby(sorted(names, key=block), key=block):
        yield list(group)


def _read_npz(path: Path) -> Published:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        assert archive.zip is not None
        refuse_swelling(archive.zip, path.stat().st_size)
        members = _parameters(archive.files)
        heads = {}
        state: State = {}
        for names in _groups(members):
            arrays = {name: _tensor(archive[members[name]]) for name in names}
            for name, tensor in arrays.items():
                if name.endswith("encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"):
                    heads[name.partition("/")[0]] = tensor.shape[1]
            state |= from_big_vision(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = reason_of(error)
        raise InputError(f"{path} cannot be read as an npz of arrays: {reason}") from None
    refuse_not_finite(state, source=str(path))
    return Published(state, heads=(heads["img"], heads["txt"]) if len(heads) == 2 else None)


def _parameters(members: Iterable[str]) -> dict[str, str]:
    """Members of an npz by the name of the parameter; optimizer and clock are left."""
    members = list(members)
    for prefix in ("params/", "opt/target/"):
        found = {m.removeprefix(prefix): m for m in members if m.startswith(prefix)}
        if found:
            return found
    return {m: m for m in members if not m.startswith(("opt/", "chrono/"))}


def _tensor(array: np.ndarray) -> Tensor:
    """An array in float32; two raw bytes are bfloat16, which NumPy does not know."""
    if not isinstance(array, np.ndarray):  # a member of the archive that is none
        raise ValueError("it holds something else than arrays")
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array).float()
