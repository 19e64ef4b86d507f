"""Every objective takes whole training steps on a GPU that is none; see ``fake_cuda``.

Where a fake GPU cannot go: kernels of xformers for float32, whose seed torch's fake tensors put on
the CPU, so that attention is torch's there; several processes but for the loss and norms that share
statistics; DeepSpeed, which is a C++ library and streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
from torch.testing._internal.distributed.fake_pg import FakeStore

from fake_cuda import CUDA, FakeCuda, fake_cuda
from frugal.cit.recipes import RECIPES as CIT
from frugal.clipa.recipes import RECIPES as CLIPA
from frugal.cluster_masking.recipes import RECIPES as CLUSTERS
from frugal.common.cli import Recipes, read_command_line
from frugal.common.contracts import Batch, Objective
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.saving import WeightAverage
from frugal.common.engine.step import train_step
from frugal.common.errors import InputError
from frugal.common.models.attention import attention_kernel
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive_loss import contrastive_loss, sigmoid_loss
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import KeptPatches
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.run import Run, make_logger
from frugal.common.transfer.segmenter import SegmenterConfig
from frugal.flip.recipes import RECIPES as FLIP
from frugal.milan import objective as milan
from frugal.milan.recipes import RECIPES as MILAN
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.targets import FeatureTarget
from frugal.milan.teacher import FrozenTeacher
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING
from support import TINY

pytestmark = pytest.mark.slow

RUN = Run(Path("nowhere"), 0, 1, 0, CUDA, make_logger(0))
SIZE, SAMPLES = 32, 6
BFLOAT16, FLOAT16 = "--engine.precision=bfloat16", "--engine.precision=float16"
DENSE = "--model.text.no-packed"
IMAGES = "frugal.clipa.{}_masking.{}Masking"
ENCODER = (
    "--model.image.width=32", "--model.image.depth=2", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--model.image.image-size=32", "--batch-size=24",
)  # fmt: skip
PRETRAIN = (*ENCODER, "--model.decoder.width=16", "--model.decoder.depth=2",
            "--model.decoder.heads=2")  # fmt: skip

MUON = "frugal.common.optim.muon.Muon"

CASES: dict[str, tuple[Recipes, str, tuple[str, ...]]] = {
    "flip 50 %, float32": (FLIP, "demo", (*TINY, DENSE)),
    "flip 75 %, packed text": (
        FLIP, "demo", (*TINY, "--reduction.image.mask-ratio=0.75", BFLOAT16)
    ),
    "flip whole": (FLIP, "demo", (*TINY, DENSE, "--reduction.image.mask-ratio=0", BFLOAT16)),
    "flip, padding masked": (FLIP, "demo", (*TINY, DENSE, "--model.text.pad-mask", BFLOAT16)),
    "flip, recomputed, drop path": (
        FLIP, "demo",
        (*TINY, "--engine.checkpoint-activations", "--model.image.drop-path=0.1", BFLOAT16),
    ),
    "flip, float16, cached": (FLIP, "demo", (*TINY, FLOAT16, "--engine.cache-chunk=4")),
    "flip, accumulated": (FLIP, "demo", (*TINY, DENSE, BFLOAT16, "--engine.accumulate=2")),
    "flip, sigmoid": (
        FLIP, "demo",
        (*TINY, BFLOAT16, "--objective.loss=sigmoid", "--model.initial-logit-bias=-10"),
    ),
    "flip, tokens told, Muon": (
        FLIP, "demo",
        (*TINY, BFLOAT16, "--objective.token-loss=1", "--optimizer", MUON,
         "--optimizer.clip-norm=1"),
    ),
    "clipa, colors": (CLIPA, "demo", (*TINY, BFLOAT16, "--data.color.probability=0.8")),
    "clipa, grid": (
        CLIPA, "demo", (*TINY, BFLOAT16, "--reduction.image", IMAGES.format("grid", "Grid"))
    ),
    "clipa, block": (
        CLIPA, "demo", (*TINY, BFLOAT16, "--reduction.image", IMAGES.format("block", "Block"))
    ),
    "clusters": (CLUSTERS, "demo", (*TINY, BFLOAT16, "--reduction.image.threshold=0.5")),
    "clusters by embeddings, float32, mean": (
        CLUSTERS, "demo",
        (*TINY, "--reduction.image.threshold=0.5", "--reduction.image.use-embeddings",
         "--model.image.pooling=mean"),
    ),
    "cit": (CIT, "demo", (*TINY, BFLOAT16)),
    "cit, projector alone": (
        CIT, "demo",
        (*TINY, BFLOAT16, "--objective.train-image=head", "--model.image.projector-width=24",
         "--model.image.projector-outputs=12"),
    ),
    "milan": (MILAN, "demo", (*PRETRAIN, BFLOAT16)),
    "milan, recomputed, float32": (MILAN, "demo", (*PRETRAIN, "--engine.checkpoint-activations")),
    "mae": (MILAN, "demo-pixels", (*PRETRAIN, BFLOAT16)),
    "fine-tuning": (
        FINE_TUNING, "demo", (*ENCODER, BFLOAT16, "--objective.erasing.probability=0.25")
    ),
    "probing": (LINEAR_PROBING, "demo", (*ENCODER, BFLOAT16)),
    "segmentation": (SEGMENTATION, "demo", (BFLOAT16, "--batch-size=24")),
}  # fmt: skip
READS = {
    "flip 75 %, packed text": {"Packed.of": 1},
    "flip, recomputed, drop path": {"Packed.of": 1},
    # two chunks, each encoded twice
    "flip, float16, cached": {"Packed.of": 4},
    "flip, sigmoid": {"Packed.of": 1},
    "flip, tokens told, Muon": {"Packed.of": 1},
    "clipa, colors": {"Packed.of": 1},
    "clipa, grid": {"Packed.of": 1},
    "clipa, block": {"Packed.of": 1},
    "clusters": {"KeptPatches.where": 1, "Packed.of": 2},
    "clusters by embeddings, float32, mean": {"KeptPatches.where": 1, "Packed.of": 2},
    "cit": {"Packed.of": 1},
    "cit, projector alone": {"Packed.of": 1},
}
"""How often a step waits, where tokens are packed: for their number, before the blocks begin."""


def recipe_of(case: str) -> Recipe:
    recipes, name, words = CASES[case]
    words = (name, *words, "--data.train=nowhere")
    return read_command_line(recipes, program="test", arguments=words)[1]


def teacher_of(recipe: Recipe) -> FrozenTeacher:
    """A small tower of random weights, as it would be read from a file."""
    image: ImageTower = recipe.model.image
    tower = replace(image, width=24, depth=2, heads=2, mlp_width=48, positions="learned")
    built = tower.module(20)
    built.initialize(torch.Generator().manual_seed(0))
    stored = ImageEncoder(tower, built.state_dict(), "a test")
    return FrozenTeacher(stored, pixels_mean=image.mean, pixels_std=image.std)


@pytest.fixture
def objective_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Objective]:
    """Builds the objective of a recipe, with a teacher that is in no file."""

    def build(recipe: Recipe) -> Objective:
        monkeypatch.setattr(milan, "load_teacher", lambda *_: teacher_of(recipe))
        return recipe.objective.build(recipe)

    return build


def batch_of(recipe: Recipe) -> Batch:
    """Random samples of which one is damaged."""
    generator = torch.Generator().manual_seed(0)
    inputs = recipe.model.inputs()
    height, width = inputs.height_width
    valid = torch.ones(SAMPLES, dtype=torch.bool)
    valid[1] = False
    batch = Batch(
        images=torch.randint(0, 256, (SAMPLES, 3, height, width), generator=generator).byte(),
        sample_numbers=torch.arange(SAMPLES),
        valid=valid,
        labels=torch.randint(0, 7, (SAMPLES,), generator=generator),
    )
    if isinstance(recipe.model, SegmenterConfig):
        pixels = torch.randint(0, 7, (SAMPLES, height, width), generator=generator).byte()
        return replace(batch, labels=pixels)
    if inputs.captions is None:
        return batch
    length = inputs.captions.length
    return replace(
        batch,
        token_ids=torch.randint(1, 60, (SAMPLES, length), generator=generator),
        text_lengths=torch.randint(1, length + 1, (SAMPLES,), generator=generator),
    )


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    """Accelerate keeps the first device that a process asks it for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_cuda() as opened:
        yield opened
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Parts:
    """What a step is taken of."""

    recipe: Recipe
    objective: Objective
    batch: Batch

    def on(self, gpu: FakeCuda) -> tuple[AccelerateEngine, Batch]:
        """Everything on a GPU."""
        gpu.put_module(self.objective)
        if isinstance(getattr(self.objective, "target", None), FeatureTarget):
            gpu.put_module(self.objective.target.teacher.tower)
        return AccelerateEngine(self.objective, self.recipe, RUN), gpu.put_batch(self.batch)


