"""Where classifiers get their weights, against the libraries that wrote them; and refusals."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from frugal.common.checkpoint.init_from import Start, init_encoder, init_from
from frugal.common.checkpoint.store import save_weights
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, text_tower
from frugal.common.models.positions import resample_grid, sincos_table
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_open_clip
from frugal.common.recipe_json import to_json
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.classification import (
    Classification,
    ClassificationObjective,
    init_head,
)
from frugal.common.transfer.classifier import ClassifierConfig, Pooling, VisionClassifier, pooled
from frugal.common.transfer.linear_probing import LinearProbing, ProbeObjective
from frugal.milan.recipes import demo_pixels

LOG = logging.getLogger("test")
TOWER = ImageTower(width=64, depth=2, heads=2, mlp_width=128, patch_size=8, image_size=32)


def classifier(tower: ImageTower = TOWER, classes: int = 7, seed: int = 0) -> VisionClassifier:
    config = ClassifierConfig(image=tower, num_classes=classes)
    return config.build(torch.Generator().manual_seed(seed))


def start(model: VisionClassifier, source: Path, *, interpolate: bool = False) -> VisionClassifier:
    found = init_encoder(model.image, source, Start(interpolate=interpolate, log=LOG))
    init_head(model, found, log=LOG)
    return model


def timm_model(pooling: Pooling, image_size: int = 32, classes: int = 7) -> VisionTransformer:
    torch.manual_seed(5)
    options = {
        "class": {"global_pool": "token"},
        "mean": {"global_pool": "avg"},
        "mean_all": {"global_pool": "avg", "pool_include_prefix": True},
    }[pooling]
    model = VisionTransformer(
        img_size=image_size, patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=classes, **options,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("pooling", ["class", "mean", "mean_all"])
def test_a_fine_tuned_model_of_timm_says_the_same_here(pooling: Pooling, tmp_path: Path) -> None:
    theirs = timm_model(pooling)
    torch.save({"model": theirs.state_dict()}, tmp_path / "timm.pth")
    ours = start(classifier(pooled(TOWER, pooling)), tmp_path / "timm.pth").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_a_head_of_another_shape_is_left_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(timm_model("class", classes=4).state_dict(), tmp_path / "timm.pth")
    fresh = classifier()
    with caplog.at_level(logging.INFO):
        ours = start(classifier(), tmp_path / "timm.pth")
    assert torch.equal(ours.head.weight, fresh.head.weight)
    assert not torch.equal(ours.image.cls_token, fresh.image.cls_token)
    assert "head (of another shape there)" in caplog.text


def test_openais_tower_is_fine_tuned_on_its_class_token(tmp_path: Path) -> None:
    shape = {"width": 64, "depth": 2, "heads": 1, "mlp_width": 256}
    clip = clip_encoder("B/8", image_size=32, quick_gelu=True)
    config = DualEncoderConfig(
        image=replace(clip.image, **shape), text=text_tower("B", **shape), embed_dim=16
    )
    dual = config.build(torch.Generator().manual_seed(3)).eval()
    state = to_open_clip(dual.state_dict(), config)
    state |= {"input_resolution": torch.tensor(32)}
    torch.save(state, tmp_path / "clip.pt")
    ours = start(classifier(config.image), tmp_path / "clip.pt").eval()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = dual.image(images, output="pooled")
        torch.testing.assert_close(ours.features(images), wanted)


def run_of(model: nn.Module, config: object, folder: Path) -> Path:
    """A run directory with a model's weights, as far as an encoder is read from it."""
    folder.mkdir()
    encoded = to_json(demo_pixels())
    encoded |= {"model": to_json(config), "objective": to_json(Classification())}
    (folder / "recipe.json").write_text(json.dumps(encoded))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_weights(folder / "checkpoints", weights, step=1)
    return folder


