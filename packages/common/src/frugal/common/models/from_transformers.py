"""Models of transformers with their weights: what does not fit, or is left, is said here."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from frugal.common.errors import InputError
from frugal.common.files import read_json_object, reason_of
from frugal.common.models.finite import quantized, refuse_not_finite
from frugal.common.models.fit import refuse_larger
from frugal.common.models.in_words import some
from frugal.common.models.torch_files import load_torch
from frugal.common.quiet_transformers import quietly

_LOG = logging.getLogger("frugal")
_WHOLE_NUMBERS = ("I8", "U8")
"""What safetensors calls numbers of eight bits, which no table of places has."""


def load_model(name: Path | str, *, config: Any = None, way_out: str) -> tuple[Any, list[str]]:
    """The model that ``AutoModel`` makes of a folder or name, in float32; no code in it is run.

    Args:
        name: the folder, or a name on the hub.
        config: what differs from its config.json.
        way_out: what to do where its weights cannot be read.

    Returns:
        The model, and the names of weights that it did not find and made up.

    Raises:
        InputError: if they cannot be read, are of other shapes, quantized or not finite.
    """
    from transformers import AutoModel

    _refuse_whole_numbers(Path(name))
    _refuse_larger(Path(name))
    given = {} if config is None else {"config": config}
    try:
        with quietly(), torch.random.fork_rng(devices=[]):
            model, report = AutoModel.from_pretrained(
                name,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named
                **given,
            )
    except Exception as error:  # noqa: BLE001 - files raise errors of every kind
        if config is not None:
            _refuse_unbuildable(config, Path(name))
        raise InputError(
            f"the weights of {name} cannot be loaded: {reason_of(error)}; {way_out}"
        ) from None
    if wrong := sorted(report["mismatched_keys"]):
        shapes = [f"{n} has the shape {tuple(a)} there and {tuple(b)} here" for n, a, b in wrong]
        raise InputError(
            f"the weights of {name} are not of the model its config.json describes: "
            f"{some(shapes, most=2)}"
        )
    if left := sorted(report["unexpected_keys"]):
        _LOG.warning(
            "of the weights of %s %s have no place in a %s and are left: %s",
            name, f"{len(left):,}", model.config.model_type, some(left),
        )  # fmt: skip
    refuse_not_finite(model.state_dict(), source=str(name))
    return model, sorted(map(str, report["missing_keys"]))


def _refuse_larger(folder: Path) -> None:
    """Refuse a folder whose config.json describes more than its weights hold, before it is built.

    Raises:
        InputError: naming the setting, or if config.json cannot be read.
    """
    parts = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not (folder / "config.json").is_file() or not parts:
        return
    shapes = []
    for path in parts:
        try:
            shapes += _shapes(path)
        except Exception:  # noqa: BLE001 - said by whoever reads it
            return
    refuse_larger(
        read_json_object(folder / "config.json"),
        tensors=len(shapes),
        numbers=sum(map(math.prod, shapes)),
        source=folder / "config.json",
    )


def _shapes(path: Path) -> list[Sequence[int]]:
    """Of every tensor of a file, whose numbers stay on the disk."""
    if path.suffix == ".bin":
        content = load_torch(path, mapped=True)
        return [tensor.shape for tensor in content.values() if isinstance(tensor, torch.Tensor)]
    with safe_open(path, framework="pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118


def _refuse_unbuildable(config: Any, folder: Path) -> None:
    """Say that it is the settings, where no model can be made of them."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises of all kinds
        raise no_model_of_transformers(folder, error) from None


def no_model_of_transformers(folder: Path, error: Exception) -> InputError:
    """What is told of settings that transformers makes no model of."""
    reason = reason_of(error, last_line=True)
    return InputError(
        f"the config.json of {folder} describes no model of transformers ({reason}); copy it again "
        "(models that bring their own code are not run)"
    )


def _refuse_whole_numbers(folder: Path) -> None:
    """Refuse quantized weights, which transformers would take for weights without their scale."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if file.get_slice(name).get_dtype() in _WHOLE_NUMBERS:
                        raise quantized(name, "of whole numbers", source=str(folder))
        except (OSError, SafetensorError):
            continue  # said by whoever reads it