@pytest.fixture
def parts(request: pytest.FixtureRequest, objective_of: Callable[[Recipe], Objective]) -> Parts:
    """Of the case of a test, on the CPU: built before there is a GPU."""
    recipe = recipe_of(request.node.callspec.params["case"])
    return Parts(recipe, objective_of(recipe), batch_of(recipe))


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(case: str, parts: Parts, gpu: FakeCuda) -> None:
    engine, batch = parts.on(gpu)
    average = WeightAverage(engine, 0.9)
    recipe = parts.recipe
    with gpu.watched():
        metrics = train_step(engine, recipe, 1, [batch] * recipe.engine.accumulate, average)
    assert dict(gpu.declared) == READS.get(case, {})
    on = {metrics.means.device, metrics.norm.device}
    on |= {value.device for state in engine.moments() for value in state.values()}
    on |= {value.device for value in engine.objective.state_dict().values()}
    assert on == {CUDA}


@pytest.mark.parametrize("case", ["clusters"])
def test_the_kernel_is_that_of_a_gpu(case: str, parts: Parts, gpu: FakeCuda) -> None:
    asked = list[str]()
    gpu.listeners.append(lambda func, args: asked.append(str(func)))
    engine, batch = parts.on(gpu)
    engine.backward(engine.forward(batch)[0])
    assert attention_kernel(CUDA, head_width=16) == "xformers.ops.memory_efficient_attention"
    # the image tower pools the mean, the text tower one token, whose last block asks for one query
    assert "xformers_flash.flash_fwd.default" in asked
    assert "xformers_flash.flash_bwd.default" in asked
    # of packed tokens boundaries are handed over: nothing is padded to (B, L)
    dense = [name for name in asked if "scaled_dot_product" in name]
    assert len(dense) <= 4  # the pooled tokens of the last blocks, forward and backward


