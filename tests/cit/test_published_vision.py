"""Published files of image towers, against the libraries that they are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer
from tower_cases import (
    LOG,
    MOCO,
    PLAIN,
    batch_of,
    moco_file,
    recipe_of,
    stirred,
    text_of,
    write_run,
)
from transformers import ViTConfig, ViTModel

from frugal.cit.objective import IMAGE_FREEDOM
from frugal.cit.published_vision import read_vision
from frugal.cit.recipes import augreg_tower, moco_tower, swag_tower
from frugal.common.checkpoint.init_from import Start, init_image
from frugal.common.errors import InputError
from frugal.common.models.named import flip_encoder
from frugal.common.models.vit import ImageTower, ImageTransformer

NEAR = {"rtol": 1e-5, "atol": 1e-5}
HALF = (0.5, 0.5, 0.5)


def started(config: ImageTower, source: Path, *, interpolate: bool = False) -> ImageTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = ImageTransformer(config)
    start = Start(interpolate=interpolate, log=LOG)
    init_image(tower, read_vision(str(source)), IMAGE_FREEDOM, start)
    return tower.eval()


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def swag_model(image_size: int = 32) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """torchvision's vision transformer, and its weights as SWAG's files name them."""
    generator = torch.Generator().manual_seed(2)
    model = VisionTransformer(image_size, 8, 2, 3, 24, 48).eval()
    model.heads = torch.nn.Identity()
    model.load_state_dict({n: stirred(t, generator) for n, t in model.state_dict().items()})
    named = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("encoder_layer_", "layer_")
        name = name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")
        named[name] = tensor.transpose(0, 1) if name == "encoder.pos_embedding" else tensor
    return model, named


@torch.inference_mode()
def test_swag_s_file_gives_torchvision_s_class_token(tmp_path: Path) -> None:
    model, state = swag_model()
    file = tmp_path / "vit_b16_in1k.torch"
    torch.save(state | {"head.weight": torch.zeros(5, 24)}, file)
    tower = started(PLAIN, file)
    torch.testing.assert_close(tower.forward_pooled(pixels()), model(pixels()), **NEAR)


def test_swag_s_table_is_resized_with_aligned_corners(tmp_path: Path) -> None:
    _, state = swag_model()
    file = tmp_path / "swag.torch"
    torch.save(state, file)
    larger = replace(PLAIN, image_size=56)
    with pytest.raises(InputError, match=r"made for 4x4 patches, here are 7x7; add --run.interpol"):
        started(larger, file)
    table = started(larger, file, interpolate=True).pos_embed.detach()
    stored = state["encoder.pos_embedding"].transpose(0, 1)
    grid = stored[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (7, 7), mode="bicubic", align_corners=True)
    torch.testing.assert_close(table[:, 1:], expected.flatten(2).transpose(1, 2))
    assert table[:, :1].equal(stored[:, :1])
    patches = table[0, 1:].unflatten(0, (7, 7))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(patches[corner], stored[0, 1:].unflatten(0, (4, 4))[corner])


def timm_model() -> timm.models.VisionTransformer:
    generator = torch.Generator().manual_seed(4)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=11
    )
    model.load_state_dict({n: stirred(t, generator) for n, t in model.state_dict().items()})
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["file", "timm's folder", "converted folder"])
def test_augreg_gives_timm_s_class_token(kind: str, tmp_path: Path) -> None:
    model = timm_model()
    folder = tmp_path / "model"
    folder.mkdir()
    source = folder
    if kind == "file":
        source = folder / "augreg.safetensors"
        save_file(model.state_dict(), source)
    elif kind == "timm's folder":
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text('{"architecture": "vit_base_patch32_224"}')
    else:
        state = {f"augreg.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        settings = {"model_type": "augreg", "config_name": "vit", "hidden_size": 24}
        (folder / "config.json").write_text(json.dumps(settings))
    tower = started(replace(PLAIN, mean=HALF, std=HALF), source)
    expected = model.forward_head(model.forward_features(pixels()), pre_logits=True)
    torch.testing.assert_close(tower.forward_pooled(pixels()), expected, **NEAR)


def moco_state() -> dict[str, Tensor]:
    """timm's tower with a projector, as MoCo v3 names it."""
    projector = ImageTransformer(MOCO).projector.state_dict()
    state = {n: t for n, t in timm_model().state_dict().items() if not n.startswith("head.")}
    return state | {f"head.{name}": tensor for name, tensor in projector.items()}


def test_moco_is_read_from_its_file_a_converted_folder_and_a_released_one(tmp_path) -> None:
    state = moco_state()
    file = moco_file(tmp_path / "vit-b-300ep.pth.tar", state)
    converted, released = tmp_path / "converted", tmp_path / "released"
    for folder, prefix, settings in (
        (converted, "moco.", {"model_type": "moco"}),
        (released, "vision_model.moco.", {"vision_config": {"model_type": "moco"}}),
    ):
        folder.mkdir()
        named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        torch.save(named | {"text_model.x": torch.zeros(1)}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(settings))
    first = started(MOCO, file).state_dict()
    table = first["pos_embed"]
    assert table.equal(state["pos_embed"]) and "projector.7.running_var" in first
    for source in (converted, released, released / "pytorch_model.bin"):
        other = started(MOCO, source).state_dict()
        assert all(other[name].equal(tensor) for name, tensor in first.items())


