"""What a number was measured with: data, weights, how they compute, versions of what computed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frugal.common.data.stored_images import IMAGE, digest_of, num_repeated
from frugal.common.distributed import Ranks
from frugal.common.models.bundle import ImageSpec, ModelBundle
from frugal.common.recipe_json import to_json

_PACKAGES = (
    "frugal-common", "torch", "torchvision", "transformers", "open_clip_torch", "timm", "numpy",
    "pillow",
)  # fmt: skip


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a model's weights and buffers.

    Equal weights have equal digests wherever they were loaded from.
    """
    return _digest(model.state_dict())


def _digest(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def tower_digest(tower: nn.Module, image: ImageSpec | None = None) -> str:
    """As :func:`weights_digest`, of a tower without its projection, and of the images it takes.

    Tables that are computed count as well. What else decides about what weights compute (heads,
    activations, poolings) is compared wherever weights are taken, and is left to that.

    Args:
        tower: of images or texts.
        image: what a tower of images takes.
    """
    whole = dict(tower.named_buffers()) | tower.state_dict()
    state = {n: t for n, t in whole.items() if not n.startswith("projection.")}
    if image is not None:
        told = (*image.height_width, *image.mean, *image.std)
        state["images"] = torch.tensor(told, dtype=torch.float64)
    return _digest(state)


def config_digest(bundle: ModelBundle) -> str:
    """SHA-256 of everything of a model that is no weight: two of equal weights compute alike.

    Its configuration (sizes, heads, activation, epsilon, pooling, positions, mean and
    standard deviation of images), what every module holds beside its weights, and the buffers that
    are computed and not stored.
    """
    config = _without_modules(to_json(bundle.config))
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=repr).encode())
    for name, module in bundle.model.named_modules():
        own = {n: _plain(v) for n, v in vars(module).items() if not n.startswith("_")}
        own.pop("training", None)
        words = [name, _kind(type(module)), sorted(own.items())]
        found.update(json.dumps(words).encode())
        for leaf in sorted(module._non_persistent_buffers_set):
            if (value := module._buffers[leaf]) is not None:
                found.update(f"{leaf}\0{tuple(value.shape)}\0".encode())
                found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def _without_modules(encoded: Any) -> Any:
    """Types by their names alone: where their code lies changes between versions."""
    if isinstance(encoded, dict):
        return {
            key: item.rpartition(".")[2] if key == "type" else _without_modules(item)
            for key, item in encoded.items()
        }
    return [_without_modules(item) for item in encoded] if isinstance(encoded, list) else encoded


def _kind(kind: Any) -> str:
    """The name of a class; of others' classes where they come from too."""
    is_own = kind.__module__.startswith("frugal.")
    return kind.__qualname__ if is_own else f"{kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    """A setting of a module, ready for JSON and alike in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return sorted((str(name), _plain(item)) for name, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_kind(type(value)), _plain(_fields(value))]
    if isinstance(value, functools.partial):
        return ["partial", _plain(value.func), _plain(value.args), _plain(value.keywords)]
    if hasattr(value, "to_dict"):  # a configuration of transformers
        return _plain(value.to_dict())
    if hasattr(value, "__qualname__"):
        return _kind(value)
    return _kind(type(value))


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, also where it has slots."""
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


@dataclasses.dataclass(frozen=True)
class DataIdentity:
    """Which samples were measured."""

    sha256: str
    """Of their bytes, labels and captions in their order, wherever they lie."""
    repeated: int
    """Images that are byte for byte as one before them."""
    contents: Tensor
    """(N, K) int64, see ``LabeledImages.contents``; complete on every process, on the CPU."""

    def common(self, other: DataIdentity) -> int:
        """Images that are byte for byte among the others."""
        mine, theirs = (each.contents[:, :IMAGE].numpy().tobytes() for each in (self, other))
        size = 8 * IMAGE
        known = {theirs[at : at + size] for at in range(0, len(theirs), size)}
        return sum(mine[at : at + size] in known for at in range(0, len(mine), size))

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        repeated = {"repeated_images": self.repeated} if self.repeated else {}
        return {"data_sha256": self.sha256, **repeated}

    def remark(self, name: str, log: logging.Logger) -> None:
        """Say once what makes numbers differ from what they seem to be."""
        if self.repeated:
            log.warning(
                "%s: %s of the %s images are there already under another name, byte for byte",
                name,
                f"{self.repeated:,}",
                f"{len(self.contents):,}",
            )


def identify(data: Any, ranks: Ranks, device: torch.device) -> DataIdentity:
    """Which samples a data set holds; every process must call this.

    What was evaluated is known from its evaluation; what was not is read now.
    """
    own = data.contents(ranks.rank, ranks.world_size)
    contents = ranks.sum(own.to(device)).cpu()
    return DataIdentity(digest_of(contents), num_repeated(contents), contents)


def versions() -> dict[str, str]:
    """Python's, and those of the packages that take part in an evaluation."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
