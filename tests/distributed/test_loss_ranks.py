"""The losses on one, two and three processes over gloo, against one process that has everything.

Run as a script this file is one of the processes.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from frugal.common.distributed import gather, place_in_world
from frugal.common.objectives import contrastive_loss as module
from frugal.common.objectives.contrastive_loss import BOTH, contrastive_loss, sigmoid_loss
from support import start_ranks

LOCAL, WIDTH, WORLD = 5, 4, 3
VALID = {
    "all": [[1, 1, 1, 1, 1]] * WORLD,
    "uneven": [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]],
    "one process empty": [[0, 0, 0, 0, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1]],
    "none": [[0, 0, 0, 0, 0]] * WORLD,
}
ROWS_PER_PIECE = [2, LOCAL]
GROUPED = " with groups"
KINDS = ["both", "image_to_text", "text_to_image", "sigmoid"]
KINDS += [kind + GROUPED for kind in KINDS]
GROUPS = torch.tensor([0, 1, 0, 2, 3, 1, 4, 0, 5, 5, 6, 1, 5, 7, 7])
"""Of the samples of all processes; some have members on each."""
NAMES = ("images", "texts", "scale", "bias")


def values_of(world: int, dtype: torch.dtype) -> list[Tensor]:
    """The global batch of a group of processes, and the scale and bias that all of them hold."""
    generator = torch.Generator().manual_seed(world)
    features = torch.randn(2, world * LOCAL, WIDTH, generator=generator, dtype=torch.float64)
    images, texts = F.normalize(features, dim=2)
    scale, bias = torch.tensor([[3.1], [-2.2]], dtype=torch.float64)
    return [value.to(dtype) for value in (images, texts, scale, bias)]


def loss_of(kind: str, values: list[Tensor], groups: Tensor, **options: Any) -> Tensor:
    if kind.endswith(GROUPED):
        kind, options["groups"] = kind.removesuffix(GROUPED), groups
    if kind == "sigmoid":
        return sigmoid_loss(*values, **options).loss
    directions = BOTH if kind == "both" else (kind,)
    return contrastive_loss(*values[:3], directions=directions, **options).loss


def run_rank(rank: int, folder: Path) -> None:
    """Every case in every group this process belongs to; what comes out is saved."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD
    )
    results: dict[tuple, Any] = {}
    for world in (1, 2, 3):
        # the largest one is the default group, which callers need not name
        group = dist.new_group(list(range(world))) if world < WORLD else None
        if rank < world:
            results |= run_group(rank, world, group)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_group(rank: int, world: int, group: dist.ProcessGroup | None) -> dict[tuple, Any]:
    assert place_in_world(group) == (rank, world)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    results: dict[tuple, Any] = {}
    for name, rows in VALID.items():
        for kind in KINDS:
            images, texts, scale, bias = values_of(world, torch.float32)
            values = [images[mine].clone(), texts[mine].clone(), scale, bias]
            values = [value.requires_grad_() for value in values]
            valid = torch.tensor(rows[rank]).bool()
            for piece in ROWS_PER_PIECE:
                module._PIECE_NUMBERS = piece * world * WIDTH
                loss = loss_of(kind, values, GROUPS[mine], valid=valid, chunk=4, group=group)
                gradients = torch.autograd.grad(loss, values, allow_unused=True)
                results[world, name, kind, piece] = loss.detach(), gradients
    results[world, "weighted"] = run_weighted(rank, world, group)
    results[world, "gather"] = run_gather(rank, world, group)
    return results


