"""A user's mistake: one sentence, exit code 2, no stack trace, nothing written."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from support import ALONE, Launcher, deepspeed, train

MODULE = "frugal.cluster_masking.train"


def refused(run: Path, *words: str, launcher: Launcher = ALONE) -> str:
    output = train(launcher, run, *words, module=MODULE, expect=2)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output[-3000:]
    assert not (run / "recipe.json").exists()
    return errors[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--reduction.image.target-mask-ratio=0.2", "less than reduction.image.min_mask_ratio"),
        ("--reduction.image.anchor-ratio=0", "anchor_ratio is 0.0"),
        ("--reduction.image.anchor-ratio=1e-18", "draws no anchor from 64 patches"),
        ("--reduction.image.min-mask-ratio=0.3 --reduction.image.target-mask-ratio=0.3",
         "so that 0.3125 goes in any case"),
        ("--reduction.image.threshold=1", "threshold is 1.0"),
        ("--reduction.image.target-mask-ratio=None", "neither a threshold nor"),
        ("--reduction.image.search-images=3", "search_images is 3, too few"),
    ],
)  # fmt: skip
def test_settings(words: str, said: str, scenes: Path, tmp_path: Path) -> None:
    data = f"--data.train={scenes / 'train'}"
    assert said in refused(tmp_path / "run", data, *words.split())


def shard_of(folder: Path, *, files: dict[str, bytes]) -> Path:
    path = folder / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def flat_images(count: int) -> dict[str, bytes]:
    """Images of one color each, with a caption."""
    files = {}
    for number in range(count):
        encoded = io.BytesIO()
        Image.new("RGB", (32, 32), (4 * number % 256, 90, 200)).save(encoded, "PNG")
        files[f"{number:05d}.png"] = encoded.getvalue()
        files[f"{number:05d}.txt"] = b"one color"
    return files


@pytest.mark.parametrize("launcher", [ALONE, deepspeed(1)], ids=lambda launcher: launcher.name)
def test_flat_images(launcher: Launcher, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, files=flat_images(60))
    words = (f"--data.train={shard}", "--reduction.image.search-images=48")
    sentence = refused(tmp_path / "run", *words, launcher=launcher)
    assert "no reduction.image.threshold masks 50.00% of the patches" in sentence
    assert "100.00%" in sentence


def test_data_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    files = {name: b"broken" if name.endswith("png") else content
             for name, content in flat_images(60).items()}  # fmt: skip
    shard = shard_of(tmp_path, files=files)
    words = (f"--data.train={shard}", "--reduction.image.search-images=48")
    assert "only 0 of the first images" in refused(tmp_path / "run", *words)
