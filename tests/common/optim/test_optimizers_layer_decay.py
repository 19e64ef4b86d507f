"""Which share of the learning rate every parameter has."""

import pytest
import torch
from torch import nn

from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.optim.optimizers import AdamW, learning_rate_scales, set_learning_rate

TOWER = ImageTower(
    width=8, depth=3, heads=2, mlp_width=16, patch_size=4, image_size=(8, 12), pre_norm=True
)


class Model(nn.Module):
    """A tower of three blocks, a shallower one, and what stands behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageTransformer(TOWER, embed_dim=4)
        self.other = nn.Module()
        self.other.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.other.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(4, 2)


def test_the_rate_falls_by_one_factor_per_block_from_the_head_down() -> None:
    scales = learning_rate_scales(Model(), 0.5)
    for name in ("cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias"):
        assert scales[f"image.{name}"] == 0.5**4
    assert scales["image.norm_pre.weight"] == 0.5**4
    assert scales["image.blocks.0.norm1.bias"] == 0.5**3
    assert scales["image.blocks.2.mlp.fc2.weight"] == 0.5
    for name in ("image.norm.weight", "image.projection.weight", "head.weight", "head.bias"):
        assert scales[name] == 1.0
    # every tower counts its own blocks
    assert scales["other.cls_token"] == 0.5**3
    assert scales["other.blocks.0.weight"] == 0.5**2
    assert scales["other.blocks.1.bias"] == 0.5
    assert scales.keys() == dict(Model().named_parameters()).keys()


def test_each_group_steps_by_its_share_of_the_rate() -> None:
    model = Model()
    options = AdamW(learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    optimizer = options.build(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    scales = learning_rate_scales(model, 0.5)
    for name, parameter in model.named_parameters():
        # the first step of Adam is as long as the rate
        moved = (before[name] - parameter.detach()).double()
        wanted = torch.full_like(moved, 0.01 * scales[name])
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=2e-7)


def test_without_layer_decay_there_are_two_groups_the_decaying_one_first() -> None:
    options = AdamW(learning_rate=1.0, weight_decay=0.1, no_decay=("vector",))
    groups = options.build(Model()).param_groups
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.1, 1), (0, 1)]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="this model has no blocks"):
        AdamW(learning_rate=1.0, layer_decay=0.5).build(nn.Linear(2, 2))


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_a_decay_that_makes_no_sense_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"optimizer\.layer_decay"):
        AdamW(learning_rate=1.0, layer_decay=decay)
