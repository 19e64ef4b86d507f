"""Muon for the matrices of blocks, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.distributed import place_in_world
from frugal.common.errors import InputError
from frugal.common.optim.optimizers import (
    AdamW,
    learning_rate_scales,
    replace_unless_skipped,
    towers_with_blocks,
    trained,
)
from frugal.common.ranges import ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Momentum made orthogonal for matrices of blocks, AdamW for all else (Jordan et al., 2024).

    https://kellerjordan.github.io/posts/muon. The weights of linear layers in a tower's ``blocks``
    are stepped by their Nesterov momentum with all singular values brought near 1, queries, keys
    and values each on their own, by ``torch.optim.Muon``. Such a step of R rows and C columns is
    0.2 sqrt(max(R, C)) times that, as large as one of AdamW (Liu et al., arXiv:2502.16982, section
    2.2): a learning rate and weight decay that go with AdamW are those of all parameters here.
    """

    momentum: ShareBelowOne = 0.95
    """Of the matrices; betas and epsilon are of the others."""

    def matrices(self, module: nn.Module) -> dict[str, tuple[int, int, int]]:
        """The trainable matrices that Muon steps, by name: how many of which size it has in it.

        Raises:
            InputError: if there is none.
        """
        found: dict[str, tuple[int, int, int]] = {}
        for prefix, _, blocks in towers_with_blocks(module):
            for name, layer in blocks.named_modules():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    parts = 3 if name.rpartition(".")[2] == "qkv" else 1
                    rows, columns = layer.weight.shape
                    found[f"{prefix}blocks.{name}.weight"] = (parts, rows // parts, columns)
        if not found:
            raise InputError(
                "Muon steps the matrices of blocks, but this model has no blocks that are "
                "trained; give --optimizer=frugal.common.optim.optimizers.AdamW"
            )
        return found

    @override
    def moments_of(self, module: nn.Module) -> dict[str, tuple[str, ...]]:
        matrices = self.matrices(module)
        return {
            name: ("momentum",) if name in matrices else kinds
            for name, kinds in super().moments_of(module).items()
        }

    @override
    def gathered(self, module: nn.Module) -> int:
        return sum(map(math.prod, self.matrices(module).values()))

    @override
    def build(self, module: nn.Module) -> MuonOptimizer:
        """A group for every matrix, and AdamW's groups for all other parameters."""
        matrices = self.matrices(module)
        decays, scales = self.weight_decays(module), learning_rate_scales(module, self.layer_decay)
        parameters = dict(trained(module))
        groups: list[dict[str, Any]] = [
            {
                "params": [parameters[name]],
                "weight_decay": decays[name],
                "lr_scale": scales[name],
                "matrices": shape,
            }
            for name, shape in matrices.items()
        ]
        others = {name: p for name, p in parameters.items() if name not in matrices}
        return MuonOptimizer([*groups, *self.groups(others, decays, scales)], self)


class MuonOptimizer(torch.optim.AdamW):
    """AdamW that steps every group with ``matrices`` as :class:`Muon` says.

    Such a group has one parameter. So ZeRO, which cuts every group up among the processes, leaves
    each with one piece of it, and the matrix is whole again when the pieces are put together.
    """

    def __init__(self, groups: list[dict[str, Any]], options: Muon) -> None:
        """``matrices`` is (parts, rows, columns): rows of so many matrices, one below the other."""
        super().__init__(groups, lr=0.0, betas=options.betas, eps=options.epsilon, fused=True)
        self._momentum = options.momentum
        self.gather: Callable[[Tensor], Tensor] | None = None
        self.found_inf: Tensor | None = None
        """(): 1 where a step must change nothing; see :func:`skip_unless_finite`."""

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        stepped = []
        for group in self.param_groups:
            if "matrices" not in group:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_matrix(parameter, parameter.grad, group)
                    stepped.append((parameter, parameter.grad))
        for parameter, _ in stepped:  # AdamW passes over what has no gradient
            parameter.grad = None
        super().step()
        for parameter, gradient in stepped:
            parameter.grad = gradient

    def _step_matrix(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp(gradient, 1 - self._momentum)
        update = self._orthogonal(gradient.lerp(momentum, self._momentum), group["matrices"])
        rate = group["lr"]
        stepped = weight * (1 - rate * group["weight_decay"]) + rate * update
        replace_unless_skipped(self.found_inf, state["momentum"], momentum)
        replace_unless_skipped(self.found_inf, weight, stepped)

    def _orthogonal(self, update: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """What to add to a weight, or to this process's piece of it, at a learning rate of 1."""
        # with sympy it takes as long to import as torch, and only FSDP makes such tensors
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(update, DTensor):
            whole = orthogonal_step(update.full_tensor().view(shape)).view(update.shape)
            return distribute_tensor(whole, update.device_mesh, update.placements)
        if self.gather is None:
            return orthogonal_step(update.view(shape)).view(update.shape)
        # pieces are of one length: the last ones are filled up
        whole = self.gather(update)
        size = math.prod(shape)
        whole[:size] = orthogonal_step(whole[:size].view(shape)).flatten()
        return whole[place_in_world()[0] * len(update) :][: len(update)]


@torch.no_grad()
def orthogonal_step(updates: Tensor) -> Tensor:
    """The step of ``torch.optim.Muon`` along each of (N, R, C) matrices, at a learning rate of 1.

    Returns:
        (N, R, C), to be added to weights.
    """
    steps = nn.Parameter(torch.zeros_like(updates[0]))
    found = []
    for update in updates:
        # a weight of zeros that forgets: behind a step it is that step
        optimizer = torch.optim.Muon(
            [steps], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        steps.grad = update
        steps.zero_()
        optimizer.step()
        found.append(steps.detach().clone())
    return torch.stack(found)
