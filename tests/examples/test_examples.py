"""Every example runs as its first line says, and is short enough to be read at once."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
from PIL import Image

from support import ROOT, command

EXAMPLES = ROOT / "examples"


def run(name: str, *words: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def picture(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picture")
    with tarfile.open(next((scenes / "train").glob("*.tar"))) as tar:
        member = next(one for one in tar if one.name.endswith(".jpg"))
        tar.extract(member, folder, filter="data")
    return folder / member.name


def test_captions_are_ranked_by_their_similarity(alone: Path, picture: Path) -> None:
    lines = run("rank_captions.py", alone, picture, "a red circle", "two blue squares").splitlines()
    numbers = [float(line.split()[0]) for line in lines]
    assert len(numbers) == 2 and numbers[0] >= numbers[1] and all(abs(n) <= 1 for n in numbers)
    assert {line.split("  ")[1] for line in lines} == {"a red circle", "two blue squares"}


def test_masks_of_four_methods_are_drawn_beside_the_picture(picture: Path, tmp_path: Path) -> None:
    said = run("look_at_masks.py", picture, tmp_path / "masks.png").splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) for line in said}
    assert kept["RandomMasking"] == 98 and kept["GridMasking"] == 49
    assert all(40 < kept[name] < 160 for name in ("ClusterMasking", "PgsMasking"))
    assert Image.open(tmp_path / "masks.png").size == (5 * 224 + 4 * 8, 224)


def test_flip_trains_in_a_plain_loop_and_loads_in_open_clip(scenes: Path, tmp_path: Path) -> None:
    lines = run("flip_in_one_file.py", scenes / "train", tmp_path / "out").splitlines()
    losses = [float(line.split()[3].rstrip(",")) for line in lines if line.startswith("step")]
    assert len(losses) == 20 and losses[-1] < losses[0]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert sum(p.numel() for p in model.parameters()) > 4e6


def test_a_model_of_open_clip_is_evaluated(
    alone_with_clips_words: Path, scenes: Path, tmp_path: Path
) -> None:
    ours, theirs = alone_with_clips_words, tmp_path / "theirs"
    command("frugal.common.export", "--checkpoint", ours, "--to", "open_clip", "--out", theirs)
    found = [run("evaluate_open_clip.py", model, scenes) for model in (theirs, ours)]
    assert found[0] == found[1] and "zero_shot_top1: 0." in found[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_has_a_test(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    assert f'run("{path.name}"' in Path(__file__).read_text()