def test_a_fine_tuned_run_of_ours_goes_on_at_another_size_with_its_head(tmp_path: Path) -> None:
    tower = pooled(TOWER, "mean")
    before = classifier(tower, seed=1)
    nn.init.normal_(before.fc_norm.weight)
    nn.init.normal_(before.image.pos_embed)
    source = run_of(before, before.config, tmp_path / "run")
    same = start(classifier(tower), source)
    for name, tensor in before.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    wider = replace(tower, image_size=(32, 48))
    with pytest.raises(InputError, match=r"4x4 patches, here are 4x6; add --run\.interpolate"):
        start(classifier(wider), source)
    resized = start(classifier(wider), source, interpolate=True)
    table = resample_grid(
        before.image.pos_embed.detach(), old_grid=(4, 4), new_grid=(4, 6), antialias=False
    )
    torch.testing.assert_close(resized.image.pos_embed.data, table)
    assert torch.equal(resized.head.weight, before.head.weight)


def test_a_fixed_table_becomes_the_start_of_a_trained_one(tmp_path: Path) -> None:
    tower = pooled(replace(TOWER, heads=1), "mean")
    state = timm_model("mean").state_dict()
    state["pos_embed"] = sincos_table((4, 4), 64, "sincos", class_row=True)[None]
    state["mask_token"], state["decoder_pos_embed"] = torch.zeros(1, 1, 8), torch.zeros(1, 17, 8)
    save_file(state, tmp_path / "mae.safetensors")
    ours = start(classifier(tower), tmp_path / "mae.safetensors")
    assert torch.equal(ours.image.pos_embed.data, state["pos_embed"])
    assert ours.image.pos_embed.requires_grad
    narrower = start(
        classifier(replace(tower, image_size=24)), tmp_path / "mae.safetensors", interpolate=True
    )
    table = resample_grid(state["pos_embed"], old_grid=(4, 4), new_grid=(3, 3), antialias=False)
    torch.testing.assert_close(narrower.image.pos_embed.data, table)
    assert not torch.allclose(table, sincos_table((3, 3), 64, "sincos", class_row=True)[None])


def test_new_classifiers_start_from_the_fixed_table_and_the_wanted_head() -> None:
    tower = pooled(replace(TOWER, image_size=(32, 48)), "mean")
    config = ClassifierConfig(image=tower, num_classes=900, head_init_std=2e-5)
    model = config.build(torch.Generator().manual_seed(0))
    table = sincos_table((4, 6), 64, "sincos", class_row=True)
    assert torch.equal(model.image.pos_embed.data, table[None])
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert model.image.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
    limit = (3 * 8 * 8) ** -0.5
    for parameter in model.image.patch_embed.parameters():
        assert 0.9 * limit < parameter.abs().max() <= limit


def test_no_parameter_is_left_uninitialized(monkeypatch: pytest.MonkeyPatch) -> None:
    create = VisionClassifier.__init__

    def create_full_of_nan(self: VisionClassifier, config: ClassifierConfig) -> None:
        create(self, config)
        for name, parameter in self.named_parameters():
            if "norm" not in name:  # torch's own start
                nn.init.constant_(parameter, float("nan"))

    monkeypatch.setattr(VisionClassifier, "__init__", create_full_of_nan)
    assert all(p.isfinite().all() for p in classifier().parameters())


