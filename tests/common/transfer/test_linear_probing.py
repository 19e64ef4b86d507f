"""Linear probing against numbers recorded from the reference models."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from frugal.common.checkpoint.init_from import Start, init_encoder
from frugal.common.contracts import Batch
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.optim.optimizers import LARS, set_learning_rate
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.augmentation import SingleDrawCrop, single_window
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.transfer.linear_probing import FeatureNorm, LinearProbing, ProbeObjective

GOLDEN = Path(__file__).parents[2] / "golden" / "milan"
LOG = logging.getLogger("test")
TOWER = ImageTower(width=64, depth=2, heads=4, mlp_width=256, patch_size=8, image_size=32)
NUMBERS = load_file(GOLDEN / "linprobe_cls.safetensors")
FACTS = json.loads((GOLDEN / "linprobe_cls.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model of the recorded runs as a file, decoder and all."""
    file = tmp_path_factory.mktemp("golden") / "pretrained.safetensors"
    core = load_file(GOLDEN / "milan_core.safetensors")
    state = {n.removeprefix("state/"): t for n, t in core.items() if n.startswith("state/")}
    save_file(state, file)
    return file


@pytest.fixture
def probe(pretrained: Path) -> ProbeObjective:
    """The recorded probe before its first step."""
    config = ClassifierConfig(image=TOWER, num_classes=10)
    model = config.build(torch.Generator().manual_seed(0))
    init_encoder(model.image, pretrained, Start(interpolate=False, log=LOG))
    objective = ProbeObjective(model, LinearProbing(), reduction=KeepAll(), seed=0)
    with torch.no_grad():
        model.head[1].weight.copy_(NUMBERS["state/head.1.weight"])
        model.head[1].bias.copy_(NUMBERS["state/head.1.bias"])
    return objective


def recorded_batch(step: int) -> Batch:
    return Batch(
        images=NUMBERS[f"input/images{step}"].float(),
        labels=NUMBERS["input/labels"][step - 1],
        sample_numbers=torch.arange(8),
        valid=torch.ones(8, dtype=torch.bool),
    )


def test_two_steps_and_an_evaluation(probe: ProbeObjective) -> None:
    close = {"rtol": 1e-4, "atol": 1e-5}
    options = LARS(
        learning_rate=FACTS["lr"],
        momentum=FACTS["momentum"],
        weight_decay=FACTS["weight_decay"],
        trust=FACTS["trust_coefficient"],
    )
    norm, linear = probe.model.head.children()
    optimizer = options.build(probe)
    set_learning_rate(optimizer, FACTS["lr"])
    features = probe.model.features(recorded_batch(1).images)
    torch.testing.assert_close(features, NUMBERS["out/features1"], **close)
    for step in (1, 2):
        batch = recorded_batch(step)
        loss, _ = probe(batch)
        assert loss.item() == pytest.approx(FACTS["losses"][step - 1], rel=1e-5)
        loss.backward()
        for name in ("weight", "bias"):
            gradient = getattr(linear, name).grad
            torch.testing.assert_close(gradient, NUMBERS[f"grad{step}/head.1.{name}"], **close)
        optimizer.step()
        optimizer.zero_grad()
        for name in ("running_mean", "running_var"):
            wanted = NUMBERS[f"after{step}/head.0.{name}"]
            torch.testing.assert_close(getattr(norm, name), wanted, **close)
        for name in ("weight", "bias"):
            wanted = NUMBERS[f"after{step}/head.1.{name}"]
            torch.testing.assert_close(getattr(linear, name).data, wanted, **close)
    probe.eval()
    scores = probe.model(recorded_batch(1).images)
    torch.testing.assert_close(scores, NUMBERS["out/logits_eval_images1"], **close)


def test_scores_in_training_are_the_recorded_ones(probe: ProbeObjective) -> None:
    scores = probe.model(recorded_batch(1).images)
    torch.testing.assert_close(scores, NUMBERS["out/logits_train1"], rtol=1e-4, atol=1e-5)


