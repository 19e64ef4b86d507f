"""MoCo v3's vision transformer with its projector against recorded outputs."""

from pathlib import Path

import pytest
import torch
from cit_cases import case
from tower_cases import LOG, moco_file

from frugal.cit.objective import IMAGE_FREEDOM
from frugal.cit.published_vision import read_vision
from frugal.common.checkpoint.init_from import Start, init_image
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table

NEAR = {"rtol": 0, "atol": 1e-5}


def tower_config() -> ImageTower:
    about = case("moco_tiny").about
    return ImageTower(
        width=about["width"],
        depth=about["depth"],
        heads=about["heads"],
        mlp_width=4 * about["width"],
        patch_size=16,
        image_size=about["image_size"],
        norm_epsilon=about["ln_eps"],
        projector_width=about["head_hidden"],
        projector_outputs=about["out_dim"],
    )


@pytest.fixture
def tower(tmp_path: Path) -> ImageTransformer:
    """Started from a file as MoCo v3 leaves it, of which only the base encoder counts."""
    tensors = case("moco_tiny").tensors
    state = {n.removeprefix("sd."): t for n, t in tensors.items() if n.startswith("sd.")}
    file = moco_file(tmp_path / "vit-b-300ep.pth.tar", state)
    tower = ImageTransformer(tower_config())
    init_image(tower, read_vision(file), IMAGE_FREEDOM, Start(interpolate=False, log=LOG))
    return tower


@torch.inference_mode()
def test_evaluation_gives_the_recorded_class_token_and_projection(tower) -> None:
    tensors = case("moco_tiny").tensors
    tower.eval()
    tokens = tower.forward_tokens(tensors["images"])
    torch.testing.assert_close(tokens[:, 0], tensors["cls_feature_eval"], **NEAR)
    pooled = tower.forward_pooled(tensors["images"])
    torch.testing.assert_close(pooled, tensors["output_eval"], **NEAR)


@torch.no_grad()
def test_training_normalizes_by_the_batch_and_moves_the_running_statistics(tower) -> None:
    tensors = case("moco_tiny").tensors
    tower.train()
    pooled = tower.forward_pooled(tensors["images"])
    torch.testing.assert_close(pooled, tensors["output_train"], rtol=0, atol=1e-4)
    state = tower.state_dict()
    after = {n.removeprefix("after.head."): t for n, t in tensors.items() if n.startswith("after.")}
    assert len(after) == 6
    for name, expected in after.items():
        torch.testing.assert_close(state[f"projector.{name}"], expected, **NEAR)


def test_the_stored_table_is_moco_s_fixed_one() -> None:
    tensors = case("moco_tiny").tensors
    config = tower_config()
    fixed = ImageTower(**{**vars(config), "positions": "sincos_moco"})
    torch.testing.assert_close(image_table(fixed), tensors["sd.pos_embed"], rtol=0, atol=1e-6)
