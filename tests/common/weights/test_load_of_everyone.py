"""Weights as other libraries save them today, and what people do to them since."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from foreign_makers import TEXT, TEXTS, image_processor, save_with, shaken, transformers_model
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from frugal.common.checkpoint.init_from import init_from
from frugal.common.errors import InputError
from frugal.common.models.pretrained import TimmImage, TransformersImage, TransformersText
from frugal.common.models.pretrained_models import stored_state
from frugal.common.recipe_json import load_recipe
from frugal.common.weights.files import read_weights
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.load import load_model
from frugal.common.weights.save import save_model
from frugal.flip.recipes import demo

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def timm_model(**options: Any) -> nn.Module:
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **{**SHAPE, **options}))


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def vit() -> dict[str, Tensor]:
    return timm_model().state_dict()


@pytest.fixture
def clip_folder(bert: Path, tmp_path: Path) -> Path:
    """A ``CLIPModel`` with its tokenizer and its image processor."""
    folder = tmp_path / "clip"
    save_with(folder, shaken(transformers_model("clip")), bert, image_processor("clip"))
    return folder


def altered(folder: Path, **tensors: Tensor) -> Path:
    """A folder with other tensors under these names, the dots of which are double underscores."""
    file = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(file), **named}, file, metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_as_timm_saves_it_today_is_that_model(tmp_path: Path) -> None:
    model = timm_model(global_pool="avg")  # whose arguments timm writes, num_classes among them
    save_for_hf(model, tmp_path / "timm")
    assert "num_classes" in json.loads((tmp_path / "timm/config.json").read_text())["model_args"]
    imported = load_model(tmp_path / "timm")
    ours = imported.model
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), model(images), rtol=0, atol=1e-5)
    config = TimmImage(name=str(tmp_path / "timm"), image_size=32)
    assert stored_state(config)["cls_token"].equal(model.state_dict()["cls_token"])


def test_what_an_old_configuration_of_clip_says_twice_is_read_as_transformers_does(
    clip_folder: Path,
) -> None:
    file = clip_folder / "config.json"
    config = json.loads(file.read_text())
    second = {**config["vision_config"], "hidden_act": "gelu", "layer_norm_eps": 1e-2}
    file.write_text(json.dumps({**config, "vision_config_dict": second}))
    tower = read_encoder(clip_folder).tower
    assert (tower.activation, tower.norm_epsilon) == ("gelu", 1e-2)
    assert load_model(clip_folder).config.image.norm_epsilon == 1e-2


def test_what_has_no_place_in_a_model_of_transformers_is_told(
    clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    altered(clip_folder, adapter__lora_A=torch.ones(2, 2))
    with caplog.at_level(logging.WARNING, logger="frugal"):
        load_model(clip_folder)
    assert "1 have no place in a clip and are left: adapter.lora_A" in caplog.text


def test_a_shape_that_does_not_fit_is_named_in_folders_of_transformers(clip_folder: Path) -> None:
    altered(clip_folder, visual_projection__weight=torch.ones(24, 12))
    words = refusal(load_model, clip_folder)
    assert "visual_projection.weight has the shape (24, 12) there and (12, 24) here" in words


def test_the_file_that_is_left_beside_another_is_named_for_two_towers_too(
    clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(load_file(clip_folder / "model.safetensors"), clip_folder / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, logger="frugal"):
        load_model(clip_folder)
    assert "model.safetensors is taken, pytorch_model.bin left" in caplog.text


def test_a_tokenizer_with_more_entries_than_the_table_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers as t

    vision = {**{n: TEXTS[n] for n in ("hidden_size", "num_hidden_layers")}, "image_size": 32}
    config = t.CLIPConfig(
        text_config={**TEXTS, "vocab_size": 60},
        vision_config={**vision, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 8},
    )
    save_with(tmp_path / "clip", t.CLIPModel(config), bert, image_processor("clip"))
    words = refusal(load_model, tmp_path / "clip")
    assert "84 entries, more than the 60 rows of the table of tokens" in words
    small = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32}
    about = {"embed_dim": 8, "vision_cfg": small, "text_cfg": {**TEXT, "vocab_size": 1000}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-few", about)
    torch.save(open_clip.create_model("ViT-few").state_dict(), tmp_path / "few.pt")
    words = refusal(load_model, tmp_path / "few.pt", name="ViT-few")
    assert "49,408 entries, more than the 1,000 rows" in words


def test_a_siglip_without_its_head_is_a_sentence(bert: Path, tmp_path: Path) -> None:
    import transformers as t

    vision = {n: TEXTS[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    vision |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8, "vision_use_head": False}
    model = t.SiglipModel(t.SiglipConfig(text_config=TEXTS, vision_config=vision))
    save_with(tmp_path / "siglip", model, bert, image_processor("siglip"))
    assert "(siglip_vision_model) pools nothing" in refusal(load_model, tmp_path / "siglip")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    "no size": ({"image_size": None}, "has image_size None, neither a number of pixels nor a pair"),
    "patches": ({"patch_size": [8, 4]}, "have 8x4 pixels, but towers of this library have square"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_is_a_sentence(name: str, clip_folder: Path) -> None:
    change, sentence = CONFIGS[name]
    file = clip_folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"].update(change)
    file.write_text(json.dumps(config))
    assert sentence in refusal(read_encoder, clip_folder)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "swish2"}, {"num_attention_heads": 0}, {"num_hidden_layers": "2"}]
)
def test_the_configuration_is_named_where_transformers_cannot_build_it(
    change: dict[str, Any], clip_folder: Path
) -> None:
    file = clip_folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"].update(change)
    file.write_text(json.dumps(config))
    sentence = refusal(load_model, clip_folder)
    assert sentence.startswith(f"the config.json of {clip_folder} describes no model of transf")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_settings_that_the_weights_do_not_bear_out_are_refused_before_anything_is_built(
    part: str, clip_folder: Path
) -> None:
    file = clip_folder / "config.json"
    config = json.loads(file.read_text())
    config[part]["num_hidden_layers"] = 10**8
    file.write_text(json.dumps(config))
    assert "says that num_hidden_layers is 100000000" in refusal(load_model, clip_folder)


def test_a_model_without_its_tokenizer_is_told_what_to_copy(clip_folder: Path) -> None:
    for file in [*clip_folder.glob("tokenizer*"), *clip_folder.glob("vocab*")]:
        file.unlink()
    assert "holds no tokenizer (tokenizer.json, " in refusal(load_model, clip_folder)


def test_a_processor_that_cuts_an_edge_off_is_written_again(
    clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_model(clip_folder)
    assert bundle.transform.share == pytest.approx(32 / 36)
    assert save_model(bundle, tmp_path / "again", to="huggingface") < 1e-5
    again = load_model(tmp_path / "again")
    assert again.transform == bundle.transform
    assert "the same file gives other pixels there" not in caplog.text
    save_model(bundle, tmp_path / "other", to="open_clip")  # which has no such crop
    assert "the same file gives other pixels there" in caplog.text


def test_captions_are_cut_where_the_tokenizer_of_a_clip_cuts_them(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(clip_folder, model_max_length=7)
    tokenizer.save_pretrained(clip_folder)
    bundle = load_model(clip_folder)
    captions = ["a dog", "a photo of a dog and of two cats on a red bicycle"]
    inputs = tokenizer(captions, truncation=True, padding=True, return_tensors="pt")
    theirs = CLIPModel.from_pretrained(clip_folder).eval()(
        **inputs, pixel_values=torch.zeros(2, 3, 32, 32)
    ).text_embeds  # fmt: skip
    with torch.no_grad():
        ours = bundle.model.encode_text(*bundle.tokenize(captions))
    torch.testing.assert_close(ours, torch.nn.functional.normalize(theirs, dim=-1))
    assert bundle.text is not None and bundle.text.length == 7


def test_towers_of_others_give_unit_vectors_too_and_start_no_stage(
    bert: Path, tmp_path: Path
) -> None:
    save_with(tmp_path / "siglip", transformers_model("siglip"), bert, image_processor("siglip"))
    bundle = load_model(tmp_path / "siglip")
    with torch.no_grad():
        images = bundle.model.encode_image(torch.randn(3, 3, 32, 32))
        texts = bundle.model.encode_text(*bundle.tokenize(["a dog", "a cat"]))
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    recipe = demo()
    said = refusal(
        init_from, recipe.objective.build(recipe), bundle, interpolate=False,
        log=logging.getLogger("test"),
    )  # fmt: skip
    assert "holds a model whose towers only transformers has" in said


def test_timm_s_convolutions_are_refused_as_what_they_are(tmp_path: Path) -> None:
    save_for_hf(timm.create_model("resnet18", num_classes=3), tmp_path / "timm")
    sentence = "timm's resnet18 is none of its plain vision transformers"
    assert sentence in refusal(load_model, tmp_path / "timm")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vision_cfg": {"width": "64"}}, "has width '64' in vision_cfg"),
        ({"vision_cfg": {"image_size": "32"}}, "does not describe an image tower"),
        ({"embed_dim": None}, "does not describe a model"),
    ],
)
def test_a_configuration_of_open_clip_that_cannot_be_is_a_sentence(
    change: dict[str, Any], sentence: str, vit: dict[str, Tensor], tmp_path: Path
) -> None:
    config = {"embed_dim": 8, "vision_cfg": {"layers": 1}, "text_cfg": TEXT, **change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(vit, tmp_path / "open_clip_model.safetensors")
    assert sentence in refusal(load_model, tmp_path)


# ------------------------------------------------------------------------------------------------
# Tensors

NO_WEIGHTS = {
    "of whole numbers": lambda weight: (weight * 100).to(torch.int8),
    "sparse": lambda weight: weight.to_sparse(),
    "complex": lambda weight: weight.to(torch.complex64),
    "without its numbers": lambda weight: weight.to("meta"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_floating_point_weight_is_refused_by_name(
    kind: str, vit: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "blocks.0.mlp.fc1.weight"
    torch.save({**vit, name: NO_WEIGHTS[kind](vit[name])}, tmp_path / "odd.pth")
    for reader in (load_model, read_encoder, read_weights):
        assert f"{name} is {kind}; save them again" in refusal(reader, tmp_path / "odd.pth")


def test_quantized_weights_are_refused_where_transformers_would_read_them(
    clip_folder: Path,
) -> None:
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    weight = (load_file(clip_folder / "model.safetensors")[name] * 100).to(torch.int8)
    altered(clip_folder, **{name.replace(".", "__"): weight})
    assert f"{name} is of whole numbers" in refusal(load_model, clip_folder)
    vision = json.loads((clip_folder / "config.json").read_text())["vision_config"]
    (clip_folder / "config.json").write_text(json.dumps(vision))
    config = TransformersImage(name=str(clip_folder), image_size=32)
    assert f"{name} is of whole numbers" in refusal(stored_state, config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"blocks.0.mlp.fc1.weight": torch.ones(48, 192)}, "has the shape (48, 192) there and"),
        ({"patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}, "(48, 64) there and (48, 192) here"),
    ],
)
def test_an_image_tower_of_other_shapes_is_refused_before_a_run_is_written(
    change: dict[str, Tensor], sentence: str, vit: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({**vit, **change}, tmp_path / "odd.pth")
    assert sentence in refusal(load_model, tmp_path / "odd.pth")
    assert sentence in refusal(lambda path: read_encoder(path).build(), tmp_path / "odd.pth")


def test_layer_scales_of_a_bare_file_are_computed_with(tmp_path: Path) -> None:
    shape = {**SHAPE, "embed_dim": 64, "num_heads": 1}
    model = timm_model(**shape, init_values=0.3)
    torch.save(model.state_dict(), tmp_path / "scaled.pth")
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    ours = read_encoder(tmp_path / "scaled.pth").build().eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours.forward_pooled(images), expected, rtol=0, atol=1e-5)
    imported = load_model(tmp_path / "scaled.pth")
    imported.config.build().load_state_dict(imported.model.state_dict())


# ------------------------------------------------------------------------------------------------
# Files


def test_a_pointer_of_git_lfs_is_recognized_wherever_weights_are_read(clip_folder: Path) -> None:
    file = clip_folder / "model.safetensors"
    file.write_text(POINTER)
    for reader in (read_weights, read_encoder, load_model):
        source = file if reader is read_weights else clip_folder
        assert f"{file} is a pointer of Git LFS" in refusal(reader, source)


def test_a_file_under_the_other_ending_is_told_its_own(
    vit: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(vit, tmp_path / "a.safetensors")
    save_file(vit, tmp_path / "b.pth")
    assert "call it .pt" in refusal(read_weights, tmp_path / "a.safetensors")
    assert "call it .safetensors" in refusal(read_weights, tmp_path / "b.pth")
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 40)
    words = refusal(read_weights, tmp_path / "c.safetensors")
    assert "its header is damaged, or it is cut short" in words


@pytest.mark.parametrize("key", ["momentum", "module.momentum", "state_dict.module.momentum"])
def test_a_key_is_understood_as_it_stands_in_the_file(
    key: str, vit: dict[str, Tensor], tmp_path: Path
) -> None:
    both = {f"module.base.{n}": t for n, t in vit.items()}
    both |= {f"module.momentum.{n}": t + 1 for n, t in vit.items()}
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    found = read_weights(tmp_path / "moco.pth", key=key)
    assert found.keys() == vit.keys() and all(found[n].equal(vit[n] + 1) for n in vit)


def test_what_a_file_without_tensors_holds_is_said(vit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({name: np.asarray(tensor) for name, tensor in vit.items()}, tmp_path / "arrays.pth")
    words = refusal(read_weights, tmp_path / "arrays.pth")
    assert "it holds arrays of NumPy and no tensors: cls_token" in words
    torch.save({}, tmp_path / "empty.pth")
    assert "holds no state_dict, but nothing at all" in refusal(
        read_weights, tmp_path / "empty.pth"
    )


def test_text_towers_name_the_flag_that_starts_them_at_random(bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**TEXTS)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    words = refusal(stored_state, TransformersText(name=str(tmp_path), length=8))
    assert words.endswith("start at random with --model.text.no-pretrained")


# ------------------------------------------------------------------------------------------------
# Towers of timm and transformers


def test_of_several_sets_timm_s_choice_and_what_is_left_are_told(
    vit: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "sets.pth"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16)
    plain = model.state_dict()
    averaged = {name: tensor + 1 for name, tensor in plain.items()}
    torch.save({"model": plain, "model_ema": averaged, "optimizer": {"a": torch.ones(2)}}, file)
    config = TimmImage(name="vit_tiny_patch16_224", weights=file, image_size=16)
    with caplog.at_level(logging.WARNING, logger="frugal"):
        assert stored_state(config)["cls_token"].equal(plain["cls_token"])
    assert "model is taken, model_ema left" in caplog.text
    torch.save({"model": plain, "args": Namespace(lr=1)}, file)
    assert "of tensors and plain values alone; save its weights alone" in refusal(
        stored_state, config
    )
    torch.save([plain], file)
    assert "holds no weights by name" in refusal(stored_state, config)


def test_the_positions_of_roberta_that_stand_for_padding_hold_no_token(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    about = {**TEXTS, "max_position_embeddings": 20, "pad_token_id": 1}
    RobertaModel(RobertaConfig(**about)).save_pretrained(tmp_path)
    words = refusal(stored_state, TransformersText(name=str(tmp_path), length=19))
    assert words.endswith("give --model.text.length 18 or less")
    assert stored_state(TransformersText(name=str(tmp_path), length=18))


def test_recipes_that_are_none_are_sentences_in_words(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    for content, sentence in (
        (b"[" * 100_000, "is not a recipe (it is nested too deeply)"),
        (b'{"type": "frugal.common.recipe.WarmupCosine"}', "it lacks samples"),
    ):
        file.write_bytes(content)
        assert sentence in refusal(load_recipe, file)
