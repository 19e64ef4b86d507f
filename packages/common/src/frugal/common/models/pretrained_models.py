"""Models of timm and transformers: made, filled with their weights, pooled, and looked at."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.files import reason_of
from frugal.common.models.finite import refuse_not_finite
from frugal.common.models.from_transformers import load_model
from frugal.common.models.in_words import some
from frugal.common.models.torch_files import load_torch
from frugal.common.quiet_transformers import quietly

_LOG = logging.getLogger("frugal")


@functools.cache
def transformers_config(facts: str) -> Any:
    """The configuration that transformers makes of the facts.

    Raises:
        InputError: if it does not know such a model.
    """
    from transformers import AutoConfig

    about = json.loads(facts)
    settings = dict(about["config"])
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # noqa: BLE001 - every model checks its settings in its own way
        raise InputError(
            f"transformers cannot make the model of {about['name']}: {reason_of(error)}"
        ) from None


class Probe(NamedTuple):
    """What is found out about a model without computing a number."""

    width: int
    """Of the pooled vector."""
    unused: tuple[str, ...]
    """Parameters that the pooled vector does not depend on, which no training can move."""


def pool_image(model: Any, config: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) normalized pixels to (B, D)."""
    if config.library == "timm":
        return model(pixels).flatten(1)
    made = model(pixel_values=pixels)
    if config.pooling == "pooler":
        return _pooler(made, model, config, "first or mean").flatten(1)
    tokens = made.last_hidden_state
    if tokens.ndim == 4:  # (B, D, rows, columns)
        tokens = tokens.flatten(2).transpose(1, 2)
    return tokens[:, 0] if config.pooling == "first" else tokens.mean(1)


def pool_text(
    model: Any,
    config: Any,
    token_ids: Tensor,
    lengths: Tensor,
    more: dict[str, Tensor],
) -> Tensor:
    """(B, T) token ids of (B,) lengths to (B, D); the model gets ``more`` beside the ids."""
    made = model(input_ids=token_ids, **more)
    if config.pooling == "pooler":
        return _pooler(made, model, config, "first, last or mean")
    tokens = made.last_hidden_state  # (B, T, D)
    if config.pooling == "first":
        return tokens[:, 0]
    if config.pooling == "last":
        return tokens[torch.arange(len(tokens), device=tokens.device), lengths - 1]
    return (tokens * inside(token_ids, lengths)[:, :, None]).sum(1) / lengths[:, None]


def inside(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) bool: what is no padding."""
    return torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]


def _pooler(made: Any, model: nn.Module, config: Any, others: str) -> Tensor:
    pooled = getattr(made, "pooler_output", None)
    if pooled is None:
        part = config.part
        raise InputError(
            f"{config.name} is a {type(model).__name__}, which pools nothing itself; say what is "
            f"pooled with --model.{part}.pooling {others}"
        )
    return pooled


# ------------------------------------------------------------------------------------------------
# Making them


def make(config: Any) -> nn.Module:
    """The library's model with weights from torch's generator, on torch's default device.

    Raises:
        InputError: if the library cannot make it.
    """
    return _make_timm(config) if config.library == "timm" else _make_transformers(config)


def about_timm(name: str) -> dict[str, Any]:
    """What timm knows of an architecture.

    Raises:
        InputError: if there is none of that name.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise InputError(
            f"timm {timm.__version__} has no model {name!r}, and there is no such folder; "
            "timm.list_models() names them"
        )
    try:
        known = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"timm does not know the weights {name!r}: {reason_of(error)}") from None
    pixels = {} if known is None else {"mean": known.mean, "std": known.std}
    return {"architecture": name, "model_args": {}, **pixels}


