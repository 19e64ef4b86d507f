"""MILAN's encoders leave for timm and transformers, which load them without code of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BeitBackbone,
    BeitForImageClassification,
    UperNetForSemanticSegmentation,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    ViTModel,
)

from frugal.common.checkpoint.store import CheckpointStore, find_checkpoint
from frugal.common.errors import InputError
from frugal.common.export import Options, export
from frugal.common.models.weight_names import from_timm, from_vit_mae
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import to_json
from frugal.common.run import Run
from frugal.common.transfer.classifier import pooled
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.load import load_model
from frugal.milan.decoders import DecoderConfig, Split
from frugal.milan.model import MaskedModel, encoder
from frugal.milan.recipes import demo, demo_pixels
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import demo_fine_tuning, demo_probing

SMALL = {"image_size": 32, "width": 24, "depth": 2, "heads": 3, "mlp_width": 60}
STEP = 7
Make = Callable[[Recipe], Path]


def pretraining(recipe: Recipe, **options: Any) -> Recipe:
    """A recipe of pretraining with a small tower."""
    decoder = replace(recipe.model.decoder, width=16, depth=2, heads=2)
    tower = encoder("S/8", **{**SMALL, **options})
    return replace(recipe, model=MaskedModel(image=tower, decoder=decoder))


def tuning(recipe: Recipe, **options: Any) -> Recipe:
    """A recipe with classes and a small tower."""
    tower = encoder("S/8", **{**SMALL, **options}, positions="learned")
    pooling = recipe.model.image.pooling
    return replace(recipe, model=replace(recipe.model, image=pooled(tower, pooling), num_classes=9))


def module_of(recipe: Recipe) -> torch.nn.Module:
    """What a recipe trains; a masked model is built without its teacher."""
    if isinstance(recipe.model, MaskedModel):
        outputs = 192 if hasattr(recipe.objective, "normalize_patches") else 20
        return torch.nn.ModuleDict({"model": recipe.model.build(outputs=outputs)})
    return recipe.objective.build(recipe)


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """A run directory of a recipe, every weight and statistic moved away from its first value."""

    def make(recipe: Recipe) -> Path:
        folder = tmp_path / "run"
        generator = torch.Generator().manual_seed(3)
        module = module_of(recipe)
        trained = {name for name, _ in module.named_parameters()}
        tensors = {}
        for name, tensor in module.state_dict().items():
            kind = "weight" if name in trained else "buffer"
            if tensor.is_floating_point():  # a variance stays positive
                noise = 0.05 * torch.randn(tensor.shape, generator=generator)
                tensor = tensor + (noise if kind == "weight" else noise.abs())
            tensors[f"{kind}/{name}"] = tensor
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
        run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
        state = {"step": STEP, "updates": STEP, "loss_scale": {}}
        CheckpointStore(run, keep=1).save(tensors, state)
        return folder

    return make


def images_for(recipe: Recipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, *recipe.model.image.height_width, generator=generator)


# ------------------------------------------------------------------------------------------------
# Pretraining


def test_a_named_model_of_timm_loads_a_pretrained_encoder_strictly(make_run, tmp_path) -> None:
    # the teacher is on nobody's disk; what leaves does not need it
    recipe = replace(demo(), model=MaskedModel(image=encoder("Ti/16"), decoder=DecoderConfig()))
    teacher = replace(recipe.objective.teacher, source="/nowhere/ViT-B-16.pt")
    recipe = replace(recipe, objective=replace(recipe.objective, teacher=teacher))
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="timm", out=out)) < 1e-5
    state = load_file(out / "model.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(state, strict=True)
    ours, images = read_encoder(run), images_for(recipe)
    with torch.inference_mode():
        tokens = ours.build().eval().forward_tokens(images)
        torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(images), tokens[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(state["pos_embed"], ours.build().pos_embed)
    back = from_timm(state, recipe.model.image)
    assert back.keys() == ours.state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state.items())
    for source in (out, out / "model.safetensors"):
        again = read_encoder(source, heads=recipe.model.image.heads)
        assert again.tower == ours.tower
        assert all(torch.equal(again.state[name], tensor) for name, tensor in ours.state.items())


@pytest.mark.parametrize("size", [32, (16, 40)])
def test_auto_model_gives_the_same_last_hidden_state(size, make_run, tmp_path) -> None:
    recipe = pretraining(demo(), image_size=size)
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    theirs, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert isinstance(theirs, ViTModel)
    assert set(loading["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ours, images = read_encoder(run), images_for(recipe)
    with torch.inference_mode():
        tokens = ours.build().eval().forward_tokens(images)
        found = theirs.eval()(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
    back = from_vit_mae(load_file(out / "model.safetensors"), recipe.model.image)
    assert back.keys() == ours.state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state.items())


@pytest.mark.parametrize("normalized", [True, False])
def test_a_masked_autoencoder_of_pixels_predicts_the_same_in_transformers(
    normalized, make_run, tmp_path
) -> None:
    recipe = pretraining(demo_pixels())
    objective = replace(recipe.objective, normalize_patches=normalized)
    recipe = replace(recipe, objective=objective)
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface_mae", out=out)) < 1e-5
    theirs, loading = ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.config.norm_pix_loss == normalized and theirs.config.mask_ratio == 0.75
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    order, images = noise.argsort(1), images_for(recipe)
    split = Split(order[:, :4], order[:, 4:])
    ours: Any = load_model(run).model
    with torch.inference_mode():
        found = theirs.eval()(pixel_values=images, noise=noise).logits  # (B, N, P)
        expected = ours(images, split, hidden_only=True)
    hidden = found.gather(1, split.hidden[:, :, None].expand_as(expected))
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "to", "named"),
    [
        (demo(), "huggingface_mae", "model.decoder.kind=prompting"),
        (
            replace(demo(), model=replace(demo().model, decoder=DecoderConfig(kind="plain"))),
            "huggingface_mae",
            "objective=ReconstructFeatures",
        ),
        (demo_pixels(), "open_clip", "the model"),
    ],
)
def test_what_cannot_leave_is_named_with_a_way_out(recipe, to, named, make_run, tmp_path) -> None:
    run = make_run(pretraining(recipe))
    with pytest.raises(InputError) as refusal:
        export(Options(checkpoint=run, to=to, out=tmp_path / "out"))
    assert f"cannot express {named}: " in str(refusal.value)
    assert "--to frugal or huggingface or" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_wide_images_have_no_masked_autoencoder_in_transformers(make_run, tmp_path) -> None:
    run = make_run(pretraining(demo_pixels(), image_size=(16, 40)))
    with pytest.raises(InputError, match=r"model.image.image_size=\(16, 40\): .* square"):
        export(Options(checkpoint=run, to="huggingface_mae", out=tmp_path / "out"))


def test_a_slim_pretraining_run_has_the_same_bits(make_run, tmp_path) -> None:
    run, out = make_run(pretraining(demo())), tmp_path / "out"
    assert export(Options(checkpoint=run, to="frugal", out=out)) == 0
    read, old = find_checkpoint(out).reader(), find_checkpoint(run).reader()
    assert find_checkpoint(out).names() == find_checkpoint(run).names()
    assert all(torch.equal(read(name), old(name)) for name in find_checkpoint(out).names())
    card = (out / "README.md").read_text()
    assert "ReconstructFeatures" in card and "captions" not in card
    assert "image-feature-extraction" in card


# ------------------------------------------------------------------------------------------------
# With classes


@pytest.mark.parametrize("pooling", ["class", "mean", "mean_all"])
def test_a_fine_tuned_model_gives_timm_the_same_scores(pooling, make_run, tmp_path) -> None:
    recipe = tuning(demo_fine_tuning())
    tower = pooled(recipe.model.image, pooling)
    recipe = replace(recipe, model=replace(recipe.model, image=tower))
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="timm", out=out)) < 1e-5
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours: Any = load_model(run).model
    images = images_for(recipe)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)
    assert theirs.pretrained_cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("make", [demo_fine_tuning, demo_probing])
def test_a_classifier_of_the_class_token_leaves_for_transformers(make, make_run, tmp_path) -> None:
    recipe = tuning(make())
    recipe = replace(recipe, model=replace(recipe.model, image=pooled(recipe.model.image, "class")))
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    theirs, loading = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert isinstance(theirs, ViTForImageClassification) and not any(loading.values()), loading
    ours: Any = load_model(run).model
    images = images_for(recipe)
    with torch.inference_mode():
        logits = theirs.eval()(pixel_values=images).logits
        torch.testing.assert_close(logits, ours(images), rtol=1e-5, atol=1e-5)


def test_the_batch_norm_of_a_probe_is_part_of_the_exported_layer(make_run, tmp_path) -> None:
    recipe = tuning(demo_probing())
    run, out = make_run(recipe), tmp_path / "out"
    export(Options(checkpoint=run, to="timm", out=out))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours: Any = load_model(run).model
    assert not torch.equal(ours.head[0].running_var, torch.ones(24))
    images = images_for(recipe)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)
    slim = tmp_path / "slim"
    assert export(Options(checkpoint=run, to="frugal", out=slim)) == 0
    with torch.inference_mode():
        assert torch.equal(load_model(slim).model(images), ours(images))


@pytest.mark.parametrize(
    ("pooling", "to"),
    [("mean", "huggingface"), ("mean", "huggingface_beit"), ("class", "huggingface_beit")],
)
def test_a_norm_on_the_mean_leaves_for_transformers_as_beit(
    pooling, to, make_run, tmp_path
) -> None:
    recipe = tuning(demo_fine_tuning())
    tower = pooled(recipe.model.image, pooling)
    recipe = replace(recipe, model=replace(recipe.model, image=tower))
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to=to, out=out)) < 1e-5
    theirs, loading = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert isinstance(theirs, BeitForImageClassification) and not any(loading.values()), loading
    assert theirs.config.use_mean_pooling == (pooling == "mean")
    ours: Any = load_model(run).model
    images = images_for(recipe)
    with torch.inference_mode():
        logits = theirs.eval()(pixel_values=images).logits
        torch.testing.assert_close(logits, ours(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "option"),
    [("mean_all", "model.image.norm_after_pooling=True"), ("mean_all", "model.image.pooling")],
)
def test_a_mean_over_all_tokens_cannot_leave_for_transformers(
    pooling, option, make_run, tmp_path
) -> None:
    recipe = tuning(demo_fine_tuning())
    tower = pooled(recipe.model.image, pooling)
    run = make_run(replace(recipe, model=replace(recipe.model, image=tower)))
    to = "huggingface" if "norm" in option else "huggingface_beit"
    with pytest.raises(InputError, match=f"{option}.*: .*--to frugal or timm"):
        export(Options(checkpoint=run, to=to, out=tmp_path / "out"))


@pytest.mark.parametrize("depth", [2, 3])
def test_an_encoder_is_a_backbone_of_transformers(depth, make_run, tmp_path) -> None:
    recipe = pretraining(demo(), depth=depth, patch_bias=True)
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface_beit", out=out)) < 1e-5
    theirs, loading = BeitBackbone.from_pretrained(
        out, out_indices=[1, depth], output_loading_info=True
    )
    assert not any(loading.values()), loading
    ours, images = read_encoder(run).build().eval(), images_for(recipe)
    with torch.inference_mode():
        maps = theirs.eval()(pixel_values=images).feature_maps
        tokens = ours(images, output="blocks", blocks=(0, depth - 1))
        everything = AutoModel.from_pretrained(out).eval()(pixel_values=images).last_hidden_state
        torch.testing.assert_close(everything, ours.forward_tokens(images), rtol=1e-5, atol=1e-5)
    for found, expected in zip(maps, tokens, strict=True):
        flat = found.flatten(2).transpose(1, 2)  # (B, N, D)
        torch.testing.assert_close(flat, expected[:, 1:], rtol=1e-5, atol=1e-5)
    assert "BeitBackbone" in (out / "README.md").read_text()


def test_wide_images_have_no_backbone_in_transformers(make_run, tmp_path) -> None:
    run = make_run(pretraining(demo(), image_size=(16, 40)))
    with pytest.raises(InputError, match=r"model.image.image_size=\(16, 40\): .* square"):
        export(Options(checkpoint=run, to="huggingface_beit", out=tmp_path / "out"))


def test_a_segmenter_leaves_for_transformers_with_both_heads(make_run, tmp_path) -> None:
    recipe = SEGMENTATION["demo"]()
    model = replace(recipe.model, width=20, auxiliary_width=12, pool_scales=(1, 2), num_classes=7)
    recipe = replace(recipe, model=model)
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="huggingface", out=out)) < 1e-5
    theirs, loading = AutoModelForSemanticSegmentation.from_pretrained(
        out, output_loading_info=True
    )
    assert isinstance(theirs, UperNetForSemanticSegmentation) and not any(loading.values())
    assert theirs.config.auxiliary_loss_weight == recipe.objective.auxiliary_weight
    ours: Any = load_model(run).model
    images = images_for(recipe)
    with torch.inference_mode():
        made = theirs.eval()(pixel_values=images, labels=torch.zeros(3, 64, 64).long())
        torch.testing.assert_close(made.logits, ours(images), rtol=1e-5, atol=1e-5)
        auxiliary = theirs.auxiliary_head(theirs.backbone(images).feature_maps)
        torch.testing.assert_close(auxiliary, ours.both(images)[1], rtol=1e-5, atol=1e-5)
    assert "AutoModelForSemanticSegmentation" in (out / "README.md").read_text()
    processor = AutoImageProcessor.from_pretrained(out)
    pictures = [Image.new("RGB", size, "red") for size in ((100, 70), (40, 90))]
    pixels = processor(pictures, return_tensors="pt").pixel_values  # whole pictures, stretched
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(recipe.model.image.mean)) / torch.tensor(
        recipe.model.image.std
    )
    torch.testing.assert_close(pixels, red[None, :, None, None].expand(2, 3, 64, 64))
    sizes = [(70, 100), (90, 40)]
    with torch.inference_mode():
        made = theirs(pixel_values=pixels)
    classes = processor.post_process_semantic_segmentation(made, target_sizes=sizes)
    assert [tuple(part.shape) for part in classes] == sizes


def test_the_encoder_of_a_segmenter_leaves_without_a_last_norm(make_run, tmp_path) -> None:
    recipe = SEGMENTATION["demo"]()
    run, out = make_run(recipe), tmp_path / "out"
    assert export(Options(checkpoint=run, to="timm", out=out)) < 1e-5
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours: Any = load_model(run).model.image
    images, last = images_for(recipe), recipe.model.image.depth - 1
    with torch.inference_mode():
        tokens = ours(images, output="blocks", blocks=(last,))[0]
        found = theirs.forward_features(images)
    torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"model.image.norm: .*--to frugal or huggingface or timm"):
        export(Options(checkpoint=run, to="huggingface_beit", out=tmp_path / "other"))