def test_a_projector_may_be_left_or_new(tmp_path: Path) -> None:
    file = moco_file(tmp_path / "moco.pth.tar", moco_state())
    started(PLAIN, file)  # the feature before it
    plain = tmp_path / "plain.safetensors"
    save_file(timm_model().state_dict(), plain)
    tower = ImageTransformer(MOCO)
    before = tower.projector[0].weight.clone()
    freedom = replace(IMAGE_FREEDOM, may_be_new=("projector.",))
    init_image(tower, read_vision(plain), freedom, Start(interpolate=False, log=LOG))
    assert tower.projector[0].weight.equal(before)
    with pytest.raises(InputError, match="has no projector, and a random one would stay"):
        started(MOCO, plain)


@torch.inference_mode()
def test_a_vit_of_transformers_gives_its_class_token(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    tower = started(PLAIN, tmp_path)
    expected = model(pixels()).last_hidden_state[:, 0]
    torch.testing.assert_close(tower.forward_pooled(pixels()), expected, **NEAR)
    with pytest.raises(InputError, match=r"has norm_epsilon 1e-06, but .* is 1e-05; give"):
        started(replace(PLAIN, norm_epsilon=1e-5), tmp_path)


def test_runs_of_ours_give_their_towers_with_tables_of_any_kind(bert_words, tmp_path) -> None:
    tower = replace(flip_encoder("B/16").image, width=24, depth=2, heads=3, mlp_width=48,
                    patch_size=8, image_size=32)  # fmt: skip
    text = text_of(bert_words, pretrained=False)
    run = write_run(tmp_path / "run", recipe_of(tower, text, bert_words))
    same = started(tower, run)
    learned = started(replace(tower, positions="learned"), run)
    images = batch_of().images
    with torch.inference_mode():
        torch.testing.assert_close(same.forward_pooled(images), learned.forward_pooled(images))
    larger = started(replace(tower, image_size=64), run, interpolate=True)
    assert larger.pos_embed.shape == (1, 64, 24)
    with pytest.raises(InputError, match=r"has pooling mean_all, but model.image.pooling is class; "
                       "give --model.image.pooling mean_all"):  # fmt: skip
        started(replace(tower, pooling="class"), run)
    with pytest.raises(InputError, match="is not sincos_moco; keep it with"):
        started(replace(tower, positions="sincos_moco"), run)


def test_the_published_sizes() -> None:
    moco = moco_tower()
    assert (moco.width, moco.projector_width, moco.pooled_width) == (768, 4096, 256)
    assert moco.positions == "learned" and moco.num_positions == 197
    assert augreg_tower("L/16").mean == HALF and augreg_tower().patch_size == 32
    huge = swag_tower("H/14")
    assert (huge.width, huge.depth, huge.heads, huge.mlp_width) == (1280, 32, 16, 5120)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "it lacks blocks.1.mlp.fc2.bias"),
        (lambda s: s.pop("head.4.running_var"), "it lacks projector.4.running_var"),
        (lambda s: s.pop("head.6.weight"), "a projector without head.6.weight; it is incomplete"),
        (lambda s: s.pop("cls_token"), "holds no cls_token"),
        (lambda s: s.update({"norm.weight": torch.zeros(25)}), "norm.weight has the shape"),
        (lambda s: s.update({"blocks.0.gate": torch.zeros(1)}), "holds 'blocks.0.gate'"),
    ],
)
def test_incomplete_files_are_sentences(change, sentence, tmp_path: Path) -> None:
    state = moco_state()
    change(state)
    file = moco_file(tmp_path / "moco.pth.tar", state)
    with pytest.raises(InputError, match=sentence):
        started(MOCO, file)


def test_damaged_files_and_other_things_are_sentences(tmp_path: Path) -> None:
    file = moco_file(tmp_path / "moco.pth.tar", moco_state())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as a PyTorch file"):
        read_vision(file)
    file.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as a PyTorch file"):
        read_vision(file)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, file)
    with pytest.raises(InputError, match="is not an image encoder of a known kind"):
        read_vision(file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(InputError, match="holds no state_dict"):
        read_vision(file)
    with pytest.raises(InputError, match="there is no file or folder"):
        read_vision(tmp_path / "nowhere.pth.tar")
    (tmp_path / "config.json").write_text('{"model_type": "moco"}')
    with pytest.raises(InputError, match=r"holds none of model.safetensors"):
        read_vision(tmp_path)
    other = tmp_path / "swag.torch"
    _, state = swag_model()
    for missing in ("conv_proj.weight", "encoder.pos_embedding"):
        torch.save({n: t for n, t in state.items() if n != missing}, other)
        with pytest.raises(InputError, match="is no whole tower"):
            read_vision(other)


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, capsys) -> None:
    file = tmp_path / "bad.pth.tar"
    torch.save({"state_dict": {}, "extra": Runs()}, file)
    with pytest.raises(InputError, match="cannot be read as a PyTorch file of tensors"):
        read_vision(file)
    assert "executed" not in capsys.readouterr().out


def test_a_tower_of_another_size_is_a_sentence(tmp_path: Path) -> None:
    file = moco_file(tmp_path / "moco.pth.tar", moco_state())
    with pytest.raises(InputError, match=r"has depth 2, but model.image.depth is 3; give --model"):
        started(replace(MOCO, depth=3), file)
    with pytest.raises(InputError, match=r"projector.0.weight has the shape"):
        started(replace(MOCO, projector_width=32), file)
