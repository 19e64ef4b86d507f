"""The same weights in, the same embeddings out as transformers' CLIP and ViTMAE."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.positions import sincos_table
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower, ImageTransformer
from frugal.common.models.weight_names import (
    from_transformers_clip,
    from_vit_mae,
    to_transformers_clip,
    to_vit_mae,
)
from frugal.common.randomness import RecordedNoise
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request):
    shape = {
        "hidden_size": 40, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 5, "hidden_act": request.param,
    }  # fmt: skip
    theirs = random_weights(
        CLIPModel(
            CLIPConfig(
                text_config={
                    **shape, "vocab_size": 60, "max_position_embeddings": 11,
                    "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59,
                },
                vision_config={**shape, "image_size": 32, "patch_size": 8},
                projection_dim=24,
            )
        )
    )  # fmt: skip
    config = DualEncoderConfig(
        image=ImageTower(
            width=40, depth=2, heads=5, mlp_width=96, patch_size=8, image_size=32,
            patch_bias=False, pre_norm=True, norm_epsilon=1e-5, activation=request.param,
        ),
        text=TextTower(
            width=40, depth=2, heads=5, mlp_width=96, vocabulary=60, length=11, pad_id=59,
            activation=request.param,
        ),
        embed_dim=24,
    )  # fmt: skip
    ours = config.build().eval()
    ours.load_state_dict(from_transformers_clip(theirs.state_dict(), config))
    return ours, theirs


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([11, 4, 7, 2])
    ids = torch.randint(0, 58, (4, 11))
    ids[torch.arange(11) >= lengths[:, None] - 1] = 59  # the end token, then it again as padding
    return ids, lengths


def test_clip_embeddings_equal_those_of_transformers(clip):
    ours, theirs = clip
    images = torch.randn(3, 3, 32, 32)
    ids, lengths = captions()
    mask = (torch.arange(11) < lengths[:, None]).long()
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask, pixel_values=images)
        for given in (lengths, None):
            texts = ours.encode_text(ids, given)
            torch.testing.assert_close(texts, expected.text_embeds, rtol=0, atol=1e-5)
        images = ours.encode_image(images)
    torch.testing.assert_close(images, expected.image_embeds, rtol=0, atol=1e-5)


def test_clip_weights_survive_a_round_trip(clip):
    ours, theirs = clip
    back = to_transformers_clip(ours.state_dict(), ours.config)
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


MAE = ViTMAEConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    image_size=32, patch_size=8, decoder_hidden_size=16, decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1, decoder_intermediate_size=32, mask_ratio=0.75,
    layer_norm_eps=1e-6,
)  # fmt: skip
OURS = ImageTower(
    width=48, depth=2, heads=4, mlp_width=96, patch_size=8, image_size=32, positions="sincos"
)  # fmt: skip


def with_fixed_positions(theirs: torch.nn.Module) -> torch.nn.Module:
    """As published files have it: a freshly made model of transformers 5 has a table of zeros."""
    encoder = getattr(theirs, "vit", theirs)
    table = sincos_table((4, 4), 48, "sincos", class_row=True)
    encoder.embeddings.position_embeddings.data.copy_(table)
    return theirs


@pytest.mark.parametrize("kind", [ViTMAEModel, ViTMAEForPreTraining])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_mae_tokens_of_a_masked_image_equal_those_of_transformers(kind, positions):
    theirs = random_weights(kind(MAE))
    if positions == "sincos":
        with_fixed_positions(theirs)
    encoder = getattr(theirs, "vit", theirs)
    config = replace(OURS, positions=positions)
    ours = ImageTransformer(config).eval()
    ours.load_state_dict(from_vit_mae(theirs.state_dict(), config))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    kept = RandomMasking(mask_ratio=0.75).keep(
        PatchView(images, 8), noise=RecordedNoise({"image mask": noise})
    )
    with torch.inference_mode():
        expected = encoder(pixel_values=images, noise=noise)
        tokens = ours.forward_tokens(images, kept)
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
    assert torch.equal(kept.mask(16), expected.mask == 0)


def test_mae_weights_survive_a_round_trip():
    theirs = with_fixed_positions(random_weights(ViTMAEModel(MAE)))
    ours = from_vit_mae(theirs.state_dict(), OURS)
    back = to_vit_mae(ours, OURS)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-6)


def test_mae_weights_are_read_from_published_files_too():
    theirs = with_fixed_positions(random_weights(ViTMAEForPreTraining(MAE)))
    expected = from_vit_mae(theirs.state_dict(), OURS)
    published = {}
    for name, value in theirs.state_dict().items():
        for new, old in (
            ("vit.layers.", "vit.encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            name = name.replace(new, old) if not name.startswith("decoder.") else name
        published[name] = value
    ours = from_vit_mae(published, OURS)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