def test_an_xformers_without_kernels_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with fake_cuda(xformers=False), caplog.at_level("WARNING", "frugal"):
        assert "xformers" not in attention_kernel(CUDA)
    # as xformers 0.0.35 says it beside a torch that is built for CUDA 13
    assert "bfloat16 with heads of 64 channels here (xFormers wasn't build with CUDA" in caplog.text


@pytest.mark.parametrize(
    "case", ["flip 75 %, packed text", "clusters", "milan", "mae", "segmentation"]
)
def test_pictures_are_drawn_of_what_is_on_the_device(
    case: str, parts: Parts, gpu: FakeCuda
) -> None:
    _, batch = parts.on(gpu)
    parts.objective.draw_reduction(batch)
    picture = parts.objective.draw(batch)
    assert picture is not None and picture.shape[0] == 3


@pytest.mark.parametrize("case", ["clusters"])
def test_a_threshold_is_searched_on_the_device(case: str, parts: Parts, gpu: FakeCuda) -> None:
    _, batch = parts.on(gpu)
    reduction = replace(parts.recipe.reduction.image, threshold=None)
    views = [parts.objective.patch_view(batch)] * 20
    # every number that is read is 1 here, so that the search ends without a threshold
    with pytest.raises(InputError, match=r"masks 50\.00% of the patches on average"):
        reduction.calibrate(views, gather=lambda value: [value], log=RUN.log)


