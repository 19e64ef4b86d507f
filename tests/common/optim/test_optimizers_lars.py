"""LARS against recorded steps of the reference, whole and cut up as ZeRO cuts it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frugal.common.errors import InputError
from frugal.common.optim.optimizers import LARS, LarsOptimizer, set_learning_rate

GOLDEN = Path(__file__).parents[2] / "golden" / "milan"
NUMBERS = load_file(GOLDEN / "lars.safetensors")
SETTINGS = json.loads((GOLDEN / "lars.json").read_text())
NAMES = ("matrix", "bias", "zero_matrix", "conv3d")
OPTIONS = LARS(
    learning_rate=SETTINGS["lr"],
    momentum=SETTINGS["momentum"],
    weight_decay=SETTINGS["weight_decay"],
    trust=SETTINGS["trust_coefficient"],
)


class Recorded(nn.Module):
    """The parameters of the recorded steps."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(NUMBERS[f"init/{name}"].clone()))


def test_three_steps_give_the_recorded_weights_and_momenta() -> None:
    model = Recorded()
    optimizer = OPTIONS.build(model)
    set_learning_rate(optimizer, SETTINGS["lr"])
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            parameter.grad = NUMBERS[f"grad{step}/{name}"].clone()
        optimizer.step()
        for name, parameter in model.named_parameters():
            wanted = NUMBERS[f"after{step}/{name}"]
            torch.testing.assert_close(parameter.data, wanted, rtol=1e-5, atol=1e-6)
            momentum = optimizer.state[parameter]["momentum"]
            torch.testing.assert_close(momentum, NUMBERS[f"mu{step}/{name}"], rtol=1e-5, atol=1e-6)


def test_weight_decay_is_part_of_the_gradient_that_is_scaled_and_spares_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    weight, bias = (p.detach().double().clone() for p in (model.weight, model.bias))
    optimizer = LARS(learning_rate=1.0, weight_decay=0.3, trust=0.02).build(model)
    set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradient = model.weight.grad.double() + 0.3 * weight
    gradient = gradient * 0.02 * weight.norm() / gradient.norm()
    bias_gradient = model.bias.grad.double()
    optimizer.step()
    torch.testing.assert_close(model.weight.double(), weight - 0.5 * gradient, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        model.bias.double(), bias - 0.5 * bias_gradient, rtol=1e-6, atol=1e-7
    )


def test_parts_of_a_tensor_that_know_the_whole_norms_step_as_the_whole() -> None:
    weight, gradient = NUMBERS["init/matrix"], NUMBERS["grad1/matrix"]
    squares = torch.stack([weight.square().sum(), gradient.square().sum()])
    found = []
    for rows in (slice(0, 2), slice(2, None)):
        part = nn.Parameter(weight[rows].flatten())
        part.grad = gradient[rows].flatten()
        optimizer = LarsOptimizer([{"params": [part], "is_matrix": True, "lr_scale": 1.0}], OPTIONS)
        mine = []

        def total(local: torch.Tensor, mine: list = mine) -> torch.Tensor:
            mine.append(local)
            return squares

        optimizer.total = total
        set_learning_rate(optimizer, SETTINGS["lr"])
        optimizer.step()
        assert (mine[0] < squares).all()
        found.append(part.detach())
    wanted = NUMBERS["after1/matrix"].flatten()
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_left_to_themselves_and_every_matrix_stands_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].requires_grad_(False)
    groups = OPTIONS.build(model).param_groups
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    assert shapes == [[(4, 3)], [(4,), (4,), (4,)]]
    assert [group["is_matrix"] for group in groups] == [True, False]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"momentum": 1.0}, "optimizer.momentum is 1.0"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"trust": 0.0}, "optimizer.trust is 0.0"),
        ({"learning_rate_per_256": 1.0}, "exactly one"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm is 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        LARS(learning_rate=1.0, **options)


def test_the_peak_follows_the_batch() -> None:
    assert LARS(learning_rate_per_256=0.05).peak(16_384) == pytest.approx(3.2)
    assert LARS(learning_rate=3.2).peak(16_384) == 3.2