def _make_timm(config: Any) -> nn.Module:
    import timm

    about = config.about
    options = {n: value for n, value in about["model_args"].items() if n != "num_classes"}
    if "img_size" in inspect.signature(_timm_class(about["architecture"]).__init__).parameters:
        options["img_size"] = config.image_size
    try:
        return timm.create_model(about["architecture"], pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = reason_of(error)
        raise InputError(f"timm cannot make {config.name}: {reason}") from None


def _timm_class(architecture: str) -> type[nn.Module]:
    import timm

    with torch.device("meta"):
        return type(timm.create_model(architecture, pretrained=False, num_classes=0))


def _make_transformers(config: Any) -> nn.Module:
    from transformers import AutoModel

    settings = _settings(config)
    try:
        with quietly():
            made = AutoModel.from_config(settings)
    except (ValueError, TypeError, ImportError) as error:
        reason = reason_of(error)
        raise InputError(f"transformers cannot make {config.name}: {reason}") from None
    return _tower_of(made, config)


def _settings(config: Any) -> Any:
    """A configuration of transformers with what the tower says differently.

    Raises:
        InputError: if the model takes no such images or captions.
    """
    settings = transformers_config(config.facts)
    if config.part == "image":
        size = getattr(settings, "image_size", config.image_size)
        sides = (size,) if isinstance(size, int) else tuple(size)
        if set(sides) != {config.image_size}:
            shown = "x".join(map(str, sides if len(set(sides)) > 1 else sides[:1]))
            raise InputError(
                f"{config.name} takes images of {shown} pixels, but model.image.image_size is "
                f"{config.image_size}; give --model.image.image-size {shown}"
            )
        return settings
    most = text_positions(settings)
    if most is not None and 0 < most < config.length:
        raise InputError(
            f"{config.name} has {most} positions, fewer than model.text.length = {config.length}; "
            f"give --model.text.length {most} or less"
        )
    if config.dropout is None:
        return settings
    changed = {
        name: config.dropout
        for name, value in settings.to_dict().items()
        if "drop" in name and isinstance(value, float) and not name.startswith("classifier")
    }
    return type(settings)(**{**settings.to_dict(), **changed})


_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")
"""Models whose first positions stand for padding."""


def text_positions(settings: Any) -> int | None:
    """Most tokens of a caption that a text model of transformers has positions for, if it says."""
    most = getattr(settings, "max_position_embeddings", None)
    if most is None or settings.model_type not in _FROM_PADDING:
        return most
    return most - (settings.pad_token_id + 1)


def _tower_of(made: Any, config: Any) -> nn.Module:
    """What of a model computes the pooled vector."""
    if getattr(made.config, "is_encoder_decoder", False):
        made = made.get_encoder()
    if config.pooling != "pooler" and getattr(made, "pooler", None) is not None:
        made.pooler = None
    return made


# ------------------------------------------------------------------------------------------------
# Their weights


def stored_state(config: Any) -> dict[str, Tensor]:
    """The weights that a tower's name or file stands for, by the library's names, in float32.

    Raises:
        InputError: if there are none, or they are of another model.
    """
    if config.library == "timm":
        return _stored_timm(config)
    part = config.part
    way_out = f"copy the folder again, or start at random with --model.{part}.no-pretrained"
    made, unfound = load_model(config.name, config=_settings(config), way_out=way_out)
    tower = _tower_of(made, config)
    needed = {id(tensor) for tensor in (*tower.parameters(), *tower.buffers())}
    missing = [name for name in unfound if _is_needed(made, name, needed)]
    if missing:
        hint = ""
        if all(name.startswith("pooler.") for name in missing):
            others = "first, last or mean" if part == "text" else "first or mean"
            hint = (
                ", which were never trained with a pooler: choose another pooling with "
                f"--model.{part}.pooling {others}, or"
            )
        raise InputError(
            f"the weights of {config.name} lack {some(missing)}{hint or ', so that they are of'} "
            "another model"
        )
    return tower.state_dict()


def _is_needed(made: nn.Module, name: str, needed: set[int]) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        return id(getattr(made.get_submodule(owner), leaf)) in needed
    except AttributeError:
        return False


_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")


def _stored_timm(config: Any) -> dict[str, Tensor]:
    import timm
    from timm.models import load_checkpoint

    if config.weights is not None and not config.weights.is_file():
        raise InputError(f"there is no file {config.weights}; check model.image.weights")
    file = config.weights
    if file is None and config.facts:
        found = [Path(config.name) / name for name in _TIMM_FILES]
        file = next((path for path in found if path.is_file()), None)
        if file is None:
            raise InputError(f"the folder {config.name} holds none of {', '.join(_TIMM_FILES)}")
    if file is not None:
        _tell_other_sets(file)
    model, missing, left = _make_timm(config), [], []
    try:
        if file is None:
            options: dict[str, Any] = {}
            if hasattr(model, "pos_embed"):
                options["img_size"] = config.image_size
            model = timm.create_model(config.name, pretrained=True, num_classes=0, **options)
        else:
            # the plain weights, as everywhere else; timm itself would prefer averaged ones
            found = load_checkpoint(
                model, str(file), use_ema=False, strict=False, weights_only=True
            )
            missing = list(getattr(found, "missing_keys", []))
            left = list(getattr(found, "unexpected_keys", []))
    except Exception as error:  # noqa: BLE001 - files and downloads raise errors of every kind
        reason = reason_of(error)
        raise InputError(
            f"the weights of {config.name} cannot be loaded{f' from {file}' if file else ''}: "
            f"{reason}"
        ) from None
    if missing:
        raise InputError(
            f"the weights in {file} lack {some(missing)}, so that they are not of {config.name}"
        )
    if left:
        _LOG.info("of %s what %s does not have is left: %s", file, config.name, some(left))
    refuse_not_finite(model.state_dict(), source=str(file or config.name))
    return model.state_dict()


def _tell_other_sets(file: Path) -> None:
    """Say which of several sets of weights timm takes: state_dict, then model, then what is bare.

    Raises:
        InputError: if the file holds more than tensors and plain values.
    """
    if file.suffix in (".safetensors", ".npz", ".npy"):
        return
    try:
        content = load_torch(file, mapped=True)  # so that no number is read twice
    except Exception:  # noqa: BLE001 - torch.load raises errors of every kind
        raise InputError(
            f"{file} cannot be read as a file of tensors and plain values alone; save its weights "
            "alone, torch.save(model.state_dict(), FILE)"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no weights by name; give the weights of a model")
    sets = [name for name, part in content.items() if _holds_weights(name, part)]
    taken = next((name for name in ("state_dict", "model") if name in content), None)
    if others := [name for name in sets if name != taken]:
        _LOG.warning(
            "%s holds several sets of weights: %s is taken, %s left; save the one that is meant "
            "alone to start from it", file, taken or "what stands in no set", ", ".join(others),
        )  # fmt: skip


def _holds_weights(name: Any, part: Any) -> bool:
    is_state = isinstance(part, dict) and any(isinstance(t, Tensor) for t in part.values())
    return is_state and "optim" not in str(name)


# ------------------------------------------------------------------------------------------------
# What is known without computing


@functools.cache
def probe(config: Any) -> Probe:
    """Width and unused parameters of a tower, found out on the meta device."""
    with torch.device("meta"), torch.enable_grad(), torch.inference_mode(False):
        model = make(config).eval()
        pooled = _pool_nothing(model, config, 4)
        pooled.sum().backward()
    unused = tuple(name for name, p in model.named_parameters() if p.grad is None)
    return Probe(pooled.shape[1], unused)


@functools.cache
def forward_flops(config: Any, seen: int) -> float:
    """Forward FLOPs of one image or of one caption of so many tokens."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        _pool_nothing(make(config).eval(), config, seen)
    return float(counter.get_total_flops())


def _pool_nothing(model: nn.Module, config: Any, tokens: int) -> Tensor:
    if config.part != "text":
        return pool_image(model, config, torch.zeros(1, 3, *config.height_width))
    length = min(tokens, config.length)
    token_ids = torch.zeros(1, length, dtype=torch.int64)
    # a mask would be looked at
    return pool_text(model, config, token_ids, torch.full((1,), length), {})
