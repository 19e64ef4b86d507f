"""Optimizers as recipes name them: how weights are stepped, and in which parameter groups.

Every group has a ``lr_scale``; the engine sets ``lr`` to the schedule's rate times it before every
step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.contracts import Optimizer
from frugal.common.errors import InputError
from frugal.common.ranges import NotNegative, Positive, PositiveShare, ShareBelowOne

_PROJECTION = re.compile(r"(.*\.)?(image|text)\.projection\.weight")
"""What leads from a tower into the space that both share."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    epsilon: NotNegative = 1e-8
    weight_decay: NotNegative = 0.2
    no_decay: tuple[str, ...] = ("bias", "norm", "position")
    """Which parameters are not decayed: bias, norm, position, class_token, logit_scale,
    embedding, vector (every parameter with fewer than two dimensions)."""
    projection_weight_decay: NotNegative | None = None
    """Of the projections of both towers into the shared space; without it as of all others."""
    layer_decay: PositiveShare | None = None
    """Learning rate of every block over that of the block behind it; what stands behind the last
    block has the whole rate. Without it everything has."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "bias", "norm", "position", "class_token", "logit_scale", "embedding", "vector"
        }  # fmt: skip
        if unknown := sorted(set(self.no_decay) - known):
            raise InputError(
                f"optimizer.no_decay does not know {unknown[0]!r}; choose from {sorted(known)}"
            )

    @override
    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """AdamW over the trainable parameters: a group that decays, one that does not, and others.

        Projections with a weight decay of their own are a third group. With layer decay there are
        as many for every depth, in the order of their first parameters. The fused kernel is used:
        torch has it for CPU and CUDA.
        """
        decays = self.weight_decays(module)
        scales = learning_rate_scales(module, self.layer_decay)
        groups = self.groups(dict(trained(module)), decays, scales)
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.epsilon, fused=True)

    def groups(
        self,
        parameters: Mapping[str, nn.Parameter],
        decays: Mapping[str, float],
        scales: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """Parameters by what they have in common: their weight decay and factor on the rate."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        if self.layer_decay is None:
            groups = {(1.0, self.weight_decay): [], (1.0, 0.0): []}
        for name, parameter in parameters.items():
            groups.setdefault((scales[name], decays[name]), []).append(parameter)
        return [
            {"params": alike, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), alike in groups.items()
            if alike
        ]

    def weight_decays(self, module: nn.Module) -> dict[str, float]:
        """The weight decay of every parameter, by name.

        Raises:
            InputError: if projections have one of their own, but there are none.
        """
        decayed = self.decayed_names(module)
        names = [name for name, _ in module.named_parameters()]
        decays = {name: self.weight_decay if name in decayed else 0.0 for name in names}
        if self.projection_weight_decay is None:
            return decays
        projections = [name for name in names if _PROJECTION.fullmatch(name)]
        if not projections:
            raise InputError(
                f"optimizer.projection_weight_decay is {self.projection_weight_decay}, but this "
                "model projects into no shared space; leave it out"
            )
        return decays | dict.fromkeys(projections, self.projection_weight_decay)

    def decayed_names(self, module: nn.Module) -> set[str]:
        """Names of the parameters that weight decay acts on."""
        excluded = set(self.no_decay)
        return {name for name, roles in parameter_roles(module).items() if not roles & excluded}


_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm, nn.RMSNorm)


def parameter_roles(module: nn.Module) -> dict[str, set[str]]:
    """What each parameter is, in the words of ``optimizer.no_decay``.

    Returns:
        For every parameter name a subset of bias, norm, position, class_token, logit_scale,
        embedding and vector. Norms and embeddings are told by the type of their module.
    """
    roles: dict[str, set[str]] = {}
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            mine = set()
            if name.endswith("bias"):
                mine.add("bias")
            if isinstance(owner, _NORMS):
                mine.add("norm")
            if isinstance(owner, nn.Embedding):
                mine.add("embedding")
            if name == "pos_embed":
                mine.add("position")
            if name == "cls_token":
                mine.add("class_token")
            if name in ("logit_scale", "logit_bias"):
                mine.add("logit_scale")
                mine.discard("bias")
            if parameter.ndim < 2:
                mine.add("vector")
            roles[f"{prefix}.{name}" if prefix else name] = mine
    return roles


_STEM = ("patch_embed", "token_embedding", "norm_pre")
"""Modules of a tower that stand before its blocks, as its own parameters do."""


def towers_with_blocks(
    module: nn.Module,
) -> list[tuple[str, nn.Module, nn.ModuleList | nn.Sequential]]:
    """What their names begin with, modules with a child ``blocks``, and those blocks."""
    return [
        (f"{path}." if path else "", tower, blocks)
        for path, tower in module.named_modules()
        if isinstance(blocks := getattr(tower, "blocks", None), (nn.ModuleList, nn.Sequential))
    ]