def run_weighted(rank: int, world: int, group: dist.ProcessGroup | None) -> list[list[Tensor]]:
    """Gradients when every process weighs its loss differently: ours, and through ``gather``."""
    gradients = []
    for chunked in (True, False):
        images, texts, scale, _ = values_of(world, torch.float32)
        mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
        values = [images[mine].clone(), texts[mine].clone(), scale]
        images, texts, scale = (value.requires_grad_() for value in values)
        if chunked:
            loss = contrastive_loss(images, texts, scale, group=group).loss
        else:
            own = torch.arange(mine.start, mine.stop)
            by_image = scale.exp() * images @ gather(texts, group).T
            by_text = scale.exp() * texts @ gather(images, group).T
            loss = (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2
        (loss * (rank + 1)).backward()
        gradients.append([value.grad for value in values])
    return gradients


def run_gather(rank: int, world: int, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    local = torch.full((2, 3), float(rank + 1)).requires_grad_()
    whole = gather(local, group)
    plain = gather(local.T.detach(), group)  # not contiguous
    assert not plain.requires_grad
    weights = torch.arange(whole.numel()).view_as(whole) * (rank + 1.0)
    (whole * weights).sum().backward()
    assert local.grad is not None
    return whole.detach(), plain, local.grad


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = start_ranks(__file__, WORLD, folder)
    assert processes.wait(timeout=120) == 0, (folder / "log").read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def whole_batch(world: int, name: str, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one process that holds the global batch, by definition in float64."""
    values = [value.requires_grad_() for value in values_of(world, torch.float64)]
    images, texts, scale, bias = values
    valid = torch.tensor(VALID[name][:world]).bool().flatten()
    cosines = images[valid] @ texts[valid].T
    same = torch.eye(len(cosines), dtype=torch.float64)
    if kind.endswith(GROUPED):
        kind, groups = kind.removesuffix(GROUPED), GROUPS[: world * LOCAL][valid]
        same = (groups[:, None] == groups).double()
    if len(same) == 0:
        loss = 0.0 * sum(value.sum() for value in values)
    elif kind == "sigmoid":
        loss = -F.logsigmoid((2 * same - 1) * (scale.exp() * cosines + bias)).sum() / len(same)
    else:
        logits, targets = scale.exp() * cosines, same / same.sum(1)
        by_image, by_text = F.cross_entropy(logits, targets), F.cross_entropy(logits.T, targets)
        loss = {"both": (by_image + by_text) / 2, "image_to_text": by_image}.get(kind, by_text)
    loss.backward()
    return loss.detach(), [
        torch.zeros_like(value) if value.grad is None else value.grad for value in values
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", ROWS_PER_PIECE)
def test_mean_over_processes_is_the_loss_of_one_process(
    world: int, name: str, kind: str, piece: int, results: list
) -> None:
    expected, _ = whole_batch(world, name, kind)
    losses = [results[rank][world, name, kind, piece][0] for rank in range(world)]
    assert torch.stack(losses).double().mean().item() == pytest.approx(
        expected.item(), rel=2e-6, abs=1e-7
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", ROWS_PER_PIECE)
def test_averaged_gradients_are_those_of_one_process(
    world: int, name: str, kind: str, piece: int, results: list
) -> None:
    _, expected = whole_batch(world, name, kind)
    by_rank = [results[rank][world, name, kind, piece][1] for rank in range(world)]
    for place, reference in enumerate(expected):
        parts = [gradient[place] for gradient in by_rank]
        if "sigmoid" not in kind and NAMES[place] == "bias":
            assert parts == [None] * world
            continue
        if NAMES[place] in ("images", "texts"):
            # what a process would send into its tower; DDP divides the sum by the processes
            ours = torch.cat(parts) / world
        else:
            ours = torch.stack(parts).mean(0)
        # gradients reach 10, on logits of 20 that are float32
        torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_equal_gathering_them_however_processes_weigh_their_losses(
    world: int, results: list
) -> None:
    for rank in range(world):
        ours, gathered = results[rank][world, "weighted"]
        for place in range(2):
            torch.testing.assert_close(ours[place], gathered[place], rtol=2e-5, atol=1e-5)
    by_rank = [results[rank][world, "weighted"] for rank in range(world)]
    ours, gathered = (sum(part[kind][2] for part in by_rank) for kind in (0, 1))
    torch.testing.assert_close(ours, gathered, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gather_joins_in_order_of_ranks_and_sums_gradients(world: int, results: list) -> None:
    ranks = torch.arange(1.0, world + 1)
    whole = ranks.repeat_interleave(2)[:, None].expand(-1, 3)
    weights = torch.arange(whole.numel()).view_as(whole).double()
    for rank in range(world):
        values, plain, gradient = results[rank][world, "gather"]
        assert torch.equal(values, whole)
        assert torch.equal(plain, ranks.repeat_interleave(3)[:, None].expand(-1, 2))
        assert torch.equal(gradient.double(), weights[2 * rank : 2 * rank + 2] * ranks.sum())


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
