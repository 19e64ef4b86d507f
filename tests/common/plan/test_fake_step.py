"""A step on fake tensors: what it counts, against counts by hand and numbers of parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from frugal.cluster_masking.recipes import demo as cluster_demo
from frugal.common.contracts import Batch, Objective
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.plan.fake_step import StepMemory, countable, step_memory, tokens_of
from frugal.common.recipe import ObjectiveConfig, Recipe, model_of
from frugal.common.reduction.random_masking import RandomMasking
from frugal.flip.recipes import ablation_text_random, demo
from frugal.milan.recipes import demo as milan_demo
from frugal.milan.recipes import vit_b16

pytestmark = pytest.mark.slow

PIXELS, WIDTH = 3 * 32 * 32, 64


@dataclass(frozen=True, kw_only=True)
class Toy(ObjectiveConfig):
    """One matrix, whose memory can be counted by hand."""

    def build(self, recipe: Recipe) -> Objective:
        return ToyObjective(recipe)


class ToyObjective(Objective):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.reduction = recipe.reduction.image
        self.model = nn.Linear(PIXELS, WIDTH, bias=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model(batch.images.flatten(1).float()).relu().sum(), {}


def small() -> Recipe:
    """FLIP's demo with a block or two in each tower and a short table of tokens."""
    recipe = demo()
    model = model_of(DualEncoderConfig, recipe.model)
    model = replace(
        model,
        image=replace(model.image, depth=2),
        text=replace(model.text, depth=1, vocabulary=512),
    )
    return replace(recipe, model=model)


def fullest(step: StepMemory) -> int:
    return max(moment.activations for moment in step.moments)


def test_memory_of_one_matrix_is_what_a_hand_counts() -> None:
    recipe = replace(small(), objective=Toy())
    step = step_memory(recipe, samples=8, dtype=torch.float32)
    assert step.weights == 4 * PIXELS * WIDTH
    assert step.trainable == (PIXELS * WIDTH,)
    # the pixels in float32, which backward needs, the gradient behind relu, and that of the matrix
    by_hand = 4 * 8 * PIXELS + 4 * 8 * WIDTH + 4 * PIXELS * WIDTH
    assert by_hand <= step.moments[0].activations <= by_hand + 64
    assert step.moments[-1].gradients == PIXELS * WIDTH
    # when the gradient has been handed over nothing stays but the numbers of the loss
    assert step.moments[-1].activations <= by_hand + 64


@pytest.mark.parametrize("make", [small, milan_demo])
def test_parameters_are_those_of_the_model(make) -> None:
    recipe = replace(make(), objective=make().objective)
    step = step_memory(recipe, samples=4)
    if make is small:
        objective = recipe.objective.build(recipe)
        assert step.num_trained == sum(p.numel() for p in objective.parameters())
        assert step.frozen == 0
    else:  # the teacher that is not there counts as CLIP's ViT-B/16 on a grid of 4 x 4
        assert step.frozen > 85e6


def test_masked_images_take_less_memory_and_recomputed_blocks_too() -> None:
    def taken(ratio: float, *, recompute: bool = False) -> int:
        recipe = small()
        reduction = replace(recipe.reduction, image=RandomMasking(mask_ratio=ratio))
        engine = replace(recipe.engine, checkpoint_activations=recompute)
        return fullest(step_memory(replace(recipe, reduction=reduction, engine=engine), samples=64))

    whole, masked = taken(0.0), taken(0.75)
    assert masked < 0.8 * whole
    assert taken(0.0, recompute=True) < 0.9 * whole


def test_memory_follows_the_real_allocations_of_a_step() -> None:
    """What torch's own profiler saw in a step on the CPU, within 5 %."""
    recipe = replace(small(), batch_size=32)
    step = step_memory(recipe, samples=32, dtype=torch.float32, on_gpu=False)
    objective = recipe.objective.build(countable(recipe))
    batch = Batch(
        images=torch.zeros(32, 3, 32, 32, dtype=torch.uint8),
        sample_numbers=torch.arange(32),
        valid=torch.ones(32, dtype=torch.bool),
        token_ids=torch.ones(32, 24, dtype=torch.int64),
        text_lengths=torch.full((32,), 24),
    )
    with torch.profiler.profile(profile_memory=True) as profiler:
        objective(batch)[0].backward()
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    total = most = 0
    for event in events:
        total += event.nbytes()
        most = max(most, total)
    # here gradients stay, which a plan counts apart
    planned = max(m.activations + 4 * m.gradients for m in step.moments)
    assert planned == pytest.approx(most, rel=0.05)


def test_a_larger_world_exchanges_more_and_keeps_no_logits_of_all_pairs() -> None:
    alone, many = (step_memory(small(), samples=8, world_size=w) for w in (1, 512))
    assert alone.exchanged == 0 < many.exchanged
    all_pairs = 4 * (8 * 512) ** 2
    assert fullest(many) < fullest(alone) + all_pairs / 16


def test_attention_keeps_less_on_a_gpu_than_on_a_cpu_in_bfloat16() -> None:
    on_gpu, on_cpu = (step_memory(small(), samples=64, on_gpu=flag) for flag in (True, False))
    assert fullest(on_gpu) < fullest(on_cpu)


def test_gradient_caching_takes_the_memory_of_a_chunk() -> None:
    recipe = small()
    cached = replace(recipe, engine=replace(recipe.engine, cache_chunk=256))
    step = step_memory(cached, samples=512)
    assert step.moments[-1].gradients == step.num_trained  # of both chunks, added up
    assert fullest(step) < 0.7 * fullest(step_memory(recipe, samples=512))


def test_tokens_are_those_that_reductions_keep() -> None:
    assert tokens_of(ablation_text_random()) == {"image_tokens": 50.0, "text_tokens": 16.0}
    assert tokens_of(vit_b16()) == {"image_tokens": 50.0}  # 49 of 196 patches and the class token
    assert tokens_of(cluster_demo())["image_tokens"] == 33.0  # half of 64 are expected
    assert tokens_of(cluster_demo(), text_tokens=7)["text_tokens"] == 7.0
