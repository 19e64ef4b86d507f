"""Fine-tuning against numbers recorded from the reference models."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal.common.checkpoint.init_from import Start, init_encoder
from frugal.common.contracts import Batch
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import to_timm
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.classification import (
    Classification,
    ClassificationObjective,
    smoothed_cross_entropy,
)
from frugal.common.transfer.classifier import ClassifierConfig, VisionClassifier, pooled
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING, vit_b16

GOLDEN = Path(__file__).parents[2] / "golden" / "milan"
LOG = logging.getLogger("test")
TOWER = ImageTower(width=64, depth=2, heads=4, mlp_width=256, patch_size=8, image_size=32)


def numbers(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def facts(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model of the recorded runs as a file, decoder and all."""
    file = tmp_path_factory.mktemp("golden") / "pretrained.safetensors"
    state = {
        name.removeprefix("state/"): tensor
        for name, tensor in numbers("milan_core").items()
        if name.startswith("state/")
    }
    save_file(state, file)
    return file


@pytest.fixture
def classifier(pretrained: Path) -> VisionClassifier:
    """The recorded fine-tuning model."""
    config = ClassifierConfig(image=pooled(TOWER, "mean"), num_classes=10)
    model = config.build(torch.Generator().manual_seed(0))
    init_encoder(model.image, pretrained, Start(interpolate=False, log=LOG))
    golden = numbers("finetune_global_pool")
    for name in ("head", "fc_norm"):
        part = {leaf: golden[f"state/{name}.{leaf}"] for leaf in ("weight", "bias")}
        getattr(model, name).load_state_dict(part)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_features_scores_losses_and_gradients(
    classifier: VisionClassifier, dtype: torch.dtype, tolerance: float
) -> None:
    golden, recorded = numbers("finetune_global_pool"), facts("finetune_global_pool")
    model = classifier.to(dtype)
    images = golden["input/images"].to(dtype)
    close = {"rtol": tolerance, "atol": tolerance / 10, "check_dtype": False}
    torch.testing.assert_close(model.features(images), golden["out/features"], **close)
    scores = model(images)
    torch.testing.assert_close(scores, golden["out/logits"], **close)
    smoothed = smoothed_cross_entropy(scores, golden["input/labels"], None, smoothing=0.1).mean()
    assert smoothed.item() == pytest.approx(recorded["loss_label_smoothing_0_1"], rel=tolerance)
    loss = -(golden["input/soft_targets"].to(dtype) * scores.log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(recorded["loss_soft_targets"], rel=tolerance)
    loss.backward()
    for name, parameter in (
        ("pos_embed", model.image.pos_embed),
        ("head.weight", model.head.weight),
    ):
        wanted = golden[f"grad/{name}"]
        distance = (parameter.grad - wanted).norm() / wanted.norm()
        assert distance < tolerance, name


def test_the_objective_gives_the_recorded_loss_whatever_damaged_images_stand_between(
    classifier: VisionClassifier,
) -> None:
    golden, recorded = numbers("finetune_global_pool"), facts("finetune_global_pool")
    objective = ClassificationObjective(
        classifier, Classification(smoothing=0.1), reduction=KeepAll(), seed=0
    )
    images, labels = golden["input/images"], golden["input/labels"]
    rows = torch.tensor([0, 0, 1, 2, 0])
    valid = torch.tensor([True, False, True, True, False])
    batch = Batch(
        images=torch.where(valid.view(-1, 1, 1, 1), images[rows], 0.0),
        labels=labels[rows] * valid,
        sample_numbers=torch.arange(5),
        valid=valid,
    )
    loss, metrics = objective(batch)
    assert loss.item() == pytest.approx(recorded["loss_label_smoothing_0_1"], rel=1e-5)
    right = (golden["out/logits"].argmax(1) == labels).float().mean()
    assert metrics["accuracy"].item() == pytest.approx(right.item())
    assert metrics["image_tokens"].item() == 17


def meta_classifier(config: ClassifierConfig) -> VisionClassifier:
    with torch.device("meta"):
        return VisionClassifier(config)


def their_names(model: VisionClassifier) -> dict[str, torch.nn.Parameter]:
    """Parameters in our order by the names of the released models."""
    renamed = {}
    for name, parameter in model.named_parameters():
        theirs = name.removeprefix("image.").replace("patch_embed.", "patch_embed.proj.")
        renamed[theirs] = parameter
    return renamed


def test_layer_decay_makes_the_recorded_groups_in_the_recorded_order() -> None:
    recorded = facts("layer_decay_vit_b")
    recipe = vit_b16()
    assert recipe.optimizer.layer_decay == recorded["layer_decay"]
    assert recipe.optimizer.weight_decay == recorded["weight_decay"]
    model = meta_classifier(recipe.model)
    names = {id(parameter): name for name, parameter in their_names(model).items()}
    groups = recipe.optimizer.build(model).param_groups
    assert len(groups) == len(recorded["groups"]) == 28
    for found, wanted in zip(groups, recorded["groups"], strict=True):
        assert found["lr_scale"] == pytest.approx(wanted["lr_scale"], rel=1e-12)
        assert found["weight_decay"] == wanted["weight_decay"]
        assert {names[id(p)] for p in found["params"]} == set(wanted["names"])


def test_a_classifier_on_the_class_token_has_its_norm_in_the_group_of_the_head() -> None:
    recipe = vit_b16()
    tower = pooled(recipe.model.image, "class")
    model = meta_classifier(replace(recipe.model, image=tower))
    names = {id(parameter): name for name, parameter in their_names(model).items()}
    *_, norm, head = recipe.optimizer.build(model).param_groups
    assert [names[id(p)] for p in norm["params"]] == ["norm.weight", "norm.bias", "head.bias"]
    assert [names[id(p)] for p in head["params"]] == ["head.weight"]
    assert norm["lr_scale"] == head["lr_scale"] == 1.0


def test_the_fine_tuned_state_is_that_of_the_released_files() -> None:
    recorded = facts("state_dict_shapes")["finetuned"]["vit_base_patch16"]
    config = vit_b16().model
    model = meta_classifier(config)
    state = to_timm(
        {
            name.removeprefix("image."): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith("image.")
        },
        config.image,
    )
    state |= {n: t for n, t in model.state_dict().items() if not n.startswith("image.")}
    shapes = {n: list(t.shape) for n, t in state.items() if not n.startswith("blocks.")}
    assert shapes == recorded["non_block"]
    assert sum(tensor.numel() for tensor in state.values()) == recorded["parameters"]


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        ("finetune_vit_b", FINE_TUNING["vit-b16"]()),
        ("linprobe_vit_b", LINEAR_PROBING["vit-b16"]()),
    ],
    ids=["fine-tuning", "probing"],
)
def test_learning_rates_of_the_recipes_are_the_recorded_ones(case: str, recipe: object) -> None:
    recorded = facts("lr_schedule")["schedules"][case]
    schedule: WarmupCosine = recipe.schedule
    peak = recipe.optimizer.peak(recipe.batch_size)
    assert peak == pytest.approx(recorded["lr"], rel=1e-12)
    per_epoch = recorded["steps_per_epoch"] // recorded["accum"]
    assert recipe.steps == recorded["epochs"] * per_epoch
    for value in recorded["values"]:
        step = value["epoch"] * per_epoch + value["micro_step"] // recorded["accum"]
        found = schedule.learning_rate(step * recipe.batch_size, peak=peak)
        assert found == pytest.approx(value["lr"], rel=1e-9, abs=1e-15)
        scaled = value["lr_group_with_scale_0_5"]
        assert 0.5 * found == pytest.approx(scaled, rel=1e-9, abs=1e-15)


def test_positions_are_resampled_as_recorded(tmp_path: Path) -> None:
    golden = numbers("pos_interp")
    # a tower of the recorded table on the larger grid, for images of one size on the other's
    tower = ImageTower(width=16, depth=1, heads=2, mlp_width=32, patch_size=2, image_size=8)
    stored = ClassifierConfig(image=pooled(tower, "mean"), num_classes=2).build(
        torch.Generator().manual_seed(0)
    )
    state = to_timm(
        {n: t for n, t in stored.image.state_dict().items() if not n.startswith("norm.")}, tower
    )
    state["pos_embed"] = golden["grid4_to_7_dim16/source"]
    save_file(state, tmp_path / "encoder.safetensors")
    wider = replace(tower, image_size=14)
    model = ClassifierConfig(image=pooled(wider, "mean"), num_classes=2).build(
        torch.Generator().manual_seed(1)
    )
    init_encoder(model.image, tmp_path / "encoder.safetensors", Start(interpolate=True, log=LOG))
    wanted = golden["grid4_to_7_dim16/result"]
    torch.testing.assert_close(model.image.pos_embed.data, wanted, rtol=0, atol=1e-5)
