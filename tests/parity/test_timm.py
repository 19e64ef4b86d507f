"""The same weights in, the same features out as timm's vision transformer."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from frugal.common.models.named import image_tower
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.models.weight_names import from_timm, to_timm


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


VARIANTS = {
    "class token": ({}, {}),
    "mean of patches, then norm": (
        {"global_pool": "avg"},
        {"pooling": "mean", "norm_after_pooling": True},
    ),
    "norm, then mean of patches": (
        {"global_pool": "avg", "fc_norm": False},
        {"pooling": "mean"},
    ),
    "no class token": (
        {"global_pool": "avg", "class_token": False},
        {"pooling": "mean", "norm_after_pooling": True, "class_token": "none"},
    ),
    "class token without position": (
        {"no_embed_class": True},
        {"class_token": "without_position"},
    ),
    "layer scale": ({"init_values": 0.1}, {"layer_scale": 0.1}),
    "norm before the blocks": ({"pre_norm": True}, {"pre_norm": True, "patch_bias": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_features_equal_those_of_timm(variant):
    theirs_options, ours_options = VARIANTS[variant]
    theirs = random_weights(
        VisionTransformer(
            img_size=(48, 32), patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=3,
            num_classes=0, **theirs_options,
        )
    )  # fmt: skip
    config = ImageTower(
        width=48, depth=3, heads=4, mlp_width=144, patch_size=8, image_size=(48, 32),
        **ours_options,
    )  # fmt: skip
    ours = ImageTransformer(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), config))
    images = torch.randn(3, 3, 48, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
        if "norm_after_pooling" not in ours_options:
            tokens = theirs.forward_features(images)
            torch.testing.assert_close(ours.forward_tokens(images), tokens, rtol=0, atol=1e-5)
    if config.class_token != "without_position":
        back = to_timm(ours.state_dict(), config)
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_outputs_of_chosen_blocks_equal_those_of_timm():
    theirs = random_weights(
        VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=0
        )
    )
    config = ImageTower(width=32, depth=4, heads=4, mlp_width=128, patch_size=8, image_size=32)
    ours = ImageTransformer(config).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), config))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = theirs.get_intermediate_layers(images, n=[0, 3], return_prefix_tokens=True)
        outputs = ours.forward_tokens(images, blocks=(0, 3))
    for output, (patches, class_token) in zip(outputs, expected, strict=True):
        whole = torch.cat((class_token, patches), dim=1)
        torch.testing.assert_close(output, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("vit_tiny_patch16_224", "Ti/16"),
        ("vit_small_patch16_224", "S/16"),
        ("vit_base_patch16_224", "B/16"),
        ("vit_large_patch16_224", "L/16"),
        ("vit_huge_patch14_224", "H/14"),
    ],
)
def test_named_sizes_have_the_shapes_of_timm(name, ours):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        tower = ImageTransformer(image_tower(ours))
    shapes = {key: value.shape for key, value in to_timm(tower.state_dict(), tower.config).items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert tower.config.heads == theirs.blocks[0].attn.num_heads
