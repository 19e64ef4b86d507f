"""Encoder, both decoders and both losses against recorded runs of the reference models."""

import pytest
import reference_milan as readable
import torch
import torchvision.transforms.functional as tf
from golden_cases import case, in_image_order

from frugal.common.contracts import Batch
from frugal.common.randomness import RecordedNoise, uniform_noise
from frugal.common.reduction.image import KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.milan.decoders import PromptingDecoder, Split
from frugal.milan.objective import Reconstruction
from frugal.milan.targets import FeatureTarget, PixelTarget, TargetValues

# float32: stated with the recordings; float64: they were rounded to float32 once
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-6, "atol": 1e-6}}
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-6}
FEATURES = ["milan_core", "milan_random_mask"]
ALL = [*FEATURES, "mae_pixel_normpix"]
DTYPES = [torch.float32, torch.float64]


def fast_losses(recorded, predicted, split, dtype):
    """(B, T) of predictions in the order of the decoder."""
    images = recorded.get("input/images", dtype)
    if recorded.about["use_clip"]:
        wanted = TargetValues(recorded.get("input/teacher_tokens", dtype), None)
        return FeatureTarget.losses(None, predicted, wanted, split)  # type: ignore[arg-type]
    target = PixelTarget(
        recorded.published.model.image, normalize_patches=recorded.about["norm_pix"]
    )
    return target.losses(predicted, TargetValues(images, None), split)


