"""Weights out of training checkpoints: any engine, little memory, with or without their average."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_directories import small, write_tensors
from safetensors.torch import load_file

from frugal.common.checkpoint.manifest import check_manifest
from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.checkpoint.tensor_bytes import copy_tensors, find_tensors
from frugal.common.errors import InputError
from frugal.common.evaluate import evaluate
from frugal.common.evaluation.cli import Options as Evaluate
from frugal.common.export import Options, export
from frugal.common.models.named import clip_encoder
from frugal.common.weights.load import load_model
from support import ALONE, ROOT, environment, newest, train, zero

MIB = 1 << 20
SCRIPT = """
import json, re, sys
from pathlib import Path
from frugal.common.export import Options, export

def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tiny, run, out = map(Path, sys.argv[1:])
export(Options(checkpoint=tiny, to="frugal", out=out / "tiny"))  # which imports everything
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
export(Options(checkpoint=run, to="frugal", out=out / "run"))
print(json.dumps(memory("VmHWM") - before))
"""


def weights_file(run: Path) -> Path:
    (file,) = run.rglob("*.safetensors")
    return file


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_memory_stays_below_the_largest_tensor(clip_run, tmp_path) -> None:
    largest, medium = 16 * MIB, 2 * MIB
    generator = torch.Generator().manual_seed(0)
    sizes = {"largest": largest, **{f"medium_{number}": medium for number in range(48)}}
    drawn = {name: torch.randn(size // 4, generator=generator) for name, size in sizes.items()}
    tensors = {f"weight/model.{name}": tensor for name, tensor in drawn.items()}
    tensors |= {f"exp_avg/model.{name}": tensor + 1 for name, tensor in drawn.items()}
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(clip_run / "recipe.json", run / "recipe.json")
    write_tensors(run, tensors)
    words = [sys.executable, "-c", SCRIPT, clip_run, run, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * largest  # of 112 MiB of weights
    found = load_file(weights_file(tmp_path / "out" / "run"))
    assert found.keys() == {f"weight/model.{name}" for name in drawn}
    assert all(torch.equal(found[f"weight/model.{name}"], drawn[name]) for name in drawn)


def test_a_zero_3_checkpoint_gives_the_file_of_a_single_process(scenes, tmp_path) -> None:
    files = []
    for launcher in (ALONE, zero(3)):
        run = tmp_path / launcher.name
        train(
            launcher, run, f"--data.train={scenes / 'train'}", "--schedule.samples=48",
            "--optimizer.learning-rate=0", "--engine.ema-decay=0.5",
        )  # fmt: skip
        out = tmp_path / f"{launcher.name} alone"
        assert export(Options(checkpoint=run, to="frugal", out=out)) == 0
        files.append(weights_file(out))
    assert len(list(find_checkpoint(tmp_path / zero(3).name).folder.glob("*.safetensors"))) == 2
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_trained_run_leaves_with_its_average_or_its_last_weights(
    alone_with_clips_words, tmp_path
) -> None:
    stored = {}
    for file in find_checkpoint(alone_with_clips_words).folder.glob("*.safetensors"):
        stored |= load_file(file)
    for average, kind in ((True, "ema"), (False, "weight")):
        out = tmp_path / kind
        export(
            Options(checkpoint=alone_with_clips_words, to="frugal", out=out, moving_average=average)
        )
        found = load_file(weights_file(out))
        names = {name.partition("/")[2] for name in stored if name.startswith("weight/")}
        assert {name.partition("/")[2] for name in found} == names
        assert all(torch.equal(found[f"weight/{name}"], stored[f"{kind}/{name}"]) for name in names)
        card = (out / "README.md").read_text()
        said = "moving average, decay 0.9" if average else "of the last step"
        assert f"| weights | {said} |" in card
        recipe = json.loads((out / "recipe.json").read_text())
        assert recipe["engine"]["ema_decay"] == (0.9 if average else None)
        assert export(Options(checkpoint=out, to="open_clip", out=tmp_path / f"{kind}_clip")) < 1e-5
    assert any(not torch.equal(stored[f"ema/{n}"], stored[f"weight/{n}"]) for n in names)


def test_an_average_that_is_not_there_cannot_be_left_out(make_run, tmp_path) -> None:
    run = make_run(small(clip_encoder("B/16")))
    with pytest.raises(InputError, match="holds no moving average of its weights"):
        export(Options(checkpoint=run, to="frugal", out=tmp_path / "o", moving_average=False))
    with pytest.raises(InputError, match="--no-moving-average is for --to frugal"):
        Options(checkpoint=run, to="timm", out=tmp_path / "o", moving_average=False)


def test_numbers_of_every_type_are_copied_as_they_are(tmp_path) -> None:
    tensors = {
        "weight/none": torch.zeros(0, 3),
        "weight/nan": torch.full((1,), torch.nan),
        "weight/half": torch.arange(3.0).half(),
        "weight/a": torch.arange(6.0).view(2, 3),
        "buffer/count": torch.tensor(7),
        "buffer/mask": torch.tensor([True, False, True]),
    }
    run = tmp_path / "run"
    run.mkdir()
    write_tensors(run, tensors)
    checkpoint = find_checkpoint(run)
    stored = checkpoint.tensor_bytes()
    assert copy_tensors(stored, tmp_path / "copy.safetensors") == ""
    found = load_file(tmp_path / "copy.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    again = find_tensors(tmp_path / "copy.safetensors")
    assert all(again[name].start % 8 == 0 for name in ("buffer/count",))
    changed = {**stored, "weight/a": stored["weight/nan"]}
    assert not again["weight/a"].equals(changed["weight/a"])


def test_a_disk_that_is_full_is_a_sentence(clip_run, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("frugal.common.checkpoint.tensor_bytes.os.fsync", full)
    with pytest.raises(InputError, match=r"could not be written.*No space left"):
        export(Options(checkpoint=clip_run, to="frugal", out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_read_once_wherever_it_is_named_from(
    alone, scenes, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def counted(folder: Path, **options: object) -> None:
        checked.append(folder.resolve())
        check_manifest(folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("frugal.common.checkpoint.store.check_manifest", counted)
    step = newest(alone)
    names = [alone, alone / "checkpoints", step, Path(), Path("../..")]
    monkeypatch.chdir(step)
    expected = load_model(alone)
    for name in names:
        checked.clear()
        model = load_model(name)
        assert checked == [step.resolve()]
        assert model.config == expected.config and model.source.step == expected.source.step
    checked.clear()
    given = {"tasks": ("retrieval",), "data": scenes / "retrieval" / "test", "workers": 0}
    evaluate(Evaluate(checkpoint=Path(), out=tmp_path, device="cpu", **given))
    assert checked == [step.resolve()]
    assert (tmp_path / "retrieval.json").is_file()


def test_a_run_without_a_checkpoint_is_a_sentence(alone, tmp_path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copyfile(alone / "recipe.json", run / "recipe.json")
    for to in ("frugal", "open_clip"):
        with pytest.raises(InputError, match="there is no checkpoint in"):
            export(Options(checkpoint=run, to=to, out=tmp_path / to))
    with pytest.raises(InputError, match="there is no checkpoint in"):
        evaluate(Evaluate(checkpoint=run, device="cpu"))
