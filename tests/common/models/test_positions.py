"""Position tables: fixed, and resampled."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frugal.common.errors import InputError
from frugal.common.models.clip import resample_table
from frugal.common.models.positions import resample_grid, resample_length, sincos_table
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower

GOLDEN = Path(__file__).parents[2] / "golden"


def cases(pattern: str) -> list[Path]:
    found = sorted(GOLDEN.glob(pattern))
    assert found, pattern
    return found


@pytest.mark.parametrize("path", cases("clipa/sincos_*.json"), ids=lambda path: path.stem)
def test_fixed_tables_equal_those_of_the_clipa_references(path):
    case = json.loads(path.read_text())
    big_vision = case["kind"] == "sincos_big_vision"
    table = sincos_table(
        (case["grid"], case["grid"]),
        case["width"],
        "sincos_bigvision" if big_vision else "sincos",
        class_row=case["cls_token"],
    )
    expected = load_file(path.with_suffix(".safetensors"))["table"]
    torch.testing.assert_close(table, expected, rtol=0, atol=2e-5 if big_vision else 1e-6)


@pytest.mark.parametrize("flavour", ["sincos", "sincos_bigvision", "sincos_moco"])
@pytest.mark.parametrize("grid", [(2, 5), (3, 3), (4, 1)])
def test_fixed_tables_follow_their_formula_on_any_grid(flavour, grid):
    width = 16
    table = sincos_table(grid, width, flavour)
    quarter = width // 4
    divisor = quarter - 1 if flavour == "sincos_bigvision" else quarter
    for number in range(grid[0] * grid[1]):
        row, column = divmod(number, grid[1])
        first, second = (row, column) if flavour == "sincos_moco" else (column, row)
        angles = [
            [place * 10_000 ** (-i / divisor) for i in range(quarter)] for place in (first, second)
        ]
        expected = [wave(a) for part in angles for wave in (math.sin, math.cos) for a in part]
        torch.testing.assert_close(table[number], torch.tensor(expected), rtol=0, atol=1e-6)


def test_an_unknown_flavour_is_refused():
    with pytest.raises(ValueError, match="'learned' is no fixed position table"):
        sincos_table((2, 2), 8, "learned")


@pytest.mark.parametrize("path", cases("clipa/pos_resize_*.json"), ids=lambda path: path.stem)
def test_image_tables_are_resampled_as_in_clipa(path):
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    new = resample_grid(
        golden["old"],
        old_grid=(case["old_grid"], case["old_grid"]),
        new_grid=(case["new_grid"], case["new_grid"]),
    )
    torch.testing.assert_close(new, golden["new"], rtol=0, atol=1e-5)


def test_image_tables_are_resampled_as_in_mae():
    golden = load_file(GOLDEN / "milan" / "pos_interp.safetensors")
    for case in json.loads((GOLDEN / "milan" / "pos_interp.json").read_text())["cases"]:
        old, new = case["source_grid"], case["target_grid"]
        name = f"grid{old}_to_{new}_dim{case['dim']}"
        table = resample_grid(
            golden[f"{name}/source"], old_grid=(old, old), new_grid=(new, new), antialias=False
        )
        torch.testing.assert_close(table, golden[f"{name}/result"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", cases("clipa/text_pos_resize_*.json"), ids=lambda path: path.stem)
def test_text_tables_are_resampled_as_in_clipa(path):
    case, golden = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    method = "triangle" if case["kind"] == "text_pos_resize_big_vision" else "linear"
    new = resample_length(golden["old"], case["new"], method=method)
    torch.testing.assert_close(new, golden["new"], rtol=0, atol=1e-5)


def test_a_shrinking_triangle_filter_averages_what_it_covers():
    table = torch.arange(8.0).reshape(8, 1)
    new = resample_length(table, 4, method="triangle")
    for place in range(4):
        center = (place + 0.5) * 2 - 0.5
        weights = [max(0.0, 1 - abs(old - center) / 2) for old in range(8)]
        expected = sum(w * old for w, old in zip(weights, range(8), strict=True)) / sum(weights)
        assert new[place].item() == pytest.approx(expected)


def test_rows_and_columns_are_not_confused_on_a_rectangular_grid():
    rows = torch.arange(3.0)[:, None].expand(3, 5).reshape(1, 15, 1)  # constant along columns
    new = resample_grid(rows, old_grid=(3, 5), new_grid=(3, 10))
    torch.testing.assert_close(new.reshape(3, 10), torch.arange(3.0)[:, None].expand(3, 10))


def image_tower(image_size, **options) -> ImageTower:
    shape = {"width": 4, "depth": 1, "heads": 1, "mlp_width": 4, "patch_size": 2}
    return ImageTower(**shape, image_size=image_size, pooling="mean", **options)


@pytest.mark.parametrize("kind", ["with_position", "without_position", "none"])
def test_tables_of_saved_towers_are_resampled_between_their_grids(kind):
    old, new = image_tower((6, 10), class_token=kind), image_tower((8, 4), class_token=kind)
    table = torch.randn(1, old.num_positions, 4)
    resampled = resample_table("image.pos_embed", table, old=old, new=new)
    expected = resample_grid(table, old_grid=(3, 5), new_grid=(4, 2))
    assert resampled.shape == (1, new.num_positions, 4)
    torch.testing.assert_close(resampled, expected)


def test_a_table_of_an_unknown_tower_counts_as_square():
    table = torch.randn(1, 1 + 9, 4)
    resampled = resample_table("image.pos_embed", table, old=None, new=image_tower((8, 4)))
    expected = resample_grid(table, old_grid=(3, 3), new_grid=(4, 2))
    torch.testing.assert_close(resampled, expected)


def test_a_text_table_is_resampled_linearly():
    text = TextTower(width=4, depth=1, heads=1, mlp_width=4, vocabulary=9, length=16)
    table = torch.randn(1, 10, 4)
    resampled = resample_table("text.pos_embed", table, old=None, new=text)
    torch.testing.assert_close(resampled, resample_length(table, 16))


@pytest.mark.parametrize(
    ("rows", "old", "grid"),
    [(9, None, "a square"), (12, None, "a square"), (0, None, "a square"), (9, (6, 6), "a")],
)
def test_a_table_that_does_not_belong_to_the_old_grid_is_refused(rows, old, grid):
    tower = None if old is None else image_tower(old)
    with pytest.raises(InputError, match=f"has {rows} rows there, .* {grid} grid"):
        resample_table(
            "image.pos_embed", torch.randn(1, rows, 4), old=tower, new=image_tower((8, 8))
        )
