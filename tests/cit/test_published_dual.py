"""``python -m frugal.cit.convert``: released models here and ours in their layout."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cit_cases import case
from safetensors.torch import save_file
from tower_cases import BERT, MOCO, PLAIN, recipe_of, text_of, write_run
from transformers import (
    AutoModel,
    BertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from frugal.cit.convert import Options, convert
from frugal.common.errors import InputError
from frugal.common.models.pretrained import TransformersImage
from frugal.common.recipe_json import load_recipe
from frugal.common.weights.load import load_model
from support import command


def released(folder: Path, *, config: bool = True) -> Path:
    """A model of the golden towers as it would have been released."""
    folder.mkdir()
    state = {n[3:]: t for n, t in case("text_tower").tensors.items() if n.startswith("sd.")}
    moco = case("moco_tiny").tensors
    state |= {f"vision_model.moco.{n[3:]}": t for n, t in moco.items() if n.startswith("sd.")}
    generator = torch.Generator().manual_seed(0)
    state["visual_projection.weight"] = torch.randn(20, 12, generator=generator)
    state["text_model.embeddings.position_ids"] = torch.arange(40)[None]  # as older versions did
    torch.save(state, folder / "pytorch_model.bin")
    if config:
        about = case("text_tower").about["bert"]
        text = {
            "model_type": "bert",
            "vocab_size": about["vocab"],
            "hidden_size": about["hidden"],
            "num_hidden_layers": about["layers"],
            "num_attention_heads": about["heads"],
            "intermediate_size": about["intermediate"],
            "max_position_embeddings": about["max_pos"],
        }
        settings = {
            "model_type": "vision-text-dual-encoder",
            "vision_config": {"model_type": "moco", "config_name": "tiny", "hidden_size": 12},
            "text_config": text,
            "projection_dim": 20,
        }
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def converted(source: Path, out: Path, **options) -> Path:
    convert(Options(source=source, out=out, **options))
    return out


@torch.inference_mode()
def test_a_released_model_gives_the_recorded_embeddings(tmp_path, bert_words, capsys) -> None:
    source = released(tmp_path / "released")
    run = converted(source, tmp_path / "run", image_heads=4, tokenizer=str(bert_words), length=12)
    assert "meeting in 20 dimensions" in capsys.readouterr().out
    trained = load_model(run)
    text, moco = case("text_tower").tensors, case("moco_tiny").tensors
    ids, lengths = text["input_ids"].long(), text["attention_mask"].sum(1)
    model = trained.model
    near = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model.text(ids, lengths), text["projected_text"], **near)
    pooled = model.image.forward_pooled(moco["images"])
    torch.testing.assert_close(pooled, moco["output_eval"], **near)
    torch.testing.assert_close(model.logit_scale.exp()[0], text["logit_scale"])
    assert load_recipe(run / "recipe.json").objective.train_image == "head"
    tokenizer = trained.tokenizer
    assert tokenizer.assemble(tokenizer.encode("dog"), 12)[0] == 2


def test_the_way_there_and_back_changes_no_bit(tmp_path, bert_words) -> None:
    source = released(tmp_path / "released")
    run = converted(source, tmp_path / "run", image_heads=4)
    back = converted(run, tmp_path / "back")
    first, second = (torch.load(folder / "pytorch_model.bin") for folder in (source, back))
    del first["text_model.embeddings.position_ids"]
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.shape == second[name].shape and tensor.equal(second[name]), name
    settings, again = (json.loads((f / "config.json").read_text()) for f in (source, back))
    assert again["text_config"] == settings["text_config"]
    assert again["vision_config"]["hidden_size"] == 12
    twice = converted(back, tmp_path / "twice", image_heads=4)
    left, right = (load_model(r).model.state_dict() for r in (run, twice))
    assert all(tensor.equal(right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("kind", ["augreg", "swag"])
def test_plain_towers_leave_and_come_back_as_either_kind(kind, tmp_path, bert_words) -> None:
    half = (0.5, 0.5, 0.5)
    image = replace(PLAIN, mean=half, std=half) if kind == "augreg" else PLAIN
    recipe = recipe_of(image, text_of(bert_words, pretrained=False), bert_words)
    run = write_run(tmp_path / "run", recipe)
    out = converted(run, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vision_config"]["model_type"] == kind
    back = converted(out, tmp_path / "back", image_heads=3, length=16)
    models = [load_model(folder) for folder in (run, back)]
    assert models[1].config.image == image
    left, right = (trained.model.state_dict() for trained in models)
    assert all(tensor.equal(right[name]) for name, tensor in left.items())
    assert load_recipe(back / "recipe.json").objective.train_image == "none"


def test_a_training_checkpoint_is_read_without_its_optimizer(tmp_path) -> None:
    state = torch.load(released(tmp_path / "released") / "pytorch_model.bin")
    file = tmp_path / "checkpoint-best.pth"
    content = {
        "model": state, "optimizer": {"state": {}}, "epoch": 3, "step": 4_500,
        "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=5e-4, config="yfcc15m"),
        "best_acc": 61.0, "best_val_loss": 1.5,
    }  # fmt: skip
    torch.save(content, file)
    run = converted(file, tmp_path / "run", image_heads=4, text_heads=4, length=12)
    trained = load_model(run)
    assert trained.source.step == 4_500
    name = "text.model.encoder.layer.1.output.dense.weight"
    expected = state["text_model.encoder.layer.1.output.dense.weight"]
    assert trained.model.state_dict()[name].equal(expected)


@torch.inference_mode()
def test_a_dual_encoder_of_transformers_comes_in_with_both_towers(tmp_path) -> None:
    vision = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, BertConfig(**BERT), projection_dim=10
    )
    theirs = VisionTextDualEncoderModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    run = converted(tmp_path / "theirs", tmp_path / "run", length=16)
    recipe = load_recipe(run / "recipe.json")
    assert isinstance(recipe.model.image, TransformersImage)
    model = load_model(run).model
    images = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    made = theirs(input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=images)
    near = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(model.encode_image(images), made.image_embeds, **near)
    torch.testing.assert_close(model.encode_text(ids, (ids > 0).sum(1)), made.text_embeds, **near)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("visual_projection.weight"), "has no visual_projection.weight"),
        (lambda s: s.pop("logit_scale"), "has no logit_scale"),
        (lambda s: s.pop("text_model.pooler.dense.bias"), "does not hold a whole model: our text"),
        (lambda s: s.update({"text_projection.weight": torch.zeros(3, 3)}), "has the shape"),
        (lambda s: s.update({"decoder.x": torch.zeros(3)}), "holds 'decoder.x', which no released"),
        (lambda s: s.pop("vision_model.moco.cls_token"), "holds no cls_token"),
        (lambda s: s.update({"text_model.extra": torch.zeros(1)}), "text.model.extra besides"),
    ],
)
def test_incomplete_models_are_sentences_and_leave_nothing(change, sentence, tmp_path) -> None:
    source = released(tmp_path / "released")
    state = torch.load(source / "pytorch_model.bin")
    change(state)
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(InputError, match=sentence):
        converted(source, tmp_path / "run", image_heads=4)
    assert not (tmp_path / "run").exists()


def test_damaged_and_other_sources_are_sentences(tmp_path, bert_words) -> None:
    source, out = released(tmp_path / "released", config=False), tmp_path / "run"
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read as a PyTorch file"):
        converted(source, out)
    file.unlink()
    with pytest.raises(InputError, match="holds none of"):
        converted(source, out)
    with pytest.raises(InputError, match="there is no file or folder"):
        converted(tmp_path / "nowhere", out)
    with pytest.raises(InputError, match="a model of type 'bert', not a vision-text-dual-encoder"):
        converted(bert_words, out)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="has no visual_projection"):
        converted(tmp_path / "x.safetensors", out)
    with pytest.raises(InputError, match="is there already and not empty"):
        converted(source, tmp_path)
    with pytest.raises(InputError, match="--kind swag is for runs of ours"):
        converted(released(tmp_path / "again"), out, kind="swag")
    assert not out.exists()


def test_runs_that_were_never_released_are_refused(tmp_path, bert_words) -> None:
    text = text_of(bert_words, pretrained=False)
    cases = {
        "model.image TransformersImage": (None, text),
        "model.image.pooling=mean": (replace(PLAIN, pooling="mean"), text),
        "model.text of this run is none": (PLAIN, replace(text, pooling="mean")),
    }
    vision = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
                       intermediate_size=48, image_size=32, patch_size=8)  # fmt: skip
    AutoModel.from_config(vision).save_pretrained(tmp_path / "vit")
    for number, (sentence, (image, caption)) in enumerate(cases.items()):
        image = image or TransformersImage(
            name=str(tmp_path / "vit"), image_size=32, pretrained=False
        )
        run = write_run(tmp_path / f"run{number}", recipe_of(image, caption, bert_words))
        with pytest.raises(InputError, match=sentence):
            converted(run, tmp_path / "out")
    plain = recipe_of(MOCO, text, bert_words)
    heads = replace(plain, model=replace(plain.model, head_width=14))
    with pytest.raises(InputError, match="projections of one layer"):
        converted(write_run(tmp_path / "heads", heads), tmp_path / "out")
    moco = write_run(tmp_path / "moco", plain)
    with pytest.raises(InputError, match="--kind is swag, but this tower has a projector"):
        converted(moco, tmp_path / "out", kind="swag")
    with pytest.raises(InputError, match="leave out --tokenizer"):
        converted(moco, tmp_path / "out", length=4)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_a_sentence(tmp_path) -> None:
    result = command("frugal.cit.convert", tmp_path / "x", "--out", "y", expect=2)
    assert result.stderr.startswith("error: there is no file or folder")
