"""Muon against torch's own on matrices apart, and against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frugal.cit.recipes import RECIPES as CIT
from frugal.clipa.recipes import RECIPES as CLIPA
from frugal.cluster_masking.recipes import RECIPES as CLUSTER_MASKING
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.optim.muon import Muon, orthogonal_step
from frugal.common.optim.optimizers import AdamW, set_learning_rate
from frugal.flip.recipes import RECIPES as FLIP
from frugal.milan.recipes import RECIPES as MILAN
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING

TOWER = ImageTower(width=8, depth=2, heads=2, mlp_width=20, patch_size=4, image_size=8)
OPTIONS = Muon(learning_rate=1.0, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))


def tower() -> ImageTransformer:
    torch.manual_seed(0)
    return ImageTransformer(TOWER, embed_dim=4)


def test_steps_are_those_of_torch_on_matrices_apart_and_of_adamw_on_the_rest() -> None:
    model = tower()
    optimizer = OPTIONS.build(model)
    matrices: dict[str, list[nn.Parameter]] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        copy = parameter.detach().clone()
        if name.startswith("blocks.") and name.endswith("weight") and copy.ndim == 2:
            # queries, keys and values are matrices of their own
            parts = copy.chunk(3) if ".qkv." in name else [copy]
            matrices[name] = [nn.Parameter(part.clone()) for part in parts]
        else:
            others[name] = nn.Parameter(copy)
    assert len(matrices) == 8  # of each block: qkv, proj, fc1, fc2
    decayed = AdamW(learning_rate=1.0).decayed_names(model)
    muon = torch.optim.Muon(
        [part for parts in matrices.values() for part in parts],
        lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in others.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in others.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.9),
    )
    for step in range(3):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name in others:
                others[name].grad = parameter.grad.clone()
            else:
                for part, rows in zip(
                    matrices[name], parameter.grad.chunk(len(matrices[name])), strict=True
                ):
                    part.grad = rows.clone()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        wanted = torch.cat(list(matrices[name])) if name in matrices else others[name]
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)
        assert ("momentum" in optimizer.state[parameter]) == (name in matrices)
        assert ("exp_avg" in optimizer.state[parameter]) == (name in others)


@pytest.mark.parametrize("shape", [(2, 12, 5), (1, 5, 12), (3, 7, 7)])
def test_a_step_is_along_the_orthogonal_factor_and_as_large_as_one_of_adamw(shape) -> None:
    updates = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    for update, step in zip(updates.double(), orthogonal_step(updates).double(), strict=True):
        left, _, right = torch.linalg.svd(update, full_matrices=False)
        singular = torch.linalg.svdvals(step) / (0.2 * max(shape[1:]) ** 0.5)
        assert ((singular > 0.6) & (singular < 1.3)).all()
        cosine = (step * (left @ right)).sum() / step.norm() / (left @ right).norm()
        assert cosine < -0.97  # against the gradient
        # every number of an AdamW step is about 0.2 of the rate (arXiv:2502.16982)
        rms = step.square().mean().sqrt() * (max(shape[1:]) / min(shape[1:])) ** 0.5
        assert rms == pytest.approx(0.2 * (max(shape[1:]) / min(shape[1:])) ** 0.5, rel=0.3)


def test_a_step_that_must_change_nothing_changes_nothing() -> None:
    model = tower()
    optimizer = OPTIONS.build(model)
    set_learning_rate(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for found_inf, moves in ((1.0, False), (0.0, True)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if found_inf else 0.5)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != moves, name
            for kind, moment in optimizer.state[parameter].items():
                assert kind == "step" or bool(moment.any()) == moves, (name, kind)


def test_each_group_has_its_share_of_the_rate_and_a_matrix_to_itself() -> None:
    model = tower()
    model.blocks[0].mlp.requires_grad_(False)
    options = Muon(learning_rate=1.0, layer_decay=0.5, no_decay=("bias", "vector"))
    groups = options.build(model).param_groups
    of_matrices = [group for group in groups if "matrices" in group]
    assert [group["matrices"] for group in of_matrices] == [
        (3, 8, 8), (1, 8, 8), (3, 8, 8), (1, 8, 8), (1, 20, 8), (1, 8, 20)
    ]  # fmt: skip
    assert [group["lr_scale"] for group in of_matrices] == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert all(len(group["params"]) == 1 for group in of_matrices)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len(set(found)) == sum(p.requires_grad for p in model.parameters())
    assert options.gathered(model) == 2 * 4 * 64 + 2 * 160
    kinds = options.moments_of(model)
    assert kinds["blocks.1.mlp.fc1.weight"] == ("momentum",)
    assert kinds["patch_embed.weight"] == kinds["norm.bias"] == ("exp_avg", "exp_avg_sq")
    assert "blocks.0.mlp.fc1.weight" not in kinds


@pytest.mark.parametrize(
    "recipes",
    [FLIP, CLIPA, CLUSTER_MASKING, CIT, MILAN, FINE_TUNING],
    ids=["flip", "clipa", "cluster masking", "cit", "milan", "milan finetune"],
)
def test_the_blocks_of_every_method_have_matrices(recipes) -> None:
    recipe = recipes["demo"]()
    objective = recipe.objective.outline(recipe)
    matrices = OPTIONS.matrices(objective)
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert matrices.keys() <= trained
    blocks = {name.partition(".blocks.")[0] for name in trained if ".blocks." in name}
    assert {name.partition(".blocks.")[0] for name in matrices} == blocks


def test_a_model_without_blocks_to_train_is_refused() -> None:
    recipe = LINEAR_PROBING["demo"]()
    for module in (nn.Linear(2, 2), recipe.objective.outline(recipe)):
        with pytest.raises(InputError, match="no blocks that are trained; give --optimizer"):
            OPTIONS.build(module)
    with pytest.raises(InputError, match=r"optimizer.momentum is 1.0"):
        Muon(learning_rate=1.0, momentum=1.0)
