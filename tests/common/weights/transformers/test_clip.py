"""A folder for transformers: its own classes load it and give the same embeddings."""

from __future__ import annotations

import io
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from run_directories import small
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    Dinov2Model,
    VisionTextDualEncoderModel,
)

from frugal.common.data.tokenizers import HuggingFace
from frugal.common.data.transforms import CenterCrop
from frugal.common.export import Options, export
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder
from frugal.common.weights.load import load_model

CAPTIONS = ["a photo of a dog", "Three GREEN squares, 2 red ones!", "words " * 40]

clip = clip_encoder("B/16")
CONFIGURATIONS: dict[str, DualEncoderConfig] = {
    "CLIP": small(clip),
    "packed captions": small(clip, text={"packed": True, "pad_mask": True}),
    "OpenAI's activation": small(clip_encoder("B/16", quick_gelu=True)),
    "other activations and epsilons": small(
        clip,
        image={"activation": "gelu_tanh", "norm_epsilon": 1e-4},
        text={"activation": "quick_gelu", "norm_epsilon": 1e-6},
    ),
    "layer scales and a bias of the patches": small(
        clip, image={"layer_scale": 0.3, "patch_bias": True}, text={"layer_scale": 0.4}
    ),
    "fixed positions, none for the class token": small(
        clip, image={"positions": "sincos_bigvision", "class_token": "without_position"}
    ),
    "BERT": small(clip, text={"vocabulary": 90}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_transformers_gives_the_same_embeddings_for_the_same_captions(
    name, make_run, bert, tmp_path
) -> None:
    tokenizer = HuggingFace(name=str(bert)) if name == "BERT" else None
    run = make_run(CONFIGURATIONS[name], tokenizer=tokenizer)
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5

    theirs, loading = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = CLIPProcessor.from_pretrained(out)
    inputs = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    trained = load_model(run)
    length = trained.config.text.length
    ours, lengths = torch.zeros(len(CAPTIONS), length, dtype=torch.int64), []
    for row, caption in enumerate(CAPTIONS):
        ids = trained.tokenizer.assemble(trained.tokenizer.encode(caption), length)
        assert inputs["input_ids"][row, : len(ids)].tolist() == ids
        assert inputs["attention_mask"][row].sum() == len(ids)
        ours[row, : len(ids)] = torch.tensor(ids)
        lengths.append(len(ids))
    images = torch.randn(3, 3, *trained.config.image.height_width)
    with torch.inference_mode():
        expected = theirs.eval()(**inputs, pixel_values=images)
        texts = trained.model.encode_text(ours, torch.tensor(lengths))
        torch.testing.assert_close(texts, expected.text_embeds, rtol=0, atol=1e-5)
        seen = trained.model.encode_image(images)
        torch.testing.assert_close(seen, expected.image_embeds, rtol=0, atol=1e-5)
    assert theirs.logit_scale.item() == trained.model.logit_scale.item()


def test_the_auto_classes_know_what_is_in_the_folder(clip_run, tmp_path) -> None:
    out = tmp_path / "out"
    export(Options(checkpoint=clip_run, to="huggingface", out=out))
    assert isinstance(AutoModel.from_pretrained(out), CLIPModel)
    # transformers' CLIPTokenizer would replace the clean-up that the file holds by its own
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "\u201ccaf\u00e9\u201d &amp; \ufb01sh"
    assert tokenizer(text)["input_ids"] == open_clip.tokenize([text])[0, :7].tolist()
    assert isinstance(CLIPImageProcessor.from_pretrained(out), CLIPImageProcessor)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["CLIPModel"]


def test_the_image_processor_gives_the_pixels_of_our_evaluation(clip_run, tmp_path) -> None:
    out = tmp_path / "out"
    export(Options(checkpoint=clip_run, to="huggingface", out=out))
    processor = CLIPImageProcessor.from_pretrained(out)
    tower = load_model(clip_run).model.config.image
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tower.mean, tower.std))
    random = np.random.default_rng(1)
    # margins here are even; transformers rounds half a pixel down, torchvision to an even number
    for height, width in ((333, 500), (481, 640), (32, 32), (90, 205)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        file = io.BytesIO()
        image.save(file, "PNG")
        pixels = processor(image, return_tensors="pt").pixel_values[0]
        ours = torch.from_numpy(CenterCrop().decode(file.getvalue(), size=(32, 32)).copy())
        expected = ((pixels * std + mean) * 255).round()
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1)


def test_image_towers_that_clip_does_not_have_stand_beside_clip_s_text_tower(
    make_run, bert, tmp_path
) -> None:
    config = small(
        clip,
        image={"pre_norm": False, "positions": "sincos", "layer_scale": 0.3, "mlp_width": 48},
        text={"layer_scale": 0.4, "activation": "quick_gelu", "vocabulary": 90},
    )
    run = make_run(config, tokenizer=HuggingFace(name=str(bert)))
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    theirs, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert isinstance(theirs, VisionTextDualEncoderModel)
    assert isinstance(theirs.vision_model, Dinov2Model)
    assert isinstance(theirs.text_model, CLIPTextModel)
    tokens = AutoTokenizer.from_pretrained(out)(
        CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    trained = load_model(run)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        made = theirs.eval()(**tokens, pixel_values=images)
        lengths = tokens["attention_mask"].sum(1)
        texts = trained.model.encode_text(tokens["input_ids"], lengths)
        torch.testing.assert_close(made.text_embeds, texts, rtol=0, atol=1e-5)
        seen = trained.model.encode_image(images)
        torch.testing.assert_close(made.image_embeds, seen, rtol=0, atol=1e-5)
