"""Both stages by the script that chains them, as a user runs it."""

import os
import subprocess
from pathlib import Path

from support import ROOT, TINY, environment, metrics, saved_tensors

SMALL = [word for word in TINY if not word.startswith(("--model.image.image-size", "--schedule"))]


def chained(*words: str, run: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment(quick=True) | {
        "RUN": str(run),
        "LAUNCHER": "accelerate",
        "PROCESSES": "1",
        **variables,
    }
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    return subprocess.run(
        ["bash", "launch/clipa_two_stage.sh", "demo", *SMALL, *words],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=600,
    )  # fmt: skip


def test_the_second_stage_starts_from_the_first_with_its_tables_brought_along(
    scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=48")
    words += ("--schedule.warmup-samples=24", "--", "--schedule.samples=24")
    done = chained(*words, run=run)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "image.pos_embed resampled from 4x4 to 8x8 patches" in done.stderr
    first, second = (saved_tensors(run / stage) for stage in ("pretraining", "tuning"))
    assert first["weight/model.image.pos_embed"].shape[1] == 1 + 16
    assert second["weight/model.image.pos_embed"].shape[1] == 1 + 64
    assert [line["image_tokens"] for line in metrics(run / "tuning")] == [65.0]


def test_a_slip_in_the_second_stage_is_found_before_the_first(tmp_path: Path) -> None:
    for words in (("--", "--run.interpolat=1"), ("--run.dir=elsewhere",)):
        done = chained(*words, run=tmp_path / "run")
        assert done.returncode == 2
        assert not (tmp_path / "run").exists()
