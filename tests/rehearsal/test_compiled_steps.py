"""Steps of compiled towers: no graph breaks, nothing is compiled anew, and the numbers stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from frugal.cluster_masking.recipes import RECIPES as CLUSTERS
from frugal.common.cli import Recipes, read_command_line
from frugal.common.contracts import Batch, Objective
from frugal.common.models import attention
from frugal.common.models.layout import Layout
from frugal.flip.recipes import RECIPES as FLIP
from frugal.milan.recipes import RECIPES as MILAN
from support import TINY

pytestmark = pytest.mark.slow

STEPS = 5
CASES: dict[str, tuple[Recipes, str, tuple[str, ...]]] = {
    "flip": (FLIP, "demo", ("--model.text.no-packed", "--model.image.depth=2")),
    "flip, packed text, recomputed": (FLIP, "demo", ("--engine.checkpoint-activations",)),
    "clusters": (CLUSTERS, "demo", ("--reduction.image.threshold=0.5",)),
    "mae": (MILAN, "demo-pixels", ()),
}
COMPILED = {
    "flip": 2,
    # once more when a second batch shows that the number of tokens differs
    "flip, packed text, recomputed": 3,
    "clusters": 4,
    "mae": 2,
}
"""Graphs of all towers together, after all steps."""
MAE = (
    "--model.image.width=32", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--model.image.image-size=32", "--model.decoder.width=16",
    "--model.decoder.depth=1", "--model.decoder.heads=2", "--batch-size=24",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Neither before nor afterwards."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def objective_of(case: str) -> Objective:
    recipes, name, words = CASES[case]
    small = MAE if recipes is MILAN else TINY
    words = (name, *small, "--data.train=nowhere", *words)
    recipe = read_command_line(recipes, program="test", arguments=words)[1]
    objective = recipe.objective.build(recipe)
    for tower in objective.towers():
        tower.checkpoint_activations = recipe.engine.checkpoint_activations
    return objective


def batch_of(step: int) -> Batch:
    """Samples of a step, with another number of tokens in each."""
    generator = torch.Generator().manual_seed(step)
    # smooth, so that patches resemble each other and clusters differ in size
    coarse = 255 * torch.rand(6, 3, 5, 5, generator=generator)
    return Batch(
        images=torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").byte(),
        sample_numbers=torch.arange(6) + 6 * step,
        valid=torch.ones(6, dtype=torch.bool),
        token_ids=torch.randint(1, 60, (6, 24), generator=generator),
        text_lengths=torch.randint(1, 25, (6,), generator=generator),
    )


def steps_of(objective: Objective) -> list[tuple[float, list[torch.Tensor]]]:
    """The loss and the gradients of every step."""
    found = []
    for step in range(STEPS):
        loss, _ = objective(batch_of(step))
        parameters = [p for p in objective.parameters() if p.requires_grad]
        found.append((loss.item(), list(torch.autograd.grad(loss, parameters))))
    return found


@pytest.mark.parametrize("case", CASES)
def test_towers_are_compiled_whole_and_once(case: str) -> None:
    expected = steps_of(objective_of(case))
    compiled, counter = objective_of(case), CompileCounterWithBackend("aot_eager")
    for tower in compiled.towers():
        tower.compile(backend=counter, fullgraph=True)
    found = steps_of(compiled)
    assert not counters["graph_break"]
    assert counter.frame_count == COMPILED[case]
    for (loss, gradients), (other, theirs) in zip(expected, found, strict=True):
        assert other == pytest.approx(loss, abs=1e-6)
        for gradient, its in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(its, gradient, rtol=1e-4, atol=1e-6)


def test_a_compiled_tower_asks_torch_for_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_use_xformers", lambda *_: pytest.fail("xformers is asked"))
    tokens = torch.zeros(2, 3, 2, 4)
    torch.compile(attention.attend, backend="eager")(tokens, tokens, tokens, Layout())
    assert "xformers" not in attention.attention_kernel("cuda", compiled=True)
    with pytest.raises(pytest.fail.Exception):
        attention.attend(tokens, tokens, tokens, Layout())
