"""The loss against the recorded one of the reference, in one process and in two."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # where this file is one of two processes

from cit_cases import case

from frugal.cit.objective import LockedContrastive
from frugal.common.models.clip import unit
from frugal.common.objectives.contrastive_loss import BOTH, contrastive_loss
from support import start_ranks

DIRECTIONS = {"i2t": LockedContrastive(train_image="all").directions, "sym": BOTH}
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_loss_and_gradients_are_the_recorded_ones(name: str) -> None:
    golden = case("loss_8x16").tensors
    images, texts = (golden[f"{side}_embeds"].requires_grad_() for side in ("image", "text"))
    scale = golden["logit_scale_param"].reshape(1).requires_grad_()
    loss = contrastive_loss(unit(images), unit(texts), scale, directions=DIRECTIONS[name]).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden[f"{name}_loss"], **NEAR)
    torch.testing.assert_close(images.grad, golden[f"{name}_grad_image"], **NEAR)
    torch.testing.assert_close(texts.grad, golden[f"{name}_grad_text"], **NEAR)
    torch.testing.assert_close(scale.grad, golden[f"{name}_grad_scale"].reshape(1), **NEAR)


def rank_gradients(name: str, rows: slice) -> dict[str, Tensor]:
    """What one process computes from its rows of the global batch."""
    golden = case("dist_loss_w2")
    weights = [golden.tensors[f"w_{side}"].clone().requires_grad_() for side in ("image", "text")]
    scale = torch.tensor([golden.about["log_scale"]], requires_grad=True)
    images, texts = (
        unit(golden.tensors[f"x_{side}"][rows] @ weight.T)
        for side, weight in zip(("image", "text"), weights, strict=True)
    )
    loss = contrastive_loss(images, texts, scale, directions=DIRECTIONS[name]).loss
    loss.backward()
    gradients = {"w_image": weights[0].grad, "w_text": weights[1].grad, "log_scale": scale.grad}
    return {"loss": loss.detach(), **{n: g for n, g in gradients.items() if g is not None}}


def run_rank(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    rows = slice(4 * rank, 4 * rank + 4)
    torch.save({name: rank_gradients(name, rows) for name in DIRECTIONS}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_mean_over_two_processes_is_the_true_gradient(tmp_path: Path) -> None:
    """The reference's encoders get half of it (its ``_mean_`` numbers), which is not repeated."""
    processes = start_ranks(__file__, 2, tmp_path)
    assert processes.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    golden = case("dist_loss_w2").tensors
    for name in DIRECTIONS:
        for kind, value in found[0][name].items():
            mean = (value + found[1][name][kind]) / 2
            suffix = kind if kind == "loss" else f"grad_{kind}"
            expected = golden[f"{name}_single_{suffix}"].reshape(mean.shape)
            torch.testing.assert_close(mean, expected, **NEAR)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
