"""The same weights in, the same embeddings out as open_clip."""

from dataclasses import replace

import open_clip
import pytest
import torch

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, clipa_encoder, flip_encoder
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import from_open_clip, to_open_clip

END = 49_407


def shallow(config: DualEncoderConfig, depth: int = 2) -> DualEncoderConfig:
    return replace(
        config, image=replace(config.image, depth=depth), text=replace(config.text, depth=depth)
    )


def theirs_named(name: str, depth: int = 2, **vision) -> torch.nn.Module:
    settings = open_clip.get_model_config(name)
    settings["vision_cfg"] |= {"layers": depth, **vision}
    settings["text_cfg"]["layers"] = depth
    quick_gelu = settings.pop("quick_gelu", False)
    for tokenizer in ("hf_tokenizer_name", "tokenizer_kwargs"):
        settings["text_cfg"].pop(tokenizer, None)
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**settings, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for weight in model.parameters():  # no norm is 1 and no bias 0, so that a swap shows
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def clip_captions(count: int, length: int) -> torch.Tensor:
    ids = torch.randint(1, END - 1, (count, length))
    for row, end in enumerate(torch.randint(1, length, (count,))):
        ids[row, end] = END
        ids[row, end + 1 :] = 0
    return ids


def assert_same(ours, theirs, token_ids, image_size) -> None:
    images = torch.randn(2, 3, *image_size)
    with torch.inference_mode():
        expected = theirs.encode_image(images, normalize=True)
        torch.testing.assert_close(ours.encode_image(images), expected, rtol=0, atol=1e-5)
        expected = theirs.encode_text(token_ids, normalize=True)
        torch.testing.assert_close(ours.encode_text(token_ids), expected, rtol=0, atol=1e-5)
    assert ours.logit_scale.exp().item() == pytest.approx(theirs.logit_scale.exp().item())


CONFIGURATIONS = {
    "ViT-B-16": clip_encoder("B/16"),
    "ViT-L-14": clip_encoder("L/14"),
    "ViT-H-14": clip_encoder("H/14"),
    "ViT-B-16-quickgelu": clip_encoder("B/16", quick_gelu=True),
    "ViT-S-16": clip_encoder("S/16"),
    "ViT-L-14-CLIPA": clipa_encoder("L/14", as_in_open_clip=True),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_embeddings_equal_those_of_open_clip(name):
    theirs = theirs_named(name)
    config = shallow(CONFIGURATIONS[name])
    ours = config.build().eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict(), config))
    if config.text.pooling == "last":
        token_ids = torch.randint(1, 30_000, (2, 32))
        token_ids[0, 20:] = 0
    else:
        token_ids = clip_captions(2, 77)
    assert_same(ours, theirs, token_ids, (224, 224))


@pytest.mark.parametrize("size", ["g", "bigG"])
def test_named_sizes_have_the_shapes_of_open_clip(size):
    settings = open_clip.get_model_config(f"ViT-{size}-14")
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**settings)
        from frugal.common.models.clip import DualEncoder

        ours = DualEncoder(clip_encoder(f"{size}/14"))
    count = sum(weight.numel() for weight in theirs.parameters())
    assert sum(weight.numel() for weight in ours.parameters()) == count
    assert (
        ours.config.image.heads
        == settings["vision_cfg"]["width"] // settings["vision_cfg"]["head_width"]
    )
    assert ours.config.text.heads == settings["text_cfg"]["heads"]


def test_a_rectangular_model_with_layer_scale_equals_open_clip():
    torch.manual_seed(2)
    vision = {
        "image_size": (32, 48), "patch_size": 8, "width": 48, "layers": 2, "head_width": 12,
        "mlp_ratio": 3.0, "ls_init_value": 0.5,
    }  # fmt: skip
    text = {
        "context_length": 9, "vocab_size": 50, "width": 40, "heads": 5, "layers": 3,
        "ls_init_value": 0.3,
    }  # fmt: skip
    theirs = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    config = DualEncoderConfig(
        image=ImageTower(
            width=48, depth=2, heads=4, mlp_width=144, patch_size=8, image_size=(32, 48),
            patch_bias=False, pre_norm=True, norm_epsilon=1e-5, layer_scale=0.1,
        ),
        text=TextTower(
            width=40, depth=3, heads=5, mlp_width=160, vocabulary=50, length=9, layer_scale=0.1
        ),
        embed_dim=24,
    )  # fmt: skip
    ours = config.build().eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict(), config))
    assert_same(ours, theirs, torch.randint(1, 50, (2, 9)), (32, 48))
    back = to_open_clip(ours.state_dict(), config)
    assert back.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[name], value), name


def test_a_model_with_a_patch_bias_cannot_be_written_for_open_clip():
    config = shallow(flip_encoder("Ti/16"), depth=1)
    with pytest.raises(InputError, match=r"open_clip has no place for 'image.patch_embed.bias'"):
        to_open_clip(config.build().state_dict(), config)


def test_a_state_of_another_kind_is_refused():
    config = shallow(clip_encoder("Ti/16"), depth=1)
    state = to_open_clip(config.build().state_dict(), config)
    with pytest.raises(InputError, match=r"visual\.attnpool\.weight"):
        from_open_clip({**state, "visual.attnpool.weight": torch.zeros(1)}, config)


def test_what_openai_s_files_hold_besides_weights_is_left():
    config = shallow(clip_encoder("Ti/16"), depth=1)
    ours = config.build().state_dict()
    state = to_open_clip(ours, config)
    state |= {name: torch.tensor(224) for name in ("input_resolution", "context_length")}
    state |= {"vocab_size": torch.tensor(49_408), "attn_mask": torch.zeros(77, 77)}
    read = from_open_clip(state, config)
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], value) for name, value in ours.items())


def test_a_fixed_table_of_another_flavour_is_refused():
    config = shallow(clipa_encoder("Ti/16"), depth=1)
    state = to_open_clip(config.build().state_dict(), config)
    other = replace(config, image=replace(config.image, positions="sincos"))
    with pytest.raises(InputError, match="is not sincos on a grid of 14x14"):
        from_open_clip(state, other)
