"""AdamW and its weight-decay rule against the numbers of FLIP's own optimizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frugal.common.errors import InputError
from frugal.common.optim.optimizers import AdamW, parameter_roles

GOLDEN = Path(__file__).parents[2] / "golden" / "flip"
BLOCK = "img_encoder/Transformer/encoderblock_00"
NAMES = {
    "norm1.bias": f"{BLOCK}/LayerNorm_0/bias",
    "norm1.weight": f"{BLOCK}/LayerNorm_0/scale",
    "fc1.bias": f"{BLOCK}/MlpBlock_0/Dense_0/bias",
    "fc1.weight": f"{BLOCK}/MlpBlock_0/Dense_0/kernel",
    "cls_token": "img_encoder/cls",
    "projection.weight": "img_mlp1/kernel",
    "logit_scale": "logit_scale",
    "text.pos_embed": "txt_encoder/posembed_encoder/pos_embedding",
    "text.tokens.weight": "txt_encoder/token_embedding/embedding",
}
FLIP_RULE = AdamW(learning_rate=1.0, no_decay=("bias", "norm", "position"))


class Miniature(nn.Module):
    """One parameter of every kind that FLIP's numbers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.projection = nn.Linear(8, 4, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.text = nn.Module()
        self.text.pos_embed = nn.Parameter(torch.zeros(1, 6, 8))
        self.text.tokens = nn.Embedding(20, 8)


def ours(theirs: torch.Tensor, name: str) -> torch.Tensor:
    return theirs.T.contiguous() if name.endswith("kernel") else theirs


def test_six_steps_give_the_reference_weights_and_moments() -> None:
    numbers = load_file(GOLDEN / "adamw.safetensors")
    settings = json.loads((GOLDEN / "adamw.json").read_text())
    model = Miniature()
    options = AdamW(
        learning_rate=1.0,
        betas=(settings["b1"], settings["b2"]),
        epsilon=settings["eps"],
        weight_decay=settings["weight_decay"],
        no_decay=("bias", "norm", "position"),
    )
    parameters = dict(model.named_parameters())
    assert parameters.keys() == NAMES.keys()
    for name, theirs in NAMES.items():
        parameters[name].data = ours(numbers[f"step0/param/{theirs}"], theirs)
    optimizer = options.build(model)
    for step, rate in enumerate(settings["lr_used"], start=1):
        for name, theirs in NAMES.items():
            parameters[name].grad = ours(numbers[f"step{step}/grad/{theirs}"], theirs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, theirs in NAMES.items():
            expected = ours(numbers[f"step{step}/param/{theirs}"], theirs)
            torch.testing.assert_close(parameters[name].data, expected, atol=2e-6, rtol=0)
    for name, theirs in NAMES.items():
        state = optimizer.state[parameters[name]]
        for mine, kind in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
            expected = ours(numbers[f"final/{kind}/{theirs}"], theirs)
            torch.testing.assert_close(state[mine], expected, atol=2e-6, rtol=1e-5)


def test_flips_rule_decays_what_the_reference_decays() -> None:
    excluded = set(json.loads((GOLDEN / "adamw.json").read_text())["no_weight_decay"])
    decayed = FLIP_RULE.decayed_names(Miniature())
    assert decayed == {name for name, theirs in NAMES.items() if theirs not in excluded}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("bias", "fc1.bias"),
        ("norm", "norm1.weight"),
        ("position", "text.pos_embed"),
        ("class_token", "cls_token"),
        ("logit_scale", "logit_scale"),
        ("embedding", "text.tokens.weight"),
        ("vector", "logit_scale"),
    ],
)
def test_every_rule_excludes_its_kind(rule: str, name: str) -> None:
    decayed = AdamW(learning_rate=1.0, no_decay=(rule,)).decayed_names(Miniature())
    assert name not in decayed
    assert "fc1.weight" in decayed


def test_frozen_parameters_are_left_to_themselves() -> None:
    model = Miniature()
    model.fc1.requires_grad_(False)
    groups = FLIP_RULE.build(model).param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_every_parameter_has_roles() -> None:
    model = Miniature()
    assert parameter_roles(model).keys() == dict(model.named_parameters()).keys()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="does not know 'biases'"):
        AdamW(learning_rate=1.0, no_decay=("biases",))


def test_exactly_one_learning_rate_is_wanted() -> None:
    with pytest.raises(InputError, match="exactly one"):
        AdamW()
    with pytest.raises(InputError, match="exactly one"):
        AdamW(learning_rate=1.0, learning_rate_per_256=1.0)