def test_the_tower_is_frozen_and_stays_in_evaluation_mode(probe: ProbeObjective) -> None:
    probe.eval()
    probe.train()
    assert probe.model.head[0].training
    assert not any(module.training for module in probe.model.image.modules())
    trained = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert trained == {"model.head.1.weight", "model.head.1.bias"}
    probe(recorded_batch(1))[0].backward()
    assert all(p.grad is None for p in probe.model.image.parameters())


def test_the_state_of_a_probe_is_that_of_the_released_files(probe: ProbeObjective) -> None:
    recorded = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
    names = recorded["linear_probe"]["vit_base_patch16_non_block"]
    ours = {name for name in probe.model.state_dict() if not name.startswith("image.blocks.")}
    theirs = {name.replace("patch_embed.proj.", "patch_embed.") for name in names}
    assert {name.removeprefix("image.") for name in ours} == theirs


def test_the_norm_is_torchs_batch_norm_without_factors() -> None:
    torch.manual_seed(3)
    ours = FeatureNorm(6, of="all_processes")
    theirs = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    for _ in range(3):
        features = 4 * torch.randn(9, 6) + 2
        torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(state[name], tensor)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)


def test_damaged_images_do_not_count_in_the_norm() -> None:
    torch.manual_seed(4)
    features, valid = torch.randn(6, 5), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    with_damage, without = (FeatureNorm(5, of="all_processes") for _ in range(2))
    found = with_damage(torch.where(valid[:, None], features, 1e6), valid)[valid]
    torch.testing.assert_close(found, without(features[valid]))
    torch.testing.assert_close(with_damage.running_var, without.running_var)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "probe_crop.json").read_text())["cases"])
def test_the_crop_has_the_recorded_size(case: dict) -> None:
    window = single_window(
        case["height"],
        case["width"],
        fraction=case["area_fraction"],
        ratio=case["aspect"],
        place=(0.0, 0.0),
    )
    assert (window.height, window.width) == (case["crop_height"], case["crop_width"])


def test_crops_lie_anywhere_in_the_image_and_never_beyond() -> None:
    corners = set()
    for place in np.linspace(0, 1, 7, endpoint=False):
        window = single_window(30, 50, fraction=0.5, ratio=0.8, place=(place, 1 - 1e-9))
        assert window.height <= 30 and window.left + window.width == 50
        assert 0 <= window.top <= 30 - window.height
        corners.add(window.top)
    whole = single_window(30, 50, fraction=1.0, ratio=4 / 3, place=(0.99, 0.99))
    assert whole == (0, 50 - whole.width, 30, whole.width)
    assert single_window(30, 50, fraction=1e-9, ratio=1.0, place=(0.5, 0.5))[2:] == (1, 1)


def picture(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_crop_is_a_function_of_its_generator_and_mirrors_half_of_the_time() -> None:
    encoded = picture(20, 31)

    def decode(seed: int, flip: float) -> np.ndarray:
        crop = SingleDrawCrop(flip=flip)
        return crop.decode(encoded, size=(8, 12), generator=np.random.default_rng(seed))

    assert decode(5, 0.5).shape == (3, 8, 12)
    assert (decode(5, 0.5) == decode(5, 0.5)).all()
    plain = decode(5, 0.0)
    assert (decode(5, 1.0) == plain[:, :, ::-1]).all()
    mirrored = [not (decode(seed, 0.5) == decode(seed, 0.0)).all() for seed in range(200)]
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize(("height", "width"), [(375, 500), (301, 256), (64, 48)])
def test_the_evaluation_crop_is_torchvisions(height: int, width: int) -> None:
    from torchvision.transforms import v2

    image = Image.open(io.BytesIO(picture(height, width)))
    theirs = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.PILToTensor(),
        ]
    )
    ours = CenterCrop(share=0.875).decode(picture(height, width), size=(224, 224))
    difference = np.abs(ours.astype(int) - theirs(image).numpy().astype(int))
    assert difference.max() <= 2  # torchvision rounds to bytes between rows and columns
    assert difference.mean() < 0.1


def test_a_crop_of_evaluation_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop\.share is 0"):
        CenterCrop(share=0.0)
    with pytest.raises(InputError, match="leaves nothing over"):
        CenterCrop(share=0.875, order="crop_first")
