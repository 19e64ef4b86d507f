"""Parameter groups by name and role, and the optimiser over them."""

from __future__ import annotations

import torch
from torch import nn

from frugal.common.recipe import AdamW

_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm, nn.RMSNorm)


def parameter_roles(module: nn.Module) -> dict[str, set[str]]:
    """What each parameter is, in the words of ``optimiser.no_decay``.

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


def decayed_names(module: nn.Module, options: AdamW) -> set[str]:
    """Names of the parameters that weight decay acts on."""
    excluded = set(options.no_decay)
    return {name for name, roles in parameter_roles(module).items() if not roles & excluded}


def build_adamw(module: nn.Module, options: AdamW) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: one group that decays, one that does not.

    The fused kernel is used: torch has it for CPU and CUDA. The learning rate is set anew for
    every step by the engine.
    """
    decayed = decayed_names(module, options)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trained if (name in decayed) == decays],
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=options.betas,
        eps=options.epsilon,
        fused=True,
    )