@pytest.fixture
def world_of_8() -> Iterator[None]:
    """Seven other processes that say nothing."""
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_8")
@pytest.mark.parametrize("loss", ["softmax", "one direction", "sigmoid"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_loss_of_8_processes_waits_for_nothing(
    loss: str, chunk: int | None, gpu: FakeCuda
) -> None:
    images, texts = (
        torch.randn(SAMPLES, 16, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    scale, bias = (torch.zeros(1, device=CUDA, requires_grad=True) for _ in range(2))
    valid = torch.ones(SAMPLES, device=CUDA).bool()
    with gpu.watched(), torch.autocast("cuda", torch.bfloat16):
        if loss == "sigmoid":
            found = sigmoid_loss(images, texts, scale, bias, valid=valid, chunk=chunk)
        else:
            sides = (
                ("image_to_text",)
                if loss == "one direction"
                else ("image_to_text", "text_to_image")
            )
            found = contrastive_loss(
                images, texts, scale, valid=valid, chunk=chunk, directions=sides
            )
        found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert {images.grad.device, texts.grad.device, scale.grad.device} == {CUDA}


@pytest.mark.usefixtures("world_of_8")
@pytest.mark.parametrize("case", ["milan", "probing", "cit, projector alone"])
def test_what_8_processes_share_beside_the_loss_waits_for_nothing(
    case: str, parts: Parts, gpu: FakeCuda
) -> None:
    gpu.put_module(parts.objective)
    if case == "milan":
        gpu.put_module(parts.objective.target.teacher.tower)
    batch = gpu.put_batch(parts.batch)
    with gpu.watched(), torch.autocast("cuda", torch.bfloat16):
        loss, _ = parts.objective(batch)
        loss.backward()
    assert loss.device == CUDA


def reading(view, noise):
    if noise.uniform("some", 1).sum().item() > 0:
        return None


def by_a_list_of_the_host(view, noise):
    return KeptPatches.dense(noise.uniform("some", 4).argsort(1)[:, [0, 2]])


def by_an_index_of_the_cpu(view, noise):
    return KeptPatches.dense(noise.uniform("some", 4).argsort(1)[:, torch.arange(2)])


def on_the_cpu(view, noise):
    return KeptPatches.dense(torch.arange(2).expand(len(view.images), 2))


def copied_from_the_host(view, noise):
    return KeptPatches.dense(torch.tensor([[0, 1]] * len(view.images), device=view.device))


def filled_by_the_host(view, noise):
    return KeptPatches.dense(noise.sample_numbers.new_tensor([[0, 1]] * len(view.images)))


def of_any_shape(view, noise):
    return KeptPatches.packed(view.images[view.images > 3].long(), noise.sample_numbers)


def over_the_host(view, noise):
    return KeptPatches.dense(noise.sample_numbers.cpu()[:, None].to(view.device))


def synchronized(view, noise):
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "mistake",
    [reading, by_a_list_of_the_host, by_an_index_of_the_cpu, on_the_cpu, copied_from_the_host,
     filled_by_the_host, of_any_shape, over_the_host, synchronized],
)  # fmt: skip
@pytest.mark.parametrize("case", ["flip 50 %, float32"])
def test_mistakes_are_caught(
    case: str, mistake: Callable, parts: Parts, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomMasking, "keep", lambda self, view, noise: mistake(view, noise))
    engine, batch = parts.on(gpu)
    caught = pytest.raises(
        (AssertionError, FakeTensorDeviceMismatchError), match=r"read|wait|devices|tensors on"
    )
    with gpu.watched(), caught:
        train_step(engine, parts.recipe, 1, [batch])


def test_a_mistake_of_the_backward_pass_is_caught(gpu: FakeCuda) -> None:
    values = torch.ones(3, device=CUDA, requires_grad=True)
    values.register_hook(lambda gradient: gradient * float(gradient.sum()))
    with gpu.watched(), pytest.raises(AssertionError, match="reads the device"):
        values.sum().backward()
