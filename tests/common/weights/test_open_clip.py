"""A folder for open_clip: open_clip itself loads it and gives the same embeddings and pixels."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from run_directories import small

from frugal.common.data.tokenizers import HuggingFace, WordPiece, load_tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.export import Options, export
from frugal.common.import_weights import Options as ImportOptions
from frugal.common.import_weights import import_weights
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, clipa_encoder
from frugal.common.weights.load import load_model
from frugal.common.weights.open_clip import model_config

CAPTIONS = ["a photo of a dog", "Three GREEN squares, 2 red ones!", "words " * 40]
ROWS = 90  # of the token table of the small BERT tokenizer

clip = clip_encoder("B/16")
clipa = clipa_encoder("L/14")
CONFIGURATIONS: dict[str, DualEncoderConfig] = {
    "CLIP": small(clip),
    "packed captions": small(clip, text={"packed": True, "pad_mask": True}),
    "OpenAI's activation": small(clip_encoder("B/16", quick_gelu=True)),
    "rectangular images and layer scales": small(
        clip, image={"image_size": (24, 40), "layer_scale": 0.3}, text={"layer_scale": 0.4}
    ),
    "a bias of the patches": small(
        clip, image={"patch_bias": True, "class_token": "without_position"}
    ),
    "a bias of the patches on fixed positions": small(
        clip, image={"patch_bias": True, "positions": "sincos_moco"}
    ),
    "MLPs that are no multiple": small(clip, image={"mlp_width": 61}, text={"mlp_width": 47}),
    "the bias of a sigmoid loss": small(clip, initial_logit_bias=-10.0),
    "CLIPA as trained, BERT without separator": small(clipa, text={"vocabulary": ROWS}),
    "CLIPA as in open_clip, BERT without separator": small(
        clipa_encoder("L/14", as_in_open_clip=True), text={"vocabulary": ROWS}
    ),
    "the mean of normed patches, FLIP's word pieces": small(
        clip,
        image={"positions": "sincos", "class_token": "without_position", "pooling": "mean"},
        text={
            "pooling": "first", "causal": False, "activation": "gelu_tanh", "vocabulary": ROWS,
        },
    ),
    "the end of a caption, BERT": small(clip, text={"vocabulary": ROWS, "norm_epsilon": 1e-6}),
}  # fmt: skip


def tokenizer_of(name: str, bert: Path) -> HuggingFace | WordPiece | None:
    if "BERT" in name:
        return HuggingFace(name=str(bert), separator="without" not in name)
    return WordPiece(vocab=bert / "vocab.txt") if "FLIP" in name else None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_open_clip_gives_the_same_embeddings_for_the_same_captions(
    name, make_run, bert, tmp_path
) -> None:
    run = make_run(CONFIGURATIONS[name], tokenizer=tokenizer_of(name, bert))
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="open_clip", out=out)) < 1e-5

    theirs = open_clip.create_model_and_transforms(f"local-dir:{out}")[0].eval()
    ours = load_model(run).model
    token_ids = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    tokenizer = load_tokenizer(run / "tokenizer")
    lengths = []
    for row, caption in zip(token_ids.tolist(), CAPTIONS, strict=True):
        ids = tokenizer.assemble(tokenizer.encode(caption), ours.config.text.length)
        assert row == ids + [tokenizer.pad_id] * (len(row) - len(ids))
        lengths.append(len(ids))
    images = torch.randn(3, 3, *ours.config.image.height_width)
    with torch.inference_mode():
        expected = theirs.encode_image(images, normalize=True)
        torch.testing.assert_close(ours.encode_image(images), expected, rtol=0, atol=1e-5)
        expected = theirs.encode_text(token_ids, normalize=True)
        texts = ours.encode_text(token_ids, torch.tensor(lengths))
        torch.testing.assert_close(texts, expected, rtol=0, atol=1e-5)
    assert theirs.logit_scale.item() == ours.logit_scale.item()
    if ours.logit_bias is not None:
        assert theirs.logit_bias.item() == ours.logit_bias.item()


@pytest.mark.parametrize("name", [next(iter(CONFIGURATIONS)), "the end of a caption, BERT"])
def test_a_card_says_that_open_clip_cleans_captions_first_where_it_makes_a_difference(
    name, make_run, bert, tmp_path, capsys
) -> None:
    run = make_run(CONFIGURATIONS[name], tokenizer=tokenizer_of(name, bert))
    out = tmp_path / "out"
    export(Options(checkpoint=run, to="open_clip", out=out))
    tokenizer = load_tokenizer(run / "tokenizer")
    ours = tokenizer.encode("a dog &amp; a cat")
    row = open_clip.get_tokenizer(f"local-dir:{out}")(["a dog &amp; a cat"])[0].tolist()
    differs = row[len(tokenizer.prefix) :][: len(ours)] != ours
    assert differs == ("BERT" in name)
    assert ("get other tokens" in (out / "README.md").read_text()) == differs
    import_weights(ImportOptions(source=out, out=tmp_path / "back"))
    assert ("which is not done here" in capsys.readouterr().err) == differs


OPEN_CLIP_NAMES = {
    "ViT-B-16": clip_encoder("B/16"),
    "ViT-B-16-quickgelu": clip_encoder("B/16", quick_gelu=True),
    "ViT-S-16": clip_encoder("S/16"),
    "ViT-L-14-336": clip_encoder("L/14", image_size=336),
    "ViT-H-14": clip_encoder("H/14"),
    "ViT-g-14": clip_encoder("g/14"),
    "ViT-bigG-14": clip_encoder("bigG/14"),
    **{
        f"ViT-{size}-14-CLIPA{suffix}": clipa_encoder(
            f"{size}/14", as_in_open_clip=True, image_size=pixels
        )
        for size in ("L", "H", "bigG")
        for suffix, pixels in (("", 224), ("-336", 336))
    },
}


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_open_clip_s_own_models_are_described_as_it_describes_them(name) -> None:
    theirs = open_clip.get_model_config(name)
    ours = model_config(OPEN_CLIP_NAMES[name])
    for tower, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        expected = theirs[tower]
        for about_tokenizers in ("hf_tokenizer_name", "tokenizer_kwargs"):
            expected.pop(about_tokenizers, None)
        described, wanted = asdict(kind(**ours[tower])), asdict(kind(**expected))
        ratio, wanted_ratio = described.pop("mlp_ratio"), wanted.pop("mlp_ratio")
        width = wanted["width"]
        assert int(width * ratio) == int(width * wanted_ratio)  # 4.3637 there, 6144 / 1408 here
        assert described == wanted
    assert ours["quick_gelu"] == theirs.get("quick_gelu", False)
    assert ours["embed_dim"] == theirs["embed_dim"]


def test_a_fixed_table_of_open_clip_s_kind_stays_fixed_there(make_run, tmp_path) -> None:
    out = tmp_path / "out"
    run = make_run(small(clip, image={"positions": "sincos"}))
    export(Options(checkpoint=run, to="open_clip", out=out))
    model = open_clip.create_model(f"local-dir:{out}")
    assert not model.visual.positional_embedding.requires_grad


def photo(height: int, width: int) -> Image.Image:
    """Colored blots under noise."""
    random = np.random.default_rng(height * width)
    blots = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-30, 30, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def evaluated_with(run: Path, crop: CenterCrop) -> Path:
    recipe = json.loads((run / "recipe.json").read_text())
    for task in recipe["evaluation"]:
        task["crop"] |= {"order": crop.order, "interpolation": crop.interpolation}
    (run / "recipe.json").write_text(json.dumps(recipe))
    return run


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clip_s_transform_gives_the_pixels_of_our_evaluation(
    interpolation, make_run, tmp_path
) -> None:
    crop = CenterCrop(interpolation=interpolation)
    config = small(clip, image={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)})
    run = evaluated_with(make_run(config), crop)
    export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.image.mean, config.image.std))
    for height, width in ((37, 50), (333, 500), (481, 640), (100, 301), (32, 32), (33, 32)):
        image = photo(height, width)
        expected = (transform(image) * std + mean) * 255
        ours = torch.from_numpy(crop.decode(as_png(image), size=(32, 32)).copy()).float()
        # one gray level: Pillow resizes a part of an image in other steps than the whole of it
        torch.testing.assert_close(ours, expected.round(), rtol=0, atol=1)
        assert (ours - expected).abs().mean() < 0.02


def test_the_crop_that_open_clip_lacks_is_told_in_the_card(make_run, tmp_path) -> None:
    run = evaluated_with(make_run(small(clip)), CenterCrop(order="crop_first"))
    export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "CenterCrop(order=crop_first" in card


def test_two_towers_with_another_epsilon_each_keep_theirs() -> None:
    config = small(clip, text={"norm_epsilon": 1e-6})
    described = model_config(replace(config, image=replace(config.image, norm_epsilon=1e-4)))
    assert described["vision_cfg"]["norm_kwargs"] == {"eps": 1e-4}
    assert described["text_cfg"]["norm_kwargs"] == {"eps": 1e-6}
