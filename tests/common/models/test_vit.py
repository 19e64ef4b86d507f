"""Towers: packed equals dense, masked before equals masked after, and what must not matter."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from frugal.common.errors import InputError
from frugal.common.models.blocks import Block, activate
from frugal.common.models.clip import DualEncoderConfig, unit
from frugal.common.models.layout import Layout
from frugal.common.models.text import TextTower, TextTransformer
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.reduction.image import KeptPatches

IMAGE = ImageTower(
    width=24, depth=2, heads=3, mlp_width=40, patch_size=4, image_size=(12, 20), pre_norm=True
)
TEXT = TextTower(width=24, depth=2, heads=3, mlp_width=40, vocabulary=50, length=9)
IMAGE_VARIANTS = [
    {},
    {"class_token": "without_position", "positions": "sincos", "pooling": "mean_all"},
    {"class_token": "none", "pooling": "mean", "patch_bias": False, "pre_norm": False},
    {"pooling": "mean", "norm_after_pooling": True, "positions": "sincos_bigvision"},
    {"norm_after_pooling": True, "layer_scale": 0.2, "activation": "quick_gelu"},
]
TEXT_VARIANTS = [
    {},
    {"pooling": "mean"},
    {"pooling": "first"},
    {"causal": False, "pad_mask": True},
    {"causal": False, "pad_mask": True, "pooling": "mean", "activation": "gelu_tanh"},
    {"causal": False, "pad_mask": True, "pooling": "first", "layer_scale": 0.3},
    {"pad_mask": True},
]


def randomized(tower: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    tower = tower.double().eval()
    with torch.no_grad():
        for weight in tower.parameters():
            weight.normal_(0.0, 0.3, generator=generator)
    return tower


def image_tower(**options) -> ImageTransformer:
    return randomized(ImageTransformer(replace(IMAGE, **options), 8))


def text_tower(**options) -> TextTransformer:
    return randomized(TextTransformer(replace(TEXT, **options), 8))


def pictures(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 12, 20), dtype=torch.uint8, generator=generator)


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded, the highest id last; one is empty, as a damaged sample is."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([9, 1, 4, 0, 6])
    ids = torch.randint(1, 48, (5, 9), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        if length:
            ids[row, length - 1] = 49
    return ids, lengths


def gradients(tower: torch.nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    tower.zero_grad()
    output.sin().sum().backward()
    return {name: weight.grad.clone() for name, weight in tower.named_parameters()}


def assert_equal_with_gradients(tower, one, two) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    expected, ours = gradients(tower, one), gradients(tower, two)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)


UNEQUAL = ([14, 0, 3], [7], [2, 1, 0, 9, 8], list(range(15)))


def unequal_kept() -> KeptPatches:
    return KeptPatches.packed(
        torch.tensor([patch for image in UNEQUAL for patch in image]),
        torch.tensor([len(image) for image in UNEQUAL]),
    )


@pytest.mark.parametrize("options", IMAGE_VARIANTS)
def test_packed_images_equal_each_image_alone(options):
    tower = image_tower(**options)
    images = pictures()
    alone = [
        tower(images[i : i + 1], KeptPatches.dense(torch.tensor([patches])))
        for i, patches in enumerate(UNEQUAL)
    ]
    assert_equal_with_gradients(tower, torch.cat(alone), tower(images, unequal_kept()))


@pytest.mark.parametrize("options", IMAGE_VARIANTS)
def test_tokens_of_packed_images_equal_those_of_each_image_alone(options):
    tower = image_tower(**options)
    images = pictures()
    alone = [
        tower.forward_tokens(images[i : i + 1], KeptPatches.dense(torch.tensor([patches])))[0]
        for i, patches in enumerate(UNEQUAL)
    ]
    packed = tower.forward_tokens(images, unequal_kept())
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", IMAGE_VARIANTS)
def test_dropping_patches_before_the_embedding_equals_dropping_their_tokens(options):
    tower = image_tower(**options)
    images = pictures()
    index = torch.stack(
        [torch.randperm(15, generator=torch.Generator().manual_seed(i))[:6] for i in range(4)]
    )
    kept = KeptPatches.dense(index)

    # embed everything, add positions, then drop: what the papers describe
    tokens, layout = tower.embed(images)  # norms act on single tokens: order is free
    has_class = tower.config.class_token != "none"
    patches = tokens[:, int(has_class) :].gather(1, index.unsqueeze(2).expand(-1, -1, 24))
    tokens = torch.cat((tokens[:, : int(has_class)], patches), dim=1)
    tokens, _ = tower.blocks(tokens, layout)
    if tower.config.pooling == "class":
        tokens = tokens[:, 0]
    expected = tower.projection(tower._pool(tokens, layout))
    assert_equal_with_gradients(tower, expected, tower(images, kept))


def test_the_order_of_kept_patches_does_not_matter():
    tower = image_tower(pooling="mean")
    index = torch.tensor([[3, 14, 7, 1]] * 4)
    one = tower(pictures(), KeptPatches.dense(index))
    torch.testing.assert_close(tower(pictures(), KeptPatches.dense(index.flip(1))), one)


def test_keeping_every_patch_equals_no_reduction():
    tower = image_tower()
    every = KeptPatches.dense(torch.arange(15).expand(4, -1))
    torch.testing.assert_close(tower(pictures(), every), tower(pictures()))


def test_removed_pixels_do_not_matter():
    tower = image_tower()
    kept = KeptPatches.dense(torch.tensor([[0, 7]] * 4))
    images = pictures()
    changed = images.clone()
    changed[:, :, 8:] = 255 - changed[:, :, 8:]  # the last row of patches
    assert torch.equal(tower(changed, kept), tower(images, kept))


def test_an_image_that_keeps_nothing_stays_finite_and_alone():
    tower = image_tower(pooling="mean")
    kept = KeptPatches.packed(torch.tensor([3, 4]), torch.tensor([0, 2, 0, 0]))
    output = tower(pictures(), kept)
    assert torch.all(output.isfinite())
    grads = gradients(tower, output)
    assert all(torch.all(grad.isfinite()) for grad in grads.values())
    alone = tower(pictures()[1:2], KeptPatches.dense(torch.tensor([[3, 4]])))
    torch.testing.assert_close(output[1:2], alone)


def test_the_class_token_alone_is_enough_for_class_pooling():
    tower = image_tower()
    nothing = KeptPatches.packed(torch.zeros(0, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    output = tower(pictures(), nothing)
    torch.testing.assert_close(output, output[:1].expand(4, -1))


def test_uint8_images_are_normalized_with_the_tower_s_mean_and_std():
    tower = image_tower(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).float()
    images = pictures()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tower.config.mean, tower.config.std))
    normalized = (images / 255 - mean) / std
    torch.testing.assert_close(tower(images), tower(normalized), rtol=1e-4, atol=1e-4)
    other = image_tower(mean=(0.3, 0.2, 0.1)).float()
    assert not torch.allclose(other(images), tower(images), atol=1e-2)


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="images of 20x12 pixels reached a tower built for 12x20"):
        image_tower()(pictures().transpose(2, 3))


def test_rows_and_columns_of_positions_are_not_confused():
    tower = image_tower(positions="sincos")
    positions = tower.pos_embed[0, 1:].reshape(3, 5, 24)
    assert torch.equal(positions[0, :, 12:], positions[0, :1, 12:].expand(5, -1))  # row channels
    assert torch.equal(positions[:, 0, :12], positions[:1, 0, :12].expand(3, -1))
    assert not torch.equal(positions[0, 0, :12], positions[0, 1, :12])


@pytest.mark.parametrize(
    ("options", "given"),
    [*((options, True) for options in TEXT_VARIANTS), ({}, False), ({"pooling": "mean"}, False)],
)
def test_packed_captions_equal_padded_ones(options, given):
    padded, packed = text_tower(**options), text_tower(**options, packed=True)
    ids, lengths = captions()
    one = padded(ids, lengths if given else None)
    two = packed(ids, lengths if given else None)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-10)
    expected, ours = gradients(padded, one), gradients(packed, two)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("options", TEXT_VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_padding_does_not_matter(options, packed):
    tower = text_tower(**options, packed=packed)
    ids, lengths = captions()
    other = ids.clone()
    other[torch.arange(9) >= lengths.clamp(min=1)[:, None]] = 17
    torch.testing.assert_close(tower(other, lengths), tower(ids, lengths), rtol=0, atol=1e-12)
    short = tower(ids[2:4, :4], lengths[2:4])
    torch.testing.assert_close(short, tower(ids, lengths)[2:4], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"causal": False, "pooling": "first"}, {"pooling": "last"}, {"pooling": "mean_all"}]
)
def test_padding_matters_where_it_was_trained_with(options):
    tower = text_tower(**options)
    ids, lengths = captions()
    other = ids.clone()
    other[torch.arange(9) >= lengths[:, None]] = 17
    assert not torch.allclose(tower(other, lengths)[2], tower(ids, lengths)[2])
    # a batch that was cut to its longest caption is filled up again
    torch.testing.assert_close(tower(ids[2:4, :4], lengths[2:4]), tower(ids, lengths)[2:4])


def test_a_causal_token_does_not_see_what_follows():
    tower = text_tower(pooling="end_of_text")
    ids, _ = captions()
    lengths = torch.full((5,), 4)
    other = ids.clone()
    other[:, 4:] = 3
    torch.testing.assert_close(tower(other, lengths), tower(ids, lengths))
    other[:, 0] = 9
    assert not torch.allclose(tower(other, lengths), tower(ids, lengths))


def test_the_end_of_text_is_the_highest_id_where_no_lengths_are_given():
    tower = text_tower()
    ids, lengths = captions()
    torch.testing.assert_close(tower(ids)[[0, 1, 2, 4]], tower(ids, lengths)[[0, 1, 2, 4]])


def test_a_token_with_the_padding_s_id_inside_a_caption_counts():
    tower = text_tower(causal=False, pad_mask=True, pooling="mean")
    ids = torch.tensor([[5, 0, 7, 0, 0, 0]])
    torch.testing.assert_close(tower(ids), tower(ids, torch.tensor([3])))


def test_captions_longer_than_the_tower_are_refused():
    with pytest.raises(InputError, match="captions of 10 tokens reached a text tower of 9"):
        text_tower()(torch.ones(2, 10, dtype=torch.long))


@pytest.mark.parametrize("options", TEXT_VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_caption_stays_finite(options, packed):
    tower = text_tower(**options, packed=packed)
    ids, lengths = captions()
    output = tower(ids, lengths)
    assert torch.all(output.isfinite())
    assert all(torch.all(grad.isfinite()) for grad in gradients(tower, output[:3]).values())


@pytest.mark.parametrize("options", IMAGE_VARIANTS)
def test_image_gradients_equal_finite_differences(options):
    tower = image_tower(**options, depth=1)
    images = pictures(2)
    kept = KeptPatches.packed(torch.tensor([3, 1, 0]), torch.tensor([2, 1]))
    weights = [tower.patch_embed.weight, tower.blocks[0].mlp.fc1.bias]
    assert gradcheck(lambda *_: tower(images, kept), weights, fast_mode=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_activations_follow_their_formulas(activation):
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = {
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "gelu_tanh": x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
    }[activation]
    torch.testing.assert_close(activate(x, activation), expected)


def test_unit_vectors_have_unit_length_in_float32_and_survive_zeros():
    vectors = torch.randn(5, 16, dtype=torch.bfloat16)
    vectors[2] = 0
    vectors = vectors.float().requires_grad_()
    lengths = unit(vectors.bfloat16()).norm(dim=1)
    assert lengths.dtype == torch.float32
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1, 0, 1, 1]))
    unit(vectors).sum().backward()
    assert torch.all(vectors.grad.isfinite())


def dual(**options) -> DualEncoderConfig:
    return DualEncoderConfig(
        image=replace(IMAGE, **options.pop("image", {})),
        text=replace(TEXT, **options.pop("text", {})),
        embed_dim=8,
        **options,
    )


def test_embeddings_are_float32_and_of_unit_length_under_bfloat16():
    model = dual().build()
    ids, lengths = captions()
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = model(pictures(5), ids, lengths)
    exact = model(pictures(5), ids, lengths)
    for ours, expected in zip((images, texts), exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(5))
        assert ((ours * expected).sum(1) > 0.999).all()


def test_the_residual_stream_and_its_norms_stay_float32_under_bfloat16():
    model = dual().build()
    seen = []
    for tower in (model.image, model.text):
        for module in tower.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda _, given, made: seen.extend((*given, made)))
    ids, lengths = captions()
    with torch.autocast("cpu", torch.bfloat16):
        model(pictures(5), ids, lengths)
    assert len(seen) == 2 * (6 + 5)
    assert {tensor.dtype for tensor in seen} == {torch.float32}


def test_a_model_cast_to_bfloat16_runs():
    model = dual().build().bfloat16()
    ids, lengths = captions()
    images, texts = model(
        pictures(5), ids, lengths, kept=KeptPatches.dense(torch.tensor([[1, 2]] * 5))
    )
    assert images.dtype == texts.dtype == torch.float32


@pytest.mark.parametrize("kept", [None, "dense", "packed"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputing_activations_changes_nothing(kept, drop_path):
    options = {"drop_path": drop_path}
    model = dual(image=options, text={**options, "packed": kept == "packed"}).build().train()
    choices = {
        None: None,
        "dense": KeptPatches.dense(torch.tensor([[1, 2]] * 4)),
        "packed": unequal_kept(),
    }
    ids, lengths = captions()
    results = []
    for wanted in (False, True):
        model.checkpoint_activations = wanted
        assert model.checkpoint_activations is wanted
        torch.manual_seed(3)
        images, texts = model(pictures(), ids[:4], lengths[:4], kept=choices[kept])
        results.append(gradients(model.image, images) | gradients(model.text, texts))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_recomputing_activations_stores_less():
    model = dual(image={"depth": 4}).build().train()

    def stored() -> int:
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.image(pictures())
        return total

    before = stored()
    model.checkpoint_activations = True
    assert stored() < before / 2


def test_dropped_paths_skip_whole_samples_and_grow_with_depth():
    tower = image_tower(drop_path=0.6, depth=2).train()
    torch.manual_seed(0)
    images = pictures(1).expand(400, -1, -1, -1)
    outputs = tower.forward_tokens(images, blocks=(0, 1))
    branch = outputs[1] - outputs[0]
    assert torch.all(outputs[0] == outputs[0][:1])  # the first block never drops
    skipped = (branch == 0).flatten(1)
    assert torch.equal(skipped.any(1), skipped.all(1))
    share = skipped.all(1).double().mean().item()
    assert abs(share - 0.36) < 5 * (0.36 * 0.64 / 400) ** 0.5  # both branches of the last block
    tower.eval()
    assert torch.all(tower(images) == tower(images)[:1])


def test_a_dropped_path_keeps_the_mean_of_its_branch():
    block = Block(IMAGE, 0.3).train()
    torch.manual_seed(0)
    branch = block._drop(torch.ones(5000, 2, 3), Layout())
    survivors = branch[branch[:, 0, 0] > 0]
    torch.testing.assert_close(survivors, torch.full_like(survivors, 1 / 0.7))
    assert abs(branch.mean().item() - 1) < 5 * (0.3 / 0.7 / 5000) ** 0.5


def test_dropped_paths_are_the_same_packed_and_dense():
    tower = image_tower(drop_path=0.5).train()
    index = torch.tensor([[3, 1], [7, 2], [0, 14], [5, 6]])
    results = []
    for kept in (
        KeptPatches.dense(index),
        KeptPatches.packed(index.flatten(), torch.full((4,), 2)),
    ):
        torch.manual_seed(11)
        results.append(tower(pictures(), kept))
    torch.testing.assert_close(results[1], results[0])


def test_the_pooled_vector_is_what_the_projection_takes():
    model = dual().build()
    ids, lengths = captions()
    pooled = model.text.forward_pooled(ids, lengths)
    assert pooled.shape == (5, 24)
    torch.testing.assert_close(model.text.projection(pooled), model.text(ids, lengths))
    pooled = model.image.forward_pooled(pictures())
    torch.testing.assert_close(model.image.projection(pooled), model.image(pictures()))


def test_the_class_token_of_all_tokens_is_the_pooled_vector():
    tower = image_tower()
    torch.testing.assert_close(
        tower.forward_tokens(pictures())[:, 0], tower.forward_pooled(pictures())
    )


def test_every_parameter_has_a_dimension_and_learns_something():
    model = dual(
        initial_logit_bias=-10.0, image={"layer_scale": 0.1}, text={"layer_scale": 0.1}
    ).build()
    ids, lengths = captions()
    images, texts = model(pictures(5), ids, lengths)
    (images @ texts.T * model.logit_scale.exp() + model.logit_bias).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.ndim >= 1, name
        assert weight.grad is not None and weight.grad.any(), name
    assert model.logit_scale.shape == model.logit_bias.shape == (1,)


def test_a_fixed_position_table_is_neither_trained_nor_saved():
    model = dual(image={"positions": "sincos"}).build()
    assert "image.pos_embed" not in model.state_dict()
    assert "image.pos_embed" not in dict(model.named_parameters())


@pytest.mark.slow
def test_a_compiled_tower_gives_the_same_numbers():
    torch._dynamo.reset()
    model = dual(image={"depth": 1}).build()
    kept = KeptPatches.dense(torch.tensor([[3, 1, 2]] * 4))
    compiled = torch.compile(model.image, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pictures(), kept), model.image(pictures(), kept))
    ids, lengths = captions()
    compiled = torch.compile(model.text, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, lengths), model.text(ids, lengths))
