"""Mixed dual encoders leave for transformers, which opens them without code of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tower_cases import MOCO, PLAIN, recipe_of, text_of, write_run
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    TimmWrapperModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from frugal.common.errors import InputError
from frugal.common.export import Options, export
from frugal.common.models.pretrained import TimmImage, TransformersImage
from frugal.common.models.text import TextTower
from frugal.common.weights.load import load_model

CAPTIONS = ["a photo of a dog", "Three GREEN squares, 2 red ones!", "words " * 40, "é"]
NARROW = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
OWN = {
    "like SWAG": (PLAIN, Dinov2Model),
    "layer scales, fixed positions, no patch bias": (
        replace(PLAIN, layer_scale=0.3, positions="sincos_moco", patch_bias=False),
        Dinov2Model,
    ),
    "another activation and epsilon": (
        replace(PLAIN, activation="gelu_tanh", norm_epsilon=1e-4, norm_after_pooling=True),
        Dinov2Model,
    ),
    "like CLIP": (
        replace(PLAIN, pre_norm=True, activation="quick_gelu", layer_scale=0.4),
        CLIPVisionModel,
    ),
    "class token without position": (
        replace(PLAIN, class_token="without_position", positions="sincos"),
        Dinov2Model,
    ),
}


def run_of(folder: Path, image: Any, bert: Path, **text: Any) -> Path:
    recipe = recipe_of(image, text_of(bert, pretrained=False, **text), bert)
    return write_run(folder, recipe)


@torch.inference_mode()
def check_embeddings(run: Path, out: Path) -> VisionTextDualEncoderModel:
    """The folder's model gives our embeddings for what its processors make of raw inputs."""
    trained = load_model(run)
    theirs, report = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(theirs, VisionTextDualEncoderModel)
    random = np.random.default_rng(1)
    tower = trained.model.config.image
    pictures = random.integers(0, 256, (3, *tower.height_width, 3), dtype=np.uint8)
    pixels = AutoImageProcessor.from_pretrained(out)(
        [Image.fromarray(picture) for picture in pictures],
        return_tensors="pt", do_resize=False, do_center_crop=False,
    )  # fmt: skip
    tokens = AutoTokenizer.from_pretrained(out)(
        CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    made = theirs.eval()(**pixels, **tokens)
    images = trained.model.encode_image(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    torch.testing.assert_close(made.image_embeds, images, rtol=0, atol=1e-5)
    tokenizer = trained.tokenizer
    for row, caption in enumerate(CAPTIONS):
        ids = torch.tensor([tokenizer.assemble(tokenizer.encode(caption), 16)])
        alone = trained.model.encode_text(ids, torch.tensor([ids.shape[1]]))
        torch.testing.assert_close(made.text_embeds[row], alone[0], rtol=0, atol=1e-5)
    assert theirs.logit_scale.item() == trained.model.logit_scale.item()
    return theirs


@pytest.mark.parametrize("name", OWN)
def test_towers_of_ours_that_transformers_has_a_class_for(name, bert_words, tmp_path) -> None:
    image, kind = OWN[name]
    run, out = run_of(tmp_path / "run", image, bert_words), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    assert type(check_embeddings(run, out).vision_model) is kind
    card = (out / "README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "32x32 pixels in patches of 8" in card
    assert json.loads((out / "recipe.json").read_text())["model"]["embed_dim"] == 10


@pytest.mark.parametrize("kind", ["vit", "dinov2", "timm"])
def test_towers_of_other_libraries(kind, bert_words, tmp_path) -> None:
    if kind == "timm":
        image = TimmImage(name="resnet18", image_size=32, pretrained=False)
    else:
        config = ViTConfig(**NARROW) if kind == "vit" else Dinov2Config(**NARROW)
        AutoModel.from_config(config).save_pretrained(tmp_path / "model")
        pixels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
        (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(pixels))
        image = TransformersImage(name=str(tmp_path / "model"), image_size=32, pretrained=False)
    run, out = run_of(tmp_path / "run", image, bert_words), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    theirs = check_embeddings(run, out).vision_model
    expected = {"vit": ViTModel, "dinov2": Dinov2Model, "timm": TimmWrapperModel}[kind]
    assert type(theirs) is expected
    assert image.name in (out / "README.md").read_text()


def test_what_transformers_cannot_express_is_refused_by_its_name(bert_words, tmp_path) -> None:
    cases = {
        "model.image.projector_width=20": (MOCO, {}),
        "model.image.pooling=mean": (replace(PLAIN, pooling="mean"), {}),
        "model.image.image_size=.32, 64.": (replace(PLAIN, image_size=(32, 64)), {}),
        "model.text.pooling=mean": (PLAIN, {"pooling": "mean"}),
    }
    for number, (option, (image, text)) in enumerate(cases.items()):
        run = run_of(tmp_path / f"run{number}", image, bert_words, **text)
        out = tmp_path / "out"
        with pytest.raises(InputError, match=f"cannot express {option}.*--to frugal"):
            export(Options(checkpoint=run, to="huggingface", out=out))
        assert not out.exists()
        export(Options(checkpoint=run, to="frugal", out=tmp_path / f"frugal{number}"))


def test_other_libraries_take_what_is_theirs(bert_words, tmp_path) -> None:
    run = run_of(tmp_path / "run", PLAIN, bert_words)
    with pytest.raises(InputError, match=r"open_clip cannot express model.text=TransformersText"):
        export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))
    assert export(Options(checkpoint=run, to="timm", out=tmp_path / "timm")) < 1e-5
    foreign = TimmImage(name="resnet18", image_size=32, pretrained=False)
    run = run_of(tmp_path / "other", foreign, bert_words)
    with pytest.raises(InputError, match=r"timm cannot express model.image=TimmImage"):
        export(Options(checkpoint=run, to="timm", out=tmp_path / "out"))
    text = TextTower(width=20, depth=1, heads=2, mlp_width=40, vocabulary=90, length=16,
                     pooling="first", causal=False)  # fmt: skip
    run = write_run(tmp_path / "own", recipe_of(foreign, text, bert_words))
    with pytest.raises(InputError, match=r"transformers cannot express model.text=TextTower"):
        export(Options(checkpoint=run, to="huggingface", out=tmp_path / "out"))


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "timm"])
def test_a_projector_beside_texts_of_ours_is_refused_by_its_name(to, bert_words, tmp_path) -> None:
    text = TextTower(width=20, depth=1, heads=2, mlp_width=40, vocabulary=90, length=16)
    run = write_run(tmp_path / "run", recipe_of(MOCO, text, bert_words))
    with pytest.raises(InputError, match=r"cannot express model.image.projector_width=20"):
        export(Options(checkpoint=run, to=to, out=tmp_path / "out"))


def test_an_exported_folder_comes_back_bit_for_bit(bert_words, tmp_path) -> None:
    from frugal.cit.convert import Options as Conversion
    from frugal.cit.convert import convert

    AutoModel.from_config(ViTConfig(**NARROW)).save_pretrained(tmp_path / "vit")
    image = TransformersImage(name=str(tmp_path / "vit"), image_size=32, pretrained=False)
    run = run_of(tmp_path / "run", image, bert_words)
    export(Options(checkpoint=run, to="huggingface", out=tmp_path / "out"))
    convert(Conversion(source=tmp_path / "out", out=tmp_path / "back", length=16))
    models = [load_model(tmp_path / name) for name in ("run", "back")]
    left, right = (trained.model.state_dict() for trained in models)
    assert left.keys() == right.keys()
    assert all(tensor.equal(right[name]) for name, tensor in left.items())
    ids = [trained.tokenizer.encode(CAPTIONS[0]) for trained in models]
    assert ids[0] == ids[1]
