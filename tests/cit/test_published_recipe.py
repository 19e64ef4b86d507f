"""The published recipe from its command line, with a small MoCo v3 file and a small BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cit_cases import case
from cit_runs import MODULE, curations, pairs
from tower_cases import moco_file

from support import ALONE, DDP, Launcher, largest_difference, losses, saved_tensors, train, zero

RECIPE = "yfcc15m-in1k-moco-b16"


@pytest.fixture(scope="module")
def small(pool: Path, bert_words: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    golden = case("moco_tiny")
    state = {n.removeprefix("sd."): t for n, t in golden.tensors.items() if n.startswith("sd.")}
    file = moco_file(tmp_path_factory.mktemp("moco") / "vit-b-300ep.pth.tar", state)
    about = golden.about
    return [
        f"--model.image.width={about['width']}", f"--model.image.depth={about['depth']}",
        f"--model.image.heads={about['heads']}", f"--model.image.mlp-width={4 * about['width']}",
        f"--model.image.image-size={about['image_size']}",
        f"--model.image.norm-epsilon={about['ln_eps']}",
        f"--model.image.projector-width={about['head_hidden']}",
        f"--model.image.projector-outputs={about['out_dim']}",
        # without dropout, whose noise belongs to a process
        f"--model.text.name={bert_words}", "--model.text.dropout=0", "--model.embed-dim=16",
        f"--objective.image-weights={file}", f"--data.tokenizer.name={bert_words}",
        f"--data.train={pool / 'train'}", "--data.fields.caption", "txt", "--data.tags",
        f"--data.metadata.sources={pool / 'zero_shot' / 'classnames.txt'}",
        "--data.period=3", "--data.scan=40", "--data.min-ratio=0.25", "--data.threshold=0.9999",
        "--data.workers=0", "--engine.precision=float32", "--run.log-every=1",
        "--batch-size=24", "--schedule.samples=144", "--schedule.warmup-samples=24",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("published") / "run"
    train(ALONE, run, recipe=RECIPE, small=small, module=MODULE)
    return run


def test_the_projector_and_bert_are_trained_and_the_trunk_stays(alone: Path) -> None:
    state = {n.removeprefix("sd."): t for n, t in case("moco_tiny").tensors.items()}
    tensors = saved_tensors(alone)
    trunk = "model.image.blocks.0.attn.qkv.weight"
    frozen = next(t for n, t in tensors.items() if n.endswith(trunk))
    assert frozen.equal(state["blocks.0.attn.qkv.weight"])
    moved = [t for n, t in tensors.items() if n == "weight/model.image.projector.0.weight"]
    assert len(moved) == 1 and not moved[0].equal(state["head.0.weight"])
    assert len(curations(alone)) == 2 and all(len(part) == 72 for part in pairs(alone))
    assert torch.isfinite(torch.tensor(list(losses(alone).values()))).all()


@pytest.mark.parametrize("launcher", [DDP, zero(2), zero(3)], ids=lambda launcher: launcher.name)
def test_processes_choose_and_learn_alike(
    launcher: Launcher, alone: Path, small: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(launcher, run, recipe=RECIPE, small=small, module=MODULE)
    assert pairs(run) == pairs(alone)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    assert largest_difference(saved_tensors(run), saved_tensors(alone)) < 1e-4
