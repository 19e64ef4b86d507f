"""First weights: complete, reproducible, and distributed as their source says."""

from dataclasses import replace

import open_clip
import pytest
import torch

from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.named import clip_encoder
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_open_clip

SMALL = DualEncoderConfig(
    image=ImageTower(
        width=24, depth=2, heads=3, mlp_width=40, patch_size=4, image_size=12, pre_norm=True,
        layer_scale=0.25,
    ),
    text=TextTower(width=20, depth=2, heads=2, mlp_width=40, vocabulary=50, length=9),
    embed_dim=8,
    initial_logit_bias=-10.0,
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["flip", "open_clip"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("class_token", ["none", "without_position", "with_position"])
def test_nothing_is_left_as_it_was_found(scheme, positions, class_token):
    image = replace(SMALL.image, positions=positions, class_token=class_token, pooling="mean")
    model = DualEncoder(replace(SMALL, image=image, initialization=scheme))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.initialize(torch.Generator().manual_seed(0))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.all(tensor.isfinite()), name
    assert torch.all(model.image.blocks[1].ls2.gamma == 0.25)
    assert model.logit_bias.item() == -10
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("scheme", ["flip", "open_clip"])
def test_weights_are_a_function_of_the_generator_alone(scheme):
    config = replace(SMALL, initialization=scheme)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = config.build(torch.Generator().manual_seed(5)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = config.build(torch.Generator().manual_seed(5)).state_dict()
    other = config.build(torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert not torch.equal(other["image.patch_embed.weight"], one["image.patch_embed.weight"])


def test_first_weights_are_distributed_as_those_of_open_clip():
    base = clip_encoder("B/16")
    config = replace(base, image=replace(base.image, depth=1), text=replace(base.text, depth=1))
    settings = open_clip.get_model_config("ViT-B-16")
    settings["vision_cfg"]["layers"] = settings["text_cfg"]["layers"] = 1
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**settings).state_dict()
    ours = to_open_clip(config.build().state_dict(), config)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        value = ours[name]
        assert value.shape == expected.shape, name
        if expected.numel() > 1:
            spread = expected.double().std().item()
            error = 6 * max(spread, 1e-12) / value.numel() ** 0.5
            assert value.double().std().item() == pytest.approx(spread, abs=error), name
            assert value.double().mean().item() == pytest.approx(
                expected.double().mean().item(), abs=1.5 * error
            ), name
            heavy = expected.abs().max() / max(spread, 1e-12) > 3  # normal, not uniform
            assert (value.abs().max() / max(spread, 1e-12) > 3) == heavy or value.numel() < 2000, (
                name
            )
