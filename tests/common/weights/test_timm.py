"""A folder for timm: the image tower as one of its vision transformers, loaded strictly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from run_directories import small
from safetensors.torch import load_file

from frugal.common.data.tokenizers import WordPiece
from frugal.common.errors import InputError
from frugal.common.export import Options, export
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, clipa_encoder, flip_encoder, image_tower
from frugal.common.models.vit import ImageTransformer
from frugal.common.models.weight_names import to_timm
from frugal.common.weights.load import load_model
from frugal.common.weights.timm import architecture

clip = clip_encoder("B/16")
CONFIGURATIONS: dict[str, DualEncoderConfig] = {
    "CLIP": small(clip),
    "OpenAI's activation": small(clip_encoder("B/16", quick_gelu=True)),
    "fixed positions, none for the class token": small(
        clip, image={"positions": "sincos_bigvision", "class_token": "without_position"}
    ),
    "layer scales and a bias of the patches": small(
        clip, image={"layer_scale": 0.3, "patch_bias": True}
    ),
    "wide images": small(clip, image={"image_size": (24, 40)}),
    "no class token, norm on the mean": small(
        clip,
        image={"class_token": "none", "pooling": "mean", "norm_after_pooling": True},
    ),
    "an uneven ratio": small(clip, image={"mlp_width": 61}),
    "FLIP": small(flip_encoder("B/16"), text={"vocabulary": 90}),
    "CLIPA": small(clipa_encoder("L/14"), text={"pooling": "end_of_text", "vocabulary": 49_408}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_timm_gives_the_same_embeddings(name, make_run, bert, tmp_path) -> None:
    tokenizer = WordPiece(vocab=bert / "vocab.txt") if name == "FLIP" else None
    run = make_run(CONFIGURATIONS[name], tokenizer=tokenizer)
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="timm", out=out)) < 1e-5

    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert theirs.num_classes == CONFIGURATIONS[name].embed_dim
    trained = load_model(run)
    images = torch.randn(3, 3, *trained.config.image.height_width)
    with torch.inference_mode():
        expected = trained.model.image(images)
        torch.testing.assert_close(theirs(images), expected, rtol=0, atol=1e-5)
        tokens = trained.model.image.forward_tokens(images)
        torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "quick_gelu"), [("B/16", False), ("B/32", False), ("L/14", False), ("B/16", True)]
)
def test_published_shapes_leave_as_the_model_that_timm_calls_so(name, quick_gelu) -> None:
    size, patch = {"B": "base", "L": "large"}[name[0]], name[2:]
    tower = clip_encoder(name, quick_gelu=quick_gelu).image
    assert architecture(tower) == f"vit_{size}_patch{patch}_clip_224"
    assert architecture(replace(tower, depth=3)) == "vit_base_patch16_clip_224"


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_large_patch14_clip_224"])
def test_published_shapes_have_the_names_and_shapes_of_timm_s_clip(name) -> None:
    config = clip_encoder({"b": "B/32", "l": "L/14"}[name[4]])
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).state_dict()
        ours = to_timm(ImageTransformer(config.image).state_dict(), config.image)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_named_model_of_timm_loads_the_file_strictly(make_run, tmp_path) -> None:
    # ViT-Ti/16 of 224 pixels, as timm has it without anything said beside its name
    tower = image_tower("Ti/16", positions="sincos")
    run = make_run(replace(small(clip), image=tower))
    out = tmp_path / "out"
    export(Options(checkpoint=run, to="timm", out=out))
    assert json.loads((out / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=12).eval()
    theirs.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        ours = load_model(run).model.image(images)
        torch.testing.assert_close(theirs(images), ours, rtol=0, atol=1e-5)


def test_timm_prepares_images_as_the_run_does(clip_run, tmp_path) -> None:
    out = tmp_path / "out"
    export(Options(checkpoint=clip_run, to="timm", out=out))
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    settings = timm.data.resolve_data_config({}, model=model)
    card = (out / "README.md").read_text()
    assert "library_name: timm" in card and "An image encoder" in card and "captions |" not in card
    assert settings["input_size"] == (3, 32, 32) and settings["crop_pct"] == 1.0
    tower = load_model(clip_run).config.image
    assert tuple(settings["mean"]) == tower.mean and tuple(settings["std"]) == tower.std
    assert settings["interpolation"] == "bicubic"


def test_an_epsilon_that_timm_has_not_is_refused(make_run, tmp_path) -> None:
    run = make_run(small(clip, image={"norm_epsilon": 1e-4}))
    with pytest.raises(InputError) as refusal:
        export(Options(checkpoint=run, to="timm", out=tmp_path / "out"))
    assert "timm cannot express model.image.norm_epsilon=0.0001: " in str(refusal.value)
    assert "--to frugal or open_clip or huggingface instead" in str(refusal.value)


def test_two_towers_have_no_decoder(clip_run, tmp_path) -> None:
    with pytest.raises(InputError, match="cannot express the model: it has no dec"):
        export(Options(checkpoint=clip_run, to="huggingface_mae", out=tmp_path / "out"))
