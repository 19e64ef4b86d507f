"""The contrastive objective, and the caching of its gradients."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contrastive_cases import MODEL, SIGMOID, Engine, Uneven, batch_of, gradients, objective, recipe

from frugal.common.engine.engine import prepare_towers
from frugal.common.errors import InputError
from frugal.common.models.flops import dual_encoder_flops
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.objectives.contrastive_loss import BOTH, contrastive_loss, sigmoid_loss
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import EngineOptions, RunOptions
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import KeepAll, PatchView
from frugal.common.reduction.random_masking import RandomMasking

# ------------------------------------------------------------------------------------------------
# The objective


def test_loss_is_that_of_the_encoded_pairs_with_the_samples_own_masks() -> None:
    mine, batch = objective(), batch_of()
    loss, metrics = mine(batch)
    noise = SampleNoise(3, batch.sample_numbers)
    kept = RandomMasking(mask_ratio=0.5).keep(PatchView(batch.images, 4), noise=noise)
    images = mine.model.encode_image(batch.images, kept)
    texts = mine.model.encode_text(batch.token_ids, batch.text_lengths)
    expected = contrastive_loss(images, texts, mine.model.logit_scale, valid=batch.valid)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(metrics["accuracy"], expected.accuracy)
    whole = contrastive_loss(
        mine.model.encode_image(batch.images), texts, mine.model.logit_scale, valid=batch.valid
    )
    assert loss != whole.loss


def test_masks_belong_to_samples_and_not_to_their_place_in_a_batch() -> None:
    mine, batch = objective(), batch_of()
    encoded = mine(batch, encode_only=True)
    part = mine(batch.rows(3, 6), encode_only=True)
    torch.testing.assert_close(part.images, encoded.images[3:6])
    moved = replace(batch, sample_numbers=batch.sample_numbers + 1)
    assert (mine(moved, encode_only=True).images - encoded.images).abs().min(1).values.max() > 1e-4


@pytest.mark.parametrize("directions", [BOTH, BOTH[:1], BOTH[1:]])
def test_directions_reach_the_loss(directions: tuple) -> None:
    mine, batch = objective(Contrastive(directions=directions, chunk=2)), batch_of()
    encoded = mine(batch, encode_only=True)
    expected = contrastive_loss(
        encoded.images, encoded.texts, encoded.log_scale, valid=batch.valid, directions=directions
    )
    torch.testing.assert_close(mine(batch)[0], expected.loss)


def test_the_sigmoid_loss_uses_the_models_bias() -> None:
    mine, batch = objective(Contrastive(loss="sigmoid"), model=SIGMOID), batch_of()
    encoded = mine(batch, encode_only=True)
    expected = sigmoid_loss(
        encoded.images, encoded.texts, encoded.log_scale, encoded.logit_bias, valid=batch.valid
    )
    loss, _ = mine(batch)
    loss.backward()
    assert torch.equal(loss, expected.loss)
    assert mine.model.logit_bias is not None and mine.model.logit_bias.grad is not None


@pytest.mark.parametrize(("clamp", "bounded"), [("after_step", True), ("forward", False)])
def test_the_scale_is_held_in_the_parameter_or_in_the_forward_pass(
    clamp: Any, bounded: bool
) -> None:
    mine, batch = objective(Contrastive(clamp=clamp)), batch_of()
    with torch.no_grad():
        mine.model.logit_scale.fill_(5.5)
    loss, metrics = mine(batch)
    loss.backward()
    assert mine.model.logit_scale.grad is not None
    if bounded:
        assert mine.bounds() == {"model.logit_scale": (0.0, math.log(100))}
        assert mine.get_parameter("model.logit_scale") is mine.model.logit_scale
        assert mine.model.logit_scale.grad != 0
        assert metrics["logit_scale"].item() == pytest.approx(math.exp(5.5), rel=1e-6)
    else:
        assert mine.bounds() == {}
        assert mine.model.logit_scale.grad == 0
        assert metrics["logit_scale"].item() == pytest.approx(100, rel=1e-5)


def test_metrics_count_the_tokens_that_the_towers_saw() -> None:
    batch = batch_of()
    lengths = batch.text_lengths.float().mean().item()  # type: ignore[union-attr]
    packed = replace(MODEL, text=replace(MODEL.text, packed=True))
    filled = replace(MODEL, text=replace(MODEL.text, causal=False, pooling="first"))
    no_class = replace(MODEL, image=replace(MODEL.image, class_token="none"))
    cases = [
        (MODEL, RandomMasking(mask_ratio=0.5), 5, 5, 0.5),
        (MODEL, KeepAll(), 9, 5, 0.0),
        (MODEL, Uneven(), 5, 5, 0.5),  # 1 to 7 patches of 8, and the class token
        (packed, Uneven(), 5, lengths, 0.5),
        (filled, KeepAll(), 9, 6, 0.0),
        (no_class, KeepAll(), 8, 5, 0.0),
    ]
    for model, reduction, image_tokens, text_tokens, ratio in cases:
        mine = objective(model=model, reduction=SimpleNamespace(image=reduction))
        _, metrics = mine(batch)
        assert metrics["image_tokens"].item() == pytest.approx(image_tokens)
        assert metrics["text_tokens"].item() == pytest.approx(text_tokens)
        assert metrics["mask_ratio"].item() == pytest.approx(ratio)
        assert not any(value.requires_grad or value.ndim for value in metrics.values())
        patches = image_tokens - (model.image.class_token != "none")
        forward = dual_encoder_flops(model, patches=patches, tokens=text_tokens)
        means = {name: value.item() for name, value in metrics.items()}
        assert mine.step_flops(means) == pytest.approx(3 * forward)


def test_picture_shows_images_above_what_the_tower_sees() -> None:
    mine, batch = objective(reduction=SimpleNamespace(image=Uneven())), batch_of(3)
    picture = torch.from_numpy(mine.draw(batch))
    assert picture.shape == (3, 16, 48)
    assert picture.dtype == torch.uint8
    for place in range(3):
        above, below = picture[:, :, place * 16 : (place + 1) * 16].split(8, dim=1)
        assert torch.equal(above, batch.images[place])
        for patch in range(8):
            row, column = patch // 4 * 4, patch % 4 * 4
            cell = below[:, row : row + 4, column : column + 4]
            same = above[:, row : row + 4, column : column + 4]
            assert torch.equal(cell, same if patch <= place else torch.full_like(cell, 128))


def test_pictures_of_normalized_images_show_their_colors() -> None:
    mine, batch = objective(reduction=SimpleNamespace(image=KeepAll())), batch_of(2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MODEL.image.mean, MODEL.image.std))
    normalized = replace(batch, images=(batch.images / 255 - mean) / std)
    assert (mine.draw(normalized) == mine.draw(batch)).all()


def test_a_batch_without_captions_is_refused() -> None:
    with pytest.raises(InputError, match="needs captions, but the data has none"):
        objective()(replace(batch_of(), token_ids=None))


# ------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_samples_of_a_group_are_no_strangers_where_that_is_asked_for(loss: Any) -> None:
    model, batch = (SIGMOID if loss == "sigmoid" else MODEL), batch_of()
    found = {}
    for positives in ("partner", "equal_captions", "group"):
        mine = objective(Contrastive(loss=loss, positives=positives), model=model)  # type: ignore[arg-type]
        found[positives] = mine(batch)[0].item()
    assert found["equal_captions"] == found["group"] != found["partner"]
    alone = objective(Contrastive(loss=loss, positives="group"), model=model)
    assert alone(replace(batch, groups=batch.sample_numbers))[0].item() == found["partner"]


def test_data_that_tell_no_groups_are_refused() -> None:
    mine = objective(Contrastive(positives="equal_captions"))
    with pytest.raises(InputError, match="the data tell no groups of samples; choose partner"):
        mine(replace(batch_of(), groups=None))
    with pytest.raises(InputError, match=r"objective\.positives is 'all'; choose from"):
        Contrastive(positives="all")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------
# Gradient caching


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(
    "config",
    [
        Contrastive(),
        Contrastive(directions=BOTH[:1], clamp="forward"),
        Contrastive(loss="sigmoid"),
        Contrastive(positives="equal_captions"),
    ],
    ids=["softmax", "image_to_text", "sigmoid", "groups"],
)
def test_cached_gradients_equal_those_of_the_whole_batch(chunk: int, config: Contrastive) -> None:
    model = SIGMOID if config.loss == "sigmoid" else MODEL
    batch = batch_of()
    whole, cached = (
        objective(config, model=model, reduction=SimpleNamespace(image=reduction))
        for reduction in (RandomMasking(mask_ratio=0.5), RandomMasking(mask_ratio=0.5))
    )
    loss, metrics = whole(batch)
    (loss * 0.25).backward()
    found = cached_backward(Engine(cached), batch, chunk, 0.25, last=True)
    torch.testing.assert_close(found.pop("loss"), loss.detach())
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(found[name], value)
    expected = gradients(whole)
    assert expected.keys() == gradients(cached).keys()
    for name, gradient in gradients(cached).items():
        # float32 rounds sums by their largest terms, so an entry near zero has no bound of its own
        bound = 1e-5 * expected[name].abs().max().item() + 1e-8
        torch.testing.assert_close(gradient, expected[name], rtol=0.0, atol=bound, msg=name)


def test_caching_replays_what_the_model_draws() -> None:
    model = replace(MODEL, image=replace(MODEL.image, drop_path=0.6))
    batch = batch_of(12)
    whole, cached = objective(model=model), objective(model=model)
    torch.manual_seed(11)
    whole(batch)[0].backward()
    after = torch.rand(3)
    torch.manual_seed(11)
    cached_backward(Engine(cached), batch, len(batch), 1.0, last=True)
    assert torch.equal(torch.rand(3), after)
    for name, gradient in gradients(cached).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-4, atol=1e-6)


def test_both_passes_of_caching_encode_every_chunk_alike() -> None:
    model = replace(MODEL, image=replace(MODEL.image, drop_path=0.6))
    mine, seen = objective(model=model), []
    encode = mine._encode
    mine._encode = lambda batch: seen.append(encode(batch)) or seen[-1]  # type: ignore
    cached_backward(Engine(mine), batch_of(12), 5, 1.0, last=True)
    assert len(seen) == 6
    assert not torch.equal(seen[0].images, seen[1].images)
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first.images, second.images)


@pytest.mark.parametrize("last", [True, False])
def test_only_the_last_chunk_of_a_step_ends_its_accumulation(last: bool) -> None:
    engine = Engine(objective())
    cached_backward(engine, batch_of(7), 3, 1.0, last=last)
    assert engine.marks == [False, False, last]


# ------------------------------------------------------------------------------------------------
# The configuration


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = objective().state_dict()
    torch.manual_seed(2)
    same, other = objective().state_dict(), objective(run=RunOptions(seed=4)).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.text.pos_embed"], other["model.text.pos_embed"])


def test_engine_options_reach_the_towers() -> None:
    options = EngineOptions(checkpoint_activations=True, compile=True)
    mine = objective(engine=options)
    prepare_towers(mine, options)
    assert mine.model.checkpoint_activations
    assert not objective().model.checkpoint_activations
    for tower in (mine.model.image, mine.model.text):
        assert "_encode" in vars(tower)  # compiled in the place of the method
    assert mine.state_dict().keys() == objective().state_dict().keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"directions": ()}, "name image_to_text, text_to_image or both, each once"),
        ({"directions": BOTH[:1] * 2}, "name image_to_text, text_to_image or both, each once"),
        ({"loss": "sigmoid", "directions": BOTH[:1]}, "loss=sigmoid has no directions"),
        ({"chunk": 0}, "objective.chunk is 0, must be at least 1"),
    ],
)
def test_a_contradictory_loss_is_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Contrastive(**values)


def test_a_model_or_data_that_does_not_fit_the_loss_is_refused() -> None:
    softmax, sigmoid = Contrastive(), Contrastive(loss="sigmoid")
    softmax.check(recipe(softmax))
    sigmoid.check(recipe(sigmoid, model=SIGMOID))
    with pytest.raises(InputError, match=r"loss=sigmoid does not go with .*logit_bias=None"):
        sigmoid.check(recipe(sigmoid))
    with pytest.raises(InputError, match=r"loss=softmax does not go with .*logit_bias=-10"):
        softmax.check(recipe(softmax, model=SIGMOID))
    with pytest.raises(InputError, match=r"data\.tokenizer is None"):
        softmax.check(recipe(softmax, data=SimpleNamespace(caption_tokenizer=None)))


def test_a_configuration_survives_json() -> None:
    config = Contrastive(directions=("text_to_image",), clamp="forward", chunk=64)
    assert from_json(to_json(config)) == config
