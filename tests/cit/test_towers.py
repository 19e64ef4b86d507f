"""Models of timm and transformers as towers, against the libraries themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tower_cases import LOG, ROWS, batch_of, text_of, write_bert
from transformers import (
    AutoModel,
    Dinov2Config,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    ResNetConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
)

from frugal.cit.recipes import dual_encoder
from frugal.common.errors import InputError
from frugal.common.models.pretrained import TimmImage, TransformersImage, TransformersText
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import KeptPatches

NARROW = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48,
}  # fmt: skip
IMAGE_MODELS: dict[str, tuple[PretrainedConfig, str]] = {
    "vit": (ViTConfig(**NARROW, image_size=32, patch_size=8), "pooler"),
    "vit first": (ViTConfig(**NARROW, image_size=32, patch_size=8), "first"),
    "dinov2": (Dinov2Config(**NARROW, image_size=32, patch_size=8, mlp_ratio=2), "mean"),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), "pooler"),
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
TEXT_MODELS: dict[str, tuple[PretrainedConfig, str]] = {
    "roberta": (RobertaConfig(**NARROW, vocab_size=ROWS, max_position_embeddings=40), "pooler"),
    "distilbert": (
        DistilBertConfig(dim=24, n_layers=2, n_heads=3, hidden_dim=48, vocab_size=ROWS),
        "first",
    ),
    "gpt2": (GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=ROWS, **ENDS), "last"),
    "t5": (T5Config(d_model=24, d_ff=48, num_layers=2, num_heads=3, d_kv=8, vocab_size=ROWS),
           "mean"),
}  # fmt: skip


def saved(folder: Path, config: PretrainedConfig) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_an_image_model_of_transformers_pools_what_it_says(name: str, tmp_path: Path) -> None:
    config, pooling = IMAGE_MODELS[name]
    folder = saved(tmp_path / "model", config)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    pixels = json.dumps({"image_mean": mean, "image_std": std})
    (folder / "preprocessor_config.json").write_text(pixels)
    tower = TransformersImage(name=str(folder), image_size=32, pooling=pooling).module(10)
    tower.initialize(torch.Generator())
    tower.start(log=LOG)
    tower.eval()
    images = batch_of().images
    normalized = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        made = AutoModel.from_pretrained(folder).eval()(pixel_values=normalized)
        expected = {
            "pooler": lambda: made.pooler_output.flatten(1),
            "first": lambda: made.last_hidden_state[:, 0],
            "mean": lambda: made.last_hidden_state.mean(1),
        }[pooling]()
        torch.testing.assert_close(tower.forward_pooled(images), expected, rtol=1e-5, atol=1e-5)
        assert tower(images).shape == (6, 10)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_text_model_of_transformers_pools_what_it_says(name: str, tmp_path: Path) -> None:
    config, pooling = TEXT_MODELS[name]
    folder = saved(tmp_path / "model", config)
    tower = TransformersText(name=str(folder), length=12, pooling=pooling).module()
    tower.initialize(torch.Generator())
    tower.start(log=LOG)
    tower.eval()
    batch = batch_of()
    ids, lengths = batch.token_ids, batch.text_lengths
    theirs = T5EncoderModel if name == "t5" else AutoModel
    model = theirs.from_pretrained(folder).eval()
    with torch.inference_mode():
        found = tower.forward_pooled(ids, lengths)
        for row, length in enumerate(lengths.tolist()):  # alone, so that nothing is padded
            made = model(input_ids=ids[row : row + 1, :length])
            expected = {
                "pooler": lambda made=made: made.pooler_output[0],
                "first": lambda made=made: made.last_hidden_state[0, 0],
                "last": lambda made=made: made.last_hidden_state[0, -1],
                "mean": lambda made=made: made.last_hidden_state[0].mean(0),
            }[pooling]()
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_timm_model_starts_from_a_file_and_gives_timm_s_features(name, tmp_path) -> None:
    model = timm.create_model(name, num_classes=7, **({"img_size": 64} if "vit" in name else {}))
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    tower = TimmImage(name=name, weights=file, image_size=64).module()
    tower.initialize(torch.Generator())
    tower.start(log=LOG)
    images = batch_of(size=64).images
    about = model.pretrained_cfg
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        model.reset_classifier(0)
        expected = model.eval()((images / 255 - mean) / std)
        found = tower.eval().forward_pooled(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert")


def test_the_recipe_holds_all_that_the_model_is_made_of(bert: Path) -> None:
    text = text_of(bert, dropout=0.0)
    for file in bert.iterdir():
        file.unlink()
    bert.rmdir()
    again = from_json(json.loads(json.dumps(to_json(text))))
    assert again == text
    assert (again.vocabulary, again.width, again.pad_id) == (ROWS, 32, 0)
    again.module()
    other = write_bert(bert.with_name("other"), hidden_size=16)
    assert replace(again, name=str(other)).width == 16


def test_dropout_is_what_the_recipe_says(bert: Path) -> None:
    batch = batch_of()
    for dropout, differs in ((None, True), (0.0, False)):
        tower = text_of(bert, dropout=dropout).module()
        tower.initialize(torch.Generator())
        tower.start(log=LOG)
        tower.train()
        first, second = (tower(batch.token_ids, batch.text_lengths) for _ in range(2))
        assert first.equal(second) is not differs


def test_weights_come_from_the_generator_alone(bert: Path) -> None:
    config = dual_encoder(
        TimmImage(name="vit_tiny_patch16_224", image_size=32), text_of(bert, pretrained=False)
    )
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = config.build(torch.Generator().manual_seed(7)).state_dict()
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    second = config.build(torch.Generator().manual_seed(7)).state_dict()
    third = config.build(torch.Generator().manual_seed(8)).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    for part in ("image.model.blocks.0.attn.qkv", "text.model.pooler.dense", "image.projection"):
        assert not first[f"{part}.weight"].equal(third[f"{part}.weight"])
    limit = first["text.projection.weight"].abs().max() * 32**0.5
    assert 0.98 < limit <= 1  # uniform within 1 / sqrt(inputs)


def test_what_nothing_depends_on_is_not_trained(tmp_path: Path, bert: Path) -> None:
    folder = saved(tmp_path / "dino", IMAGE_MODELS["dinov2"][0])
    image = TransformersImage(name=str(folder), image_size=32)
    model = dual_encoder(image, text_of(bert, pooling="mean")).build()
    batch = batch_of()
    features = model(batch.images, batch.token_ids, batch.text_lengths)
    sum(part.square().sum(1).sqrt().sum() for part in features).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == ["logit_scale"]  # which is the loss's
    assert not model.get_parameter("image.model.embeddings.mask_token").requires_grad
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_biases_of_keys_get_their_true_gradient_of_zero(tmp_path: Path, bert: Path) -> None:
    image = TimmImage(name="vit_tiny_patch16_224", image_size=32, pretrained=False)
    model = dual_encoder(image, text_of(bert)).build()
    batch = batch_of()
    model.encode_image(batch.images)[:, 0].sum().backward()
    model.encode_text(batch.token_ids, batch.text_lengths)[:, 0].sum().backward()
    key = model.get_parameter("text.model.encoder.layer.0.attention.self.key.bias").grad
    query, middle, value = model.image.model.blocks[0].attn.qkv.bias.grad.chunk(3)
    assert not key.any() and not middle.any()
    assert query.any() and value.any()


def test_recomputed_blocks_give_the_same_gradients(bert: Path) -> None:
    image = TimmImage(name="vit_tiny_patch16_224", image_size=32, pretrained=False)
    config = dual_encoder(image, text_of(bert, dropout=0.0, pretrained=False))
    batch, gradients = batch_of(), []
    for wanted in (False, True):
        model = config.build()
        model.checkpoint_activations = wanted
        assert model.checkpoint_activations is wanted
        images, texts = model.train()(batch.images, batch.token_ids, batch.text_lengths)
        (images * texts).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_flops_are_those_that_torch_counts(bert: Path) -> None:
    image = TimmImage(name="vit_tiny_patch16_224", image_size=32)
    # 12 blocks of width 192 on 5 tokens, and the patches
    blocks = 12 * (2 * 5 * 192 * 192 * 12 + 4 * 5 * 5 * 192)
    assert image.flops(1) == blocks + 2 * 4 * 768 * 192
    text = text_of(bert)
    assert text.flops(8) > 1.9 * text.flops(4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pooling": "pooler"}, "is a GPT2Model, which pools nothing itself; say what is pooled"),
        ({"pooling": "last", "length": 2000}, "has 1024 positions, fewer than model.text.length"),
        ({"pooling": "last", "length": 0}, "text.length is 0"),
        ({"pooling": "last", "dropout": 1.0}, "text.dropout is 1.0"),
    ],
)
def test_what_a_text_model_cannot_do_is_a_sentence(options, sentence, tmp_path) -> None:
    folder = saved(tmp_path / "gpt2", TEXT_MODELS["gpt2"][0])
    with pytest.raises(InputError, match=sentence):
        TransformersText(name=str(folder), **options).module()


def test_names_and_folders_that_hold_no_model_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder ./nowhere"):
        TransformersText(name="./nowhere")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        TransformersText(name=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        TransformersImage(name=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no model_type"):
        TransformersText(name=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip", "text_config": {}, '
                                          '"vision_config": {}}')  # fmt: skip
    with pytest.raises(InputError, match="is a clip of two towers"):
        TransformersText(name=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(InputError, match="transformers cannot make"):
        TransformersText(name=str(tmp_path)).module()
    with pytest.raises(InputError, match=r"timm .* has no model 'vit_no_such'"):
        TimmImage(name="vit_no_such").module()
    with pytest.raises(InputError, match=r"takes images of 32 pixels, but .* is 64"):
        folder = saved(tmp_path / "vit", IMAGE_MODELS["vit"][0])
        TransformersImage(name=str(folder), image_size=64).module()


def test_damaged_and_foreign_weights_are_sentences(tmp_path: Path, bert: Path) -> None:
    weights = bert / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    tower = text_of(bert).module()
    with pytest.raises(InputError, match=f"the weights of {bert} cannot be loaded"):
        tower.start(log=LOG)
    headless = AutoModel.from_pretrained(write_bert(tmp_path / "other")).state_dict()
    save_file({n: t for n, t in headless.items() if "pooler" not in n}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"lack pooler\.dense.*choose another pooling"):
        tower.start(log=LOG)
    first = text_of(bert, pooling="first").module()
    first.initialize(torch.Generator())
    first.start(log=LOG)  # needs none
    file = tmp_path / "timm.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="cannot be loaded from"):
        TimmImage(name="vit_tiny_patch16_224", weights=file, image_size=32).module().start(log=LOG)


def test_a_file_of_another_timm_model_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "timm.safetensors"
    save_file({"bias": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"lack .* not of resnet18"):
        TimmImage(name="resnet18", weights=file, image_size=64).module().start(log=LOG)


def test_a_foreign_image_tower_sees_images_whole(bert: Path) -> None:
    image = TimmImage(name="resnet18", image_size=32, pretrained=False)
    tower = image.module()
    with pytest.raises(InputError, match="sees images whole"):
        tower(batch_of().images, KeptPatches.dense(torch.zeros(6, 1, dtype=torch.int64)))
    with pytest.raises(InputError, match="reached a tower built for 32"):
        tower(batch_of(size=64).images)


def test_slots_of_tokens_are_for_models_that_can_be_told(tmp_path: Path, bert: Path) -> None:
    batch = batch_of()
    slots = torch.arange(8).expand(6, -1)
    tower = text_of(bert).module()
    tower.initialize(torch.Generator())
    tower.eval()
    plain = tower(batch.token_ids, batch.text_lengths)
    torch.testing.assert_close(tower(batch.token_ids, batch.text_lengths, slots), plain)
    assert not tower(batch.token_ids, batch.text_lengths, slots + 3).allclose(plain)
    folder = saved(tmp_path / "roberta", TEXT_MODELS["roberta"][0])
    other = TransformersText(name=str(folder), length=12).module()
    with pytest.raises(InputError, match="is a roberta, which cannot be told the slots"):
        other(batch.token_ids, batch.text_lengths, slots)


def test_a_folder_of_timm_s_is_a_tower_with_its_own_settings(tmp_path: Path) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_224", num_classes=5, **args).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    content = {"architecture": "vit_base_patch16_224", "model_args": args, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = TimmImage(name=str(tmp_path), image_size=32)
    assert (config.mean, config.std, config.width) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 24)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    tower = config.module()
    tower.initialize(torch.Generator())
    tower.start(log=LOG)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(tower.eval().forward_pooled(pixels), expected)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="names no architecture, so that it is not a folder"):
        TimmImage(name=str(tmp_path), image_size=32)
