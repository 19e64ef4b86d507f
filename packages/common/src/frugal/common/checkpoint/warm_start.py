"""Start a stage from the weights of another: same names, optimiser and counters afresh."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from frugal.common.checkpoint.store import Checkpoint, find_checkpoint
from frugal.common.errors import InputError

Resample = Callable[[str, Tensor, torch.Size], Tensor]
"""(parameter name, stored table, wanted shape) to a table of the wanted shape."""


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by name; their moving average where the run kept one."""
    read = checkpoint.reader()
    names = checkpoint.names()
    weights = {}
    for name in sorted(n.removeprefix("weight/") for n in names if n.startswith("weight/")):
        kind = "ema" if f"ema/{name}" in names else "weight"
        weights[name] = read(f"{kind}/{name}")
    for name in sorted(n.removeprefix("buffer/") for n in names if n.startswith("buffer/")):
        weights[name] = read(f"buffer/{name}")
    return weights


def warm_start(
    objective: nn.Module, source: Path, *, resample: Resample | None, log: logging.Logger
) -> None:
    """Copy the weights of a run or checkpoint into a model that was just built.

    Args:
        objective: what the new stage trains.
        source: a run directory, or one of its checkpoints.
        resample: brings a position table to another grid or length; None refuses that.
        log: told what was taken from where.

    Raises:
        InputError: if names or shapes do not fit; the model is unchanged then.
    """
    checkpoint = find_checkpoint(source)
    stored = load_weights(checkpoint)
    wanted = objective.state_dict()
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        what = f"it lacks {missing[0]}" if missing else f"it holds {unknown[0]} besides"
        raise InputError(
            f"the weights of {source} do not fit this recipe's model: {what}; start from a run of "
            "the same architecture"
        )
    resampled = []
    for name, tensor in wanted.items():
        if stored[name].shape == tensor.shape:
            continue
        is_table = name.endswith("pos_embed") and stored[name].shape[-1] == tensor.shape[-1]
        if not is_table:
            raise InputError(
                f"the weights of {source} do not fit this recipe's model: {name} has the shape "
                f"{tuple(stored[name].shape)} there and {tuple(tensor.shape)} here"
            )
        if resample is None:
            raise InputError(
                f"{name} of {source} is made for another grid or length "
                f"({tuple(stored[name].shape)}, here {tuple(tensor.shape)}); add "
                "--run.interpolate to resample it"
            )
        stored[name] = resample(name, stored[name], tensor.shape)
        resampled.append(name)
    objective.load_state_dict(stored)
    log.info(
        "started from step %d of %s: %d tensors%s%s",
        checkpoint.step,
        source,
        len(wanted),
        ", moving average" if any(n.startswith("ema/") for n in checkpoint.names()) else "",
        f", resampled {', '.join(resampled)}" if resampled else "",
    )
