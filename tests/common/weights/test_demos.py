"""Every contrastive demo leaves for the libraries people use, with its tokenizer and a card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from run_directories import write_run_of
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    VisionTextDualEncoderModel,
)

from frugal.cit.recipes import RECIPES as CIT
from frugal.clipa.recipes import RECIPES as CLIPA
from frugal.cluster_masking.recipes import RECIPES as CLUSTER_MASKING
from frugal.common.export import Options, export
from frugal.common.recipe import Recipe
from frugal.common.weights.load import load_model
from frugal.flip.recipes import RECIPES as FLIP

CAPTIONS = ["a large red circle", "Three GREEN squares, left of 2 blue ones!", "words " * 40]
DEMOS = {
    f"{method}: {name}": make
    for method, recipes in (
        ("flip", FLIP), ("clipa", CLIPA), ("cluster_masking", CLUSTER_MASKING), ("cit", CIT)
    )
    for name, make in recipes.items()
    if name.startswith("demo")
}  # fmt: skip


@pytest.fixture(scope="module", params=DEMOS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run of a demo."""
    recipe: Recipe = DEMOS[request.param]()
    # as long as the run trains: what it does not change weighs nothing here
    recipe = replace(recipe, engine=replace(recipe.engine, ema_decay=None))
    return write_run_of(tmp_path_factory.mktemp("demo") / "run", recipe)


def pictures(run: Path) -> list[Image.Image]:
    size = load_model(run).config.image.height_width
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(3)]


@torch.inference_mode()
def made_here(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    trained = load_model(run)
    images = torch.stack([torch.from_numpy(np.array(image)) for image in pictures(run)])
    tokenizer, length = trained.tokenizer, trained.config.text.length
    texts = []
    for caption in CAPTIONS:
        ids = torch.tensor([tokenizer.assemble(tokenizer.encode(caption), length)])
        texts.append(trained.model.encode_text(ids, torch.tensor([ids.shape[1]])))
    return trained.model.encode_image(images.permute(0, 3, 1, 2)), torch.cat(texts)


def check_card(out: Path, run: Path) -> None:
    card = (out / "README.md").read_text()
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["objective"]["type"].rpartition(".")[2] in card
    assert f"| data | {recipe['data']['train'][0]}" in card
    assert "Not measured in this run." in card
    assert json.loads((out / "recipe.json").read_text()) == recipe


def test_there_is_a_demo_of_every_contrastive_method() -> None:
    assert {name.partition(":")[0] for name in DEMOS} == {
        "flip", "clipa", "cluster_masking", "cit"
    }  # fmt: skip


def test_open_clip_takes_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="open_clip", out=out)) < 1e-5
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    with torch.inference_mode():
        seen = torch.stack([preprocess(image) for image in pictures(run)])
        images = model.eval().encode_image(seen, normalize=True)
        texts = model.encode_text(tokenize(CAPTIONS), normalize=True)
    for theirs, ours in zip((images, texts), made_here(run), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    check_card(out, run)


def test_transformers_takes_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    has_clip_s_tower = load_model(run).config.image.pre_norm
    model = AutoModel.from_pretrained(out).eval()
    assert type(model) is (CLIPModel if has_clip_s_tower else VisionTextDualEncoderModel)
    tokens = AutoTokenizer.from_pretrained(out)
    words = {"padding": True, "truncation": True, "return_tensors": "pt"}
    if has_clip_s_tower:
        inputs = CLIPProcessor.from_pretrained(out)(images=pictures(run), text=CAPTIONS, **words)
    else:
        seen = AutoImageProcessor.from_pretrained(out)(images=pictures(run), return_tensors="pt")
        inputs = {**tokens(CAPTIONS, **words), **seen}
    with torch.inference_mode():
        made = model(**inputs)
    ours = made_here(run)
    torch.testing.assert_close(made.image_embeds, ours[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(made.text_embeds, ours[1], rtol=0, atol=1e-5)
    assert tokens(CAPTIONS[0]).input_ids == (
        inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    )
    check_card(out, run)