def no_encoder(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_a_file_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    source = no_encoder(tmp_path, {"layer1.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match="is not an image encoder of a known kind"):
        start(classifier(), source)
    with pytest.raises(InputError, match="no file or folder"):
        start(classifier(), tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        start(classifier(), tmp_path / "text.pth")


def test_an_encoder_with_a_tensor_missing_or_too_many_is_refused(tmp_path: Path) -> None:
    state = timm_model("class").state_dict()
    without = {name: t for name, t in state.items() if name != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(InputError, match=r"has no blocks\.1\.mlp\.fc1\.bias"):
        start(classifier(), no_encoder(tmp_path, without))
    with pytest.raises(InputError, match="reg_token"):
        start(classifier(), no_encoder(tmp_path, state | {"reg_token": torch.zeros(1, 4, 64)}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 32}, r"has width 64, but model\.image\.width is 32"),
        ({"depth": 3}, r"has depth 2, but model\.image\.depth is 3"),
        ({"mlp_width": 64}, "mlp_width"),
        ({"patch_size": 4}, "--model.image.patch-size 8"),
        ({"patch_bias": False}, "patch_bias"),
        ({"pre_norm": True}, "pre_norm"),
    ],
)
def test_an_encoder_of_another_shape_is_refused(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    torch.save(timm_model("class").state_dict(), tmp_path / "timm.pth")
    model = classifier(replace(TOWER, **change))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=sentence):
        start(model, tmp_path / "timm.pth")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_heads_are_compared_where_they_are_known_and_doubted_where_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = classifier(replace(TOWER, heads=4))
    source = run_of(before, before.config, tmp_path / "run")
    with pytest.raises(InputError, match=r"has heads 4, but model\.image\.heads is 2"):
        start(classifier(), source)
    torch.save(timm_model("class").state_dict(), tmp_path / "timm.pth")
    start(classifier(), tmp_path / "timm.pth")
    assert "heads 1, here it is 2" in caplog.text


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"norm_epsilon": 1e-5}, "--model.image.norm-epsilon 1e-05"),
        ({"activation": "quick_gelu"}, "--model.image.activation quick_gelu"),
        ({"mean": (0.5, 0.4, 0.3)}, "--model.image.mean 0.5 0.4 0.3"),
        ({"std": (0.5, 0.4, 0.3)}, "--model.image.std 0.5 0.4 0.3"),
    ],
)
def test_a_run_whose_encoder_computes_otherwise_is_refused_with_the_flag(
    change: dict, flag: str, tmp_path: Path
) -> None:
    before = classifier(replace(TOWER, **change))
    source = run_of(before, before.config, tmp_path / "run")
    with pytest.raises(InputError, match=f"; give {flag}$"):
        start(classifier(), source)


def test_openais_numbers_make_a_file_certain_of_its_activation(tmp_path: Path) -> None:
    shape = {"width": 64, "depth": 2, "heads": 1, "mlp_width": 256}
    clip = clip_encoder("B/8", image_size=32, quick_gelu=True)
    config = DualEncoderConfig(
        image=replace(clip.image, **shape), text=text_tower("B", **shape), embed_dim=16
    )
    state = to_open_clip(config.build().state_dict(), config)
    torch.save(state | {"input_resolution": torch.tensor(32)}, tmp_path / "clip.pt")
    with pytest.raises(InputError, match=r"; give --model\.image\.activation quick_gelu$"):
        start(classifier(replace(config.image, activation="gelu")), tmp_path / "clip.pt")


def test_pooled_weights_have_no_norm_for_a_class_token(tmp_path: Path) -> None:
    torch.save(timm_model("mean").state_dict(), tmp_path / "pooled.pth")
    with pytest.raises(InputError, match="its features were pooled by a mean"):
        start(classifier(), tmp_path / "pooled.pth")


def test_an_encoder_must_be_given() -> None:
    tuned = ClassificationObjective(classifier(), Classification(), reduction=KeepAll(), seed=0)
    with pytest.raises(InputError, match=r"--run\.start-from"):
        init_from(tuned, None, interpolate=False, log=LOG)
    probe = ProbeObjective(classifier(), LinearProbing(), reduction=KeepAll(), seed=0)
    with pytest.raises(InputError, match="a linear probe measures an encoder"):
        init_from(probe, None, interpolate=False, log=LOG)
    scratch = Classification(from_scratch=True)
    objective = ClassificationObjective(classifier(), scratch, reduction=KeepAll(), seed=0)
    init_from(objective, None, interpolate=False, log=LOG)


@pytest.mark.parametrize("classes", [-1, 0, 1])
def test_nothing_can_be_told_apart_with_fewer_than_two_classes(classes: int) -> None:
    with pytest.raises(InputError, match=f"num_classes is {classes}, must be at least 2"):
        ClassifierConfig(image=TOWER, num_classes=classes)
