"""The real ``clip_benchmark eval`` gives an exported model the numbers that we give it."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from frugal.common.evaluate import Options, evaluate
from frugal.common.evaluation.results import COLUMNS
from frugal.common.export import Options as ExportOptions
from frugal.common.export import export
from support import BIN, QUICK, environment

# clip_benchmark 1.6.2 counts with float() of an array of one element, which NumPy 2.4 refuses
_COUNTING = (
    "import clip_benchmark.metrics.zeroshot_classification as z;"
    "z.float = lambda v: v.item() if hasattr(v, 'item') else __builtins__.float(v);"
    "from clip_benchmark.cli import main; main()"
)


def clip_benchmark(folder: Path, data: Path, task: str, out: Path) -> dict:
    """What the command writes about an open_clip folder on scenes shards."""
    start = [str(QUICK / "python"), str(BIN / "clip_benchmark")]
    if task == "zeroshot_classification":
        start = [str(QUICK / "python"), "-c", _COUNTING]
    command = [
        *start, "eval", "--model", f"local-dir:{folder}", "--pretrained", "none",
        "--dataset", "wds/scenes", "--dataset_root", str(data), "--task", task,
        "--recall_k", "1", "5", "10", "--no_amp", "--num_workers", "0", "--batch_size", "50",
        "--output", str(out), "--quiet",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=environment(quick=True))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())["metrics"]


@pytest.fixture(scope="module")
def exported(alone_with_clips_words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny FLIP as an open_clip folder."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export(ExportOptions(checkpoint=alone_with_clips_words, to="open_clip", out=folder))
    return folder


@pytest.fixture(scope="module")
def measured(exported: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we write about the folder."""
    out = tmp_path_factory.mktemp("measured")
    evaluate(Options(checkpoint=exported, data=scenes, out=out, workers=0, device="cpu"))
    return out


@pytest.mark.parametrize(
    ("task", "part", "kind"),
    [
        ("zeroshot_classification", "zero_shot", "zero_shot"),
        ("zeroshot_retrieval", "retrieval", "retrieval"),
    ],
)
def test_an_exported_model_scores_the_same_under_clip_benchmark(
    task: str, part: str, kind: str, exported: Path, measured: Path, scenes: Path, tmp_path: Path
) -> None:
    theirs = clip_benchmark(exported, scenes / part, task, tmp_path / "theirs.json")
    ours = json.loads((measured / f"{kind}.json").read_text())
    names = {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    pairs = {f"zero_shot_{mine}": other for mine, other in names.items()}
    if kind == "retrieval":
        pairs = {
            f"{way}_retrieval_recall_at_{k}": f"{way}_retrieval_recall@{k}"
            for way in ("image", "text")
            for k in (1, 5, 10)
        }
    assert {mine: ours[mine] for mine in pairs} == pytest.approx(
        {mine: theirs[other] for mine, other in pairs.items()}, abs=1e-6
    )
    assert len({ours[mine] for mine in pairs}) > 1
    with (measured / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    assert len(rows) == 1
    assert {other: float(rows[0][other]) for other in pairs.values()} == pytest.approx(
        {other: theirs[other] for other in pairs.values()}, abs=1e-6
    )
    assert theirs.keys() <= set(COLUMNS)


def test_the_run_and_its_export_are_the_same_weights_with_the_same_numbers(
    alone_with_clips_words: Path, measured: Path, scenes: Path, tmp_path: Path
) -> None:
    evaluate(
        Options(
            checkpoint=alone_with_clips_words, data=scenes, out=tmp_path, workers=0, device="cpu"
        )
    )
    for task in ("zero_shot", "retrieval", "compositional"):
        own, exported = (
            json.loads((folder / f"{task}.json").read_text()) for folder in (tmp_path, measured)
        )
        numbers = {name for name, value in own.items() if isinstance(value, (int, float))}
        numbers -= {"step", "samples"}  # which an export does not say
        assert {n: own[n] for n in numbers} == pytest.approx({n: exported[n] for n in numbers})
        facts, again = own[f"{task}_measured"], exported[f"{task}_measured"]
        assert (facts["library"], again["library"]) == ("frugal", "open_clip")
        for fact in ("data_sha256", "weights_sha256", "images", "versions"):
            assert facts[fact] == again[fact]