def shuffled(split: Split) -> Split:
    """The same split with other orders of its two parts."""
    return Split(split.visible.flip(1), split.hidden.flip(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_latent_prediction_loss_and_gradients_are_the_recorded_ones(name, dtype):
    recorded = case(name)
    model, split = recorded.model(dtype), recorded.split
    images = recorded.get("input/images", dtype)
    latent = model.image.forward_tokens(images, KeptPatches.dense(split.visible))
    close = CLOSE[dtype]
    torch.testing.assert_close(latent, recorded.get("out/latent", dtype), **close)
    predicted = model(images, split)
    expected = recorded.get("out/pred", dtype)
    in_order = in_image_order(predicted, split)
    if not recorded.about["use_clip"]:
        in_order = in_order[:, 1:]
    torch.testing.assert_close(in_order, expected, **close)

    pixels = not recorded.about["use_clip"]
    for order in (split, shuffled(split)):
        model.zero_grad()
        predicted = model(images, order, hidden_only=pixels)
        loss = fast_losses(recorded, predicted, order, dtype).mean()
        loss.backward()
        assert loss.item() == pytest.approx(recorded.about["loss"], rel=GRADIENT[dtype])
        found = recorded.gradients(model)
        checked = 0
        for key, tensor in recorded.tensors.items():
            if key.startswith("grad/"):
                tensor = tensor.to(dtype)
                ours = found[key.removeprefix("grad/")]
                distance = (ours - tensor).norm() / tensor.norm()
                assert distance < GRADIENT[dtype], key
                checked += 1
        assert checked >= 4
        for key, norm in recorded.about["grad_norms"].items():
            assert found[key].norm().item() == pytest.approx(norm, rel=GRADIENT[dtype]), key


@pytest.mark.parametrize("name", ALL)
def test_the_readable_way_gives_the_recorded_numbers_too(name):
    recorded, dtype = case(name), torch.float64
    model, split = recorded.model(dtype), recorded.split
    images = recorded.get("input/images", dtype)
    predicted = readable.predict(model, images, split)
    first = 0 if recorded.about["use_clip"] else 1
    torch.testing.assert_close(
        predicted[:, first:], recorded.get("out/pred", dtype), **CLOSE[dtype]
    )
    if recorded.about["use_clip"]:
        loss = readable.feature_loss(predicted, recorded.get("input/teacher_tokens", dtype))
    else:
        pixels = readable.cut(images, model.config.image)
        loss = readable.pixel_loss(predicted[:, 1:], pixels, split, normalize_patches=True)
    assert loss.item() == pytest.approx(recorded.about["loss"], rel=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_fixed_tokens_and_the_first_block_are_the_recorded_ones(name):
    recorded, dtype = case(name), torch.float64
    model, split = recorded.model(dtype), recorded.split
    decoder = model.decoder
    assert isinstance(decoder, PromptingDecoder)
    seen = {}
    decoder.blocks[0].register_forward_hook(
        lambda block, given, made: seen.update(before=given[0], after=made)
    )
    decoder.register_forward_pre_hook(lambda block, given: seen.update(latent=given[0]))
    decoder.norm.register_forward_pre_hook(lambda block, given: seen.update(tokens=given[0]))
    model(recorded.get("input/images", dtype), split)
    positions = decoder.pos_embed[0][split.order[:, : 1 + split.visible.shape[1]]]
    fixed = decoder.embed(seen["latent"]) + positions
    for ours, key in (
        (fixed, "mid/fixed_tokens"),
        (seen["before"], "mid/decoder_block0_in"),
        (seen["after"], "mid/decoder_block0_out"),
        (in_image_order(seen["tokens"], split), "mid/decoder_before_norm"),
    ):
        torch.testing.assert_close(ours, recorded.get(key, dtype), **CLOSE[dtype])


@pytest.mark.parametrize("name", ["milan_random_mask", "mae_pixel_normpix"])
def test_uniform_masking_keeps_what_the_recorded_noise_keeps(name):
    recorded = case(name)
    noise = RecordedNoise({"image mask": recorded.tensors["mask/noise"]})
    view = PatchView.of(recorded.tensors["input/images"], recorded.published.model.image)
    kept = RandomMasking(mask_ratio=recorded.about["mask_ratio"]).keep(view, noise=noise)
    assert torch.equal(kept.index, recorded.split.visible)
    split = Split.of(kept, view.num_patches)
    assert torch.equal(split.hidden.sort(1).values, recorded.split.hidden.sort(1).values)
    hidden = torch.zeros(len(kept.index), view.num_patches).scatter_(1, split.hidden, 1)
    assert torch.equal(hidden, recorded.tensors["mask/mask"])
    assert torch.equal(readable.restoring(recorded.split), recorded.tensors["mask/ids_restore"])


def test_a_split_of_an_uneven_grid_is_a_partition():
    index = uniform_noise(1, torch.arange(5), 15).argsort(1)[:, :4]
    split = Split.of(KeptPatches.dense(index), 15)
    both = torch.cat((split.visible, split.hidden), dim=1).sort(1).values
    assert torch.equal(both, torch.arange(15).expand(5, -1))
    assert split.order[:, 0].eq(0).all() and torch.equal(split.order[:, 1:5], index + 1)


def test_a_batch_has_the_mean_loss_of_its_undamaged_images_by_the_readable_way():
    recorded = case("mae_pixel_normpix")
    model, image = recorded.model(), recorded.published.model.image
    masking = RandomMasking(mask_ratio=0.75)
    target = PixelTarget(image, normalize_patches=True)
    objective = Reconstruction(model, target, reduction=masking, seed=3)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        images=torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        sample_numbers=torch.tensor([7, 8, 9, 10]),
        valid=torch.tensor([True, False, True, True]),
    )
    loss, metrics = objective(batch)
    assert metrics["image_tokens"] == 5 and metrics["mask_ratio"] == 0.75
    view, noise = objective.patch_view(batch)
    split = Split.of(masking.keep(view, noise=noise), 16)
    images = torch.stack([tf.normalize(i / 255, image.mean, image.std) for i in batch.images])
    predicted = readable.predict(model, images, split)[:, 1:]
    pixels = readable.cut(images, image)
    expected = [
        readable.pixel_loss(
            predicted[n : n + 1],
            pixels[n : n + 1],
            Split(split.visible[n : n + 1], split.hidden[n : n + 1]),
            normalize_patches=True,
        ).item()
        for n in (0, 2, 3)
    ]
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
