"""Between the weights that a model was tuned from and those it was tuned to."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from frugal.common.errors import InputError
from frugal.common.interpolate import Options, interpolate
from frugal.common.weights.load import load_model
from support import ALONE, command, train


@pytest.fixture(scope="module")
def tuned(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    words = (f"--data.train={scenes / 'train'}", f"--run.start-from={alone}")
    train(ALONE, run, *words, "--schedule.samples=96", "--run.save-every=2", "--run.keep=9")
    return run


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_every_number_lies_between_the_two(
    share: float, alone: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = command("frugal.common.interpolate", alone, tuned, "--share", share, "--out", out).stdout
    assert said == f"{out}: {share:g} of the way from {alone} to {tuned}\n"
    start, end, found = (load_model(path).model.state_dict() for path in (alone, tuned, out))
    assert found.keys() == end.keys()
    for name, value in found.items():
        expected = start[name].double() * (1 - share) + end[name].double() * share
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    if share in (0.0, 1.0):
        same = start if share == 0.0 else end
        assert all(torch.equal(value, same[name]) for name, value in found.items())
    else:
        assert any(not torch.equal(value, end[name]) for name, value in found.items())


def test_models_that_have_no_mean_are_refused(
    alone: Path, tuned: Path, scenes: Path, tmp_path: Path
) -> None:
    wider, deeper = tmp_path / "wider", tmp_path / "deeper"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=48")
    train(ALONE, wider, *words, "--model.image.mlp-width=96")
    train(ALONE, deeper, *words, "--model.image.depth=2")
    for other, sentence in ((wider, "are of two sizes"), (deeper, "are of two architectures")):
        with pytest.raises(InputError, match=sentence):
            interpolate(Options(start=alone, tuned=other, out=tmp_path / "out"))
    # equal shapes are not enough
    heads, pixels = tmp_path / "heads", tmp_path / "pixels"
    train(ALONE, heads, *words, "--model.image.heads=4")
    train(ALONE, pixels, *words, "--model.image.mean", "0", "0", "0")
    for other, sentence in (
        (heads, "compute differently: model.image.heads is 2 and 4"),
        (pixels, "compute differently: model.image.mean is"),
    ):
        with pytest.raises(InputError, match=sentence):
            interpolate(Options(start=alone, tuned=other, out=tmp_path / "out"))
    with pytest.raises(InputError, match="share"):
        interpolate(Options(start=alone, tuned=tuned, share=1.5, out=tmp_path / "out"))
    with pytest.raises(InputError, match="is not empty"):
        interpolate(Options(start=alone, tuned=tuned, out=tuned))
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_better_before_its_end_is_told(
    alone: Path, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    best = {"checkpoint": "step_000000002", "value": 0.5}
    (run / "checkpoints" / "best.json").write_text(json.dumps(best))
    interpolate(Options(start=alone, tuned=run, out=tmp_path / "out"))
    assert "its last step, 4; its best checkpoint is of step 2: give" in caplog.text
