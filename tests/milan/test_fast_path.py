"""The path that trains and the readable one are the same function."""

from dataclasses import replace

import pytest
import reference_milan as readable
import torch

from frugal.common.contracts import Batch
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.reduction.random_masking import RandomMasking
from frugal.milan.decoders import DecoderConfig, Split
from frugal.milan.model import MaskedModel, build, encoder
from frugal.milan.objective import Reconstruction
from frugal.milan.semantic_sampling import SemanticSampling
from frugal.milan.targets import FeatureTarget, PixelTarget, unit_distance
from frugal.milan.teacher import FrozenTeacher
from host_reads import nothing_is_read

IMAGE = encoder("S/8", image_size=(24, 56), width=48, depth=3, heads=3, mlp_width=192)  # 3 x 7
VARIANTS = [
    (kind, target, sampling)
    for kind in ("prompting", "plain")
    for target, sampling in (
        ("features", SemanticSampling),
        ("features", RandomMasking),
        ("pixels", RandomMasking),
        ("raw pixels", RandomMasking),
    )
]


def randomized(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def make_teacher(image: ImageTower = IMAGE) -> FrozenTeacher:
    tower = replace(
        image, width=32, depth=2, heads=2, mlp_width=64, positions="learned", pre_norm=True
    )
    generator = torch.Generator().manual_seed(11)
    weights = ImageEncoder(tower, {"projection.weight": torch.zeros(20, 32)}, "a test")
    names = dict.fromkeys(weights.missing())
    with torch.device("meta"):
        from frugal.common.models.vit import ImageTransformer

        shapes = {n: t.shape for n, t in ImageTransformer(tower, 20).state_dict().items()}
    state = {n: torch.randn(shapes[n], generator=generator) * 0.2 for n in [*names, *weights.state]}
    return FrozenTeacher(
        replace(weights, state=state), pixels_mean=tower.mean, pixels_std=tower.std
    )


def make_objective(kind: str, target: str, sampling, *, ratio: float = 0.7) -> Reconstruction:
    wanted = (
        FeatureTarget(make_teacher())
        if target == "features"
        else PixelTarget(IMAGE, normalize_patches=target == "pixels")
    )
    config = MaskedModel(image=IMAGE, decoder=DecoderConfig(kind=kind, width=32, depth=3, heads=4))
    model = build(config, torch.Generator().manual_seed(2), outputs=wanted.outputs)
    randomized(model, 3)
    return Reconstruction(model, wanted, reduction=sampling(mask_ratio=ratio), seed=5)


def make_batch(count: int = 4, device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, 3, 24, 56), generator=generator, dtype=torch.uint8)
    batch = Batch(
        images=images,
        sample_numbers=torch.arange(40, 40 + count),
        valid=torch.ones(count, dtype=torch.bool),
    )
    return batch.to(device)


def readable_loss(objective: Reconstruction, batch: Batch) -> torch.Tensor:
    view, noise = objective.patch_view(batch)
    split = Split.of(objective.reduction.keep(view, noise=noise), view.num_patches)
    predicted = readable.predict(objective.model, batch.images, split)
    if isinstance(objective.target, FeatureTarget):
        wanted = readable.teach(objective.target.teacher.tower, batch.images)[0]
        return readable.feature_loss(predicted, wanted)
    pixels = readable.cut(batch.images, IMAGE)
    normalize = objective.target._normalize_patches
    return readable.pixel_loss(predicted[:, 1:], pixels, split, normalize_patches=normalize)


def gradients(objective: Reconstruction) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in objective.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), "a parameter has no gradient"
    objective.zero_grad()
    return found


@pytest.mark.parametrize(("kind", "target", "sampling"), VARIANTS)
def test_loss_and_every_gradient_agree_with_the_readable_path(kind, target, sampling):
    objective, batch = make_objective(kind, target, sampling), make_batch()
    expected = readable_loss(objective, batch)
    expected.backward()
    plain = gradients(objective)
    for recompute in (False, True):
        objective.model.checkpoint_activations = recompute
        loss, _ = objective(batch)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        for name, gradient in gradients(objective).items():
            assert (gradient - plain[name]).abs().max() < 1e-5, name


def test_the_distance_of_unit_vectors_has_the_gradient_that_autograd_finds():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5, 7, 3, generator=generator, dtype=torch.float64).unbind()
    left.requires_grad_()
    assert torch.autograd.gradcheck(unit_distance, (left, right))
    plain = torch.nn.functional.normalize(left, dim=-1) - torch.nn.functional.normalize(
        right, dim=-1
    )
    torch.testing.assert_close(unit_distance(left, right), plain.square().sum(-1))
    half = left.detach().to(torch.bfloat16).requires_grad_()
    distance = unit_distance(half, right.to(torch.bfloat16))
    distance.sum().backward()
    assert distance.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    # a prediction of zeros has no direction; the loss is that of a right angle, and finite
    zeros = torch.zeros(1, 3, requires_grad=True)
    distance = unit_distance(zeros, torch.ones(1, 3))
    distance.sum().backward()
    assert distance.item() == 2 and zeros.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "target", "sampling"), VARIANTS)
def test_a_step_reads_nothing_on_the_host(kind, target, sampling):
    objective, batch = make_objective(kind, target, sampling), make_batch()
    with nothing_is_read():
        loss, _ = objective(batch)
        loss.backward()
    with pytest.raises(AssertionError, match="reads the device"), nothing_is_read():
        loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "target", "sampling"), VARIANTS)
def test_on_a_gpu_a_step_waits_for_nothing_and_agrees_with_the_cpu(kind, target, sampling):
    objective, batch = make_objective(kind, target, sampling), make_batch()
    expected, _ = objective(batch)
    expected.backward()
    on_cpu = gradients(objective)
    objective.cuda()
    batch = batch.to("cuda")
    objective(batch)  # the teacher moves, kernels are chosen
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = objective(batch)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in gradients(objective).items():
        assert (gradient.cpu() - on_cpu[name]).abs().max() < 1e-4, name


def test_the_teacher_belongs_to_nobody():
    objective = make_objective("prompting", "features", SemanticSampling)
    owned = [*objective.state_dict(), *dict(objective.named_parameters())]
    assert not [name for name in owned if "teacher" in name or "target" in name]
    assert not [m for m in objective.modules() if m is objective.target.teacher.tower]
    assert not any(p.requires_grad for p in objective.target.teacher.tower.parameters())


def test_what_a_sample_gives_does_not_depend_on_its_batch():
    objective, batch = make_objective("prompting", "features", SemanticSampling), make_batch()
    whole = objective._predict(batch)[2]
    for row in range(len(batch)):
        part = objective._predict(batch.rows(row, row + 1))[2]
        torch.testing.assert_close(part, whole[row : row + 1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_it_gives_the_same_numbers():
    plain = make_objective("prompting", "features", SemanticSampling)
    compiled = make_objective("prompting", "features", SemanticSampling)
    for module in (compiled.model.image, compiled.model.decoder):
        module.compile(backend="aot_eager")
    batch = make_batch()
    losses = []
    for objective in (plain, compiled):
        loss, _ = objective(batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    ours, theirs = gradients(plain), gradients(compiled)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() < 1e-5, name