def learning_rate_scales(module: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """The factor on the learning rate of every parameter, by name.

    Every tower, a module with a child ``blocks`` of L blocks, counts for itself: block i has
    ``layer_decay**(L - i)`` and what stands before the blocks ``layer_decay**(L + 1)``. All else
    has 1. Source: Bao et al., arXiv:2106.08254, as in MAE (arXiv:2111.06377, appendix A.2).

    Raises:
        InputError: if there is a layer decay but no tower.
    """
    scales = {name: 1.0 for name, _ in module.named_parameters()}
    if layer_decay is None:
        return scales
    towers = towers_with_blocks(module)
    if not towers:
        raise InputError(
            f"optimizer.layer_decay is {layer_decay}, but this model has no blocks; leave it out"
        )
    for prefix, tower, blocks in towers:
        depth = len(blocks)
        for name, _ in tower.named_parameters():
            if name.startswith("blocks."):
                scales[prefix + name] = layer_decay ** (depth - int(name.split(".")[1]))
            elif "." not in name or name.split(".")[0] in _STEM:
                scales[prefix + name] = layer_decay ** (depth + 1)
    return scales


@dataclass(frozen=True, kw_only=True)
class LARS(Optimizer):
    """Momentum whose steps are scaled to the norm of each matrix (You et al., arXiv:1708.03888).

    Vectors, such as biases, are neither scaled nor decayed.
    """

    momentum: ShareBelowOne = 0.9
    weight_decay: NotNegative = 0.0
    trust: Positive = 0.001
    """Norm of a gradient, after scaling, over the norm of its weights."""

    moments: ClassVar[tuple[str, ...]] = ("momentum",)

    @override
    def build(self, module: nn.Module) -> LarsOptimizer:
        """LARS over the trainable parameters: a group for every matrix, one for all vectors."""
        parameters = [p for _, p in trained(module)]
        matrices = [[p] for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim < 2]
        return LarsOptimizer(
            [
                {"params": group, "is_matrix": group is not vectors, "lr_scale": 1.0}
                for group in [*matrices, vectors]
                if group
            ],
            self,
        )


class LarsOptimizer(torch.optim.Optimizer):
    """Momentum after scaling the gradient of each matrix to the norm of its weights.

    You et al., arXiv:1708.03888, in the order of MoCo v3 and MAE (arXiv:2111.06377, appendix A.3):
    decay, scale, add to the momentum, and only then the learning rate.
    """

    def __init__(self, groups: list[dict[str, Any]], options: LARS) -> None:
        """Every matrix is a group of its own with ``is_matrix``.

        So ZeRO, which lays a group out as one flat tensor and cuts it up among the processes, never
        puts two matrices into one tensor.
        """
        super().__init__(
            groups,
            {
                "lr": 0.0,
                "momentum": options.momentum,
                "weight_decay": options.weight_decay,
                "trust": options.trust,
            },
        )
        self.total: Callable[[Tensor], Tensor] = lambda squares: squares
        """Adds up what the processes know of the squared norms of one matrix; each knows them
        whole unless matrices are cut up."""
        self.found_inf: Tensor | None = None
        """(): 1 where a step must change nothing; see :func:`skip_unless_finite`."""

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["is_matrix"]:
                    gradient = gradient + group["weight_decay"] * parameter
                    gradient = gradient * self._factor(parameter, gradient, group["trust"])
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                moved = momentum.mul(group["momentum"]).add_(gradient)
                replace_unless_skipped(self.found_inf, momentum, moved)
                stepped = parameter.add(moved, alpha=-group["lr"])
                replace_unless_skipped(self.found_inf, parameter, stepped)

    def _factor(self, weight: Tensor, gradient: Tensor, trust: float) -> Tensor:
        """(): brings a gradient to ``trust`` times the norm of its weights; 1 if either is zero."""
        squares = self.total(torch.stack([_square(weight), _square(gradient)]))
        weight_norm, gradient_norm = squares.sqrt().unbind()
        has_both = (weight_norm > 0) & (gradient_norm > 0)
        return torch.where(has_both, trust * weight_norm / gradient_norm, 1.0)


def _square(tensor: Tensor) -> Tensor:
    # with sympy it takes as long to import as torch, and only FSDP makes such tensors
    from torch.distributed.tensor import DTensor

    square = tensor.square().sum()
    return square.full_tensor() if isinstance(square, DTensor) else square


def replace_unless_skipped(found_inf: Tensor | None, tensor: Tensor, value: Tensor) -> None:
    """Write a value over a tensor, but not where ``found_inf``, (), is 1."""
    if found_inf is not None:
        value = torch.where(found_inf == 1, tensor, value)
    tensor.copy_(value)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters by name."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every group of an optimizer its share of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def leave_out_fused_kernels(optimizer: Any) -> None:
    """Have an optimizer step every number alike, wherever a tensor is cut.

    On CPUs torch's fused kernels compute what does not fill a register in another precision.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["fused"], group["foreach"] = False, True


def skip_unless_finite(optimizer: Any, norm: Tensor) -> None:
    """Have the next step change nothing if the norm (), of its gradients is not finite.

    This is decided on the device. torch's fused kernels know the mark from ``GradScaler``: where it
    is 1, weights, moments and counters stay as they are.
    """
    optimizer.found_inf = (~norm.isfinite()).float()
