"""Two processes train a projector and a frozen trunk as one process does.

Run as a script this file is one of the processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tower_cases import MOCO, batch_of, objective_of, recipe_of, text_of

from frugal.common.optim.optimizers import set_learning_rate
from support import start_ranks

SAMPLES, STEPS = 8, 3


def weights(rank: int, world: int, bert: Path) -> dict[str, Tensor]:
    """What a few steps leave behind, gradients averaged over the processes as DDP does."""
    text = text_of(bert, pretrained=False, dropout=0.0)
    recipe = recipe_of(MOCO, text, bert, train_image="head")
    module = objective_of(recipe)
    optimizer = recipe.optimizer.build(module)
    set_learning_rate(optimizer, 1e-3)
    size = SAMPLES // world
    for seed in range(STEPS):
        # the damaged ones are all on the second process
        batch = batch_of(SAMPLES, invalid=2, seed=seed).rows(rank * size, (rank + 1) * size)
        module(batch)[0].backward()
        for parameter in module.parameters():
            if parameter.grad is not None and world > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


def run_rank(rank: int, folder: Path, bert: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    torch.save(weights(rank, 2, bert), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_weights_and_running_statistics_are_those_of_one_process(bert_words, tmp_path) -> None:
    processes = start_ranks(__file__, 2, tmp_path, bert_words)
    expected = weights(0, 1, bert_words)
    assert processes.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
