"""A run does not go on with other data than it was trained on, unless that is allowed and noted."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from frugal.common.checkpoint.manifest import write_manifest
from frugal.common.data.sources import build_index
from frugal.common.history import read_history, saved_step
from support import ALONE, DDP, ROOT, command, newest, train

VOCAB = ROOT / "tests" / "golden" / "runs_before" / "vocab.txt"
WORDS = (
    "--schedule.samples=72", "--run.save-every=1", "--run.keep=9", "--model.text.vocabulary=64",
    "--data.tokenizer.entries=None",
)  # fmt: skip
RECIPE = "vit-b16-laion400m"
"""Has a tokenizer whose vocabulary is a file."""


@pytest.fixture(scope="module")
def begun(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a vocabulary, and a run of them that has a step left to do."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "data").mkdir()
    for shard in sorted((scenes / "train").glob("*.tar"))[:3]:
        shutil.copy(shard, folder / "data")
    shutil.copy(VOCAB, folder / "vocab.txt")
    train(ALONE, folder / "run", *words(folder), recipe=RECIPE)
    shutil.rmtree(newest(folder / "run"))
    return folder


def words(folder: Path) -> tuple[str, ...]:
    return (f"--data.train={folder / 'data'}", *WORDS, f"--data.tokenizer.vocab={folder}/vocab.txt")


@pytest.fixture
def place(begun: Path) -> Path:
    """The same folder in the same place, whatever other tests did to it."""
    kept = begun.with_name("kept")
    if not kept.exists():
        shutil.copytree(begun, kept)
    shutil.rmtree(begun)
    shutil.copytree(kept, begun)
    return begun


def caption_in_place(folder: Path) -> None:
    shard = folder / "data" / "00001.tar"
    before = shard.stat()
    with tarfile.open(shard) as tar:
        place = next(m.offset_data for m in tar if m.name.endswith(".txt"))
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(b"X")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    assert shard.stat().st_size == before.st_size


def replaced(folder: Path) -> None:
    shutil.copy(folder / "data" / "00000.tar", folder / "data" / "00001.tar")
    build_index(folder / "data" / "00001.tar", rebuild=True)


def one_fewer(folder: Path) -> None:
    (folder / "data" / "00002.tar").unlink()


def vocabulary(folder: Path) -> None:
    lines = (folder / "vocab.txt").read_text().splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "sentence", "launcher"),
    [
        (caption_in_place, "00001.tar has 1 altered samples", DDP),
        (replaced, "00001.tar holds other samples", ALONE),
        (one_fewer, "1 gone (00002.tar)", DDP),
        (vocabulary, "the tokenizer is another: it", ALONE),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_data_are_refused_by_name_or_noted_where_they_are_allowed(
    change, sentence, launcher, place: Path
) -> None:
    change(place)
    run = place / "run"
    output = train(launcher, run, *words(place), expect=2, recipe=RECIPE)
    assert sentence in output and "--run.allow-changed-data" in output
    assert [line["event"] for line in read_history(run)] == ["began", "saved", "ended"]
    assert not (run / "checkpoints" / "step_000000003").exists()
    train(launcher, run, *words(place), "--run.allow-changed-data", recipe=RECIPE)
    began, _, ended, continued, changed, last = read_history(run)
    assert [(line["event"], line["step"]) for line in (ended, last)] == [
        ("ended", 3),
        ("ended", 3),
    ]
    assert (began["event"], began["step"], began["world_size"]) == ("began", 0, 1)
    assert (continued["event"], continued["step"]) == ("continued", 2)
    assert continued["code"] == began["code"] and len(began["code"]["sha256"]) == 64
    assert changed["event"] == "data_changed" and sentence in "; ".join(changed["changes"])
    assert newest(run).name.endswith("3")


def moved(folder: Path) -> str:
    there = folder / "another disk"
    there.mkdir()
    (folder / "data").rename(there / "data")
    return f"--data.train={there}/data/{{00000..00002}}.tar"


@pytest.mark.parametrize("notes", ["whole", "gone", "damaged"])
def test_data_that_moved_as_a_whole_are_the_same(notes, place: Path) -> None:
    run = place / "run"
    now = moved(place)
    if notes == "gone":
        (run / "data.json").unlink()
    if notes == "damaged":
        (run / "data.json").write_text("{")
    output = train(ALONE, run, *words(place), now, recipe=RECIPE)
    assert ("taking what the checkpoint says of the data" in output) == (notes != "whole")
    assert [line["event"] for line in read_history(run)][3:] == ["continued", "ended"]
    assert "another disk" in (run / "recipe.json").read_text()


def test_another_place_is_refused_or_noted_where_nothing_tells_what_lay_there(place: Path) -> None:
    run = place / "run"
    now = moved(place)
    (run / "data.json").unlink()
    for checkpoint in run.glob("checkpoints/step_*"):  # as an earlier version wrote them
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        write_manifest(
            checkpoint,
            {name: about["sha256"] for name, about in manifest["files"].items()},
            {name: manifest[name] for name in manifest.keys() - {"files", "manifest", "data"}},
        )
    output = train(ALONE, run, *words(place), now, expect=2, recipe=RECIPE)
    assert "another recipe (data.train was" in output
    train(ALONE, run, *words(place), now, "--run.allow-changed-data", recipe=RECIPE)
    changed = read_history(run)[4]
    assert changed["event"] == "data_changed" and "data.train was" in "; ".join(changed["changes"])
    assert newest(run).name.endswith("3")


def test_what_was_allowed_is_noted_before_the_run_takes_it_for_its_own(place: Path) -> None:
    """A recipe that named the new place already would be asked about it no more."""
    run, pipe = place / "run", "--data.resampled-samples=120"
    old = f"--data.train=pipe:cat {place}/data/{{00000..00002}}.tar"
    new = f"--data.train=pipe:cat {place}/there/{{00000..00002}}.tar"
    shutil.rmtree(run)
    train(ALONE, run, *words(place), old, pipe, recipe=RECIPE)
    shutil.rmtree(newest(run))
    (place / "data").rename(place / "there")
    history = (run / "history.jsonl").rename(place / "history.jsonl")
    (run / "history.jsonl").mkdir()
    for flags in ((), ("--run.allow-changed-data",)):
        train(ALONE, run, *words(place), new, pipe, *flags, expect=2, recipe=RECIPE)
    (run / "history.jsonl").rmdir()
    history.rename(run / "history.jsonl")
    said = train(ALONE, run, *words(place), new, pipe, expect=2, recipe=RECIPE)
    assert "another recipe (data.train was" in said
    train(ALONE, run, *words(place), new, pipe, "--run.allow-changed-data", recipe=RECIPE)
    assert "data_changed" in [line["event"] for line in read_history(run)]


@pytest.mark.parametrize("kind", ["link to nothing", "file", "pipe", "nothing", "empty folders"])
def test_a_run_whose_checkpoints_are_not_there_is_not_begun_anew(kind: str, place: Path) -> None:
    run = place / "run"
    checkpoints = run / "checkpoints"
    checkpoints.rename(place / "elsewhere")
    if kind == "link to nothing":
        checkpoints.symlink_to(place / "not mounted")
    elif kind == "file":
        checkpoints.touch()
    elif kind == "pipe":
        os.mkfifo(checkpoints)
    elif kind == "empty folders":
        (checkpoints / "step_000000002").mkdir(parents=True)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    said = train(ALONE, run, *words(place), expect=2, recipe=RECIPE)
    expected = {"link to nothing": "which is not there", "file": "no folder", "pipe": "no folder"}
    assert f"{checkpoints}" in said
    assert expected.get(kind, "had a checkpoint of step 1, as its history says, but none") in said
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize("lives", [1, 2], ids=["replaced", "replaced twice"])
def test_a_run_that_saved_nothing_is_begun_anew_and_one_that_did_is_not(
    lives: int, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    data = f"--data.train={scenes / 'train'}"
    diverges = ("--optimizer.learning-rate=1e30", "--optimizer.clip-norm=None",
                "--schedule.warmup-samples=0", "--run.max-skipped=2")  # fmt: skip
    for _ in range(lives):  # it comes to some step, and to no checkpoint
        train(ALONE, run, data, "--schedule.samples=240", *diverges, expect=1)
        assert read_history(run)[-1]["event"] == "ended" and read_history(run)[-1]["step"] >= 2
    said = train(ALONE, run, data, "--schedule.samples=240", "--run.save-every=4")
    assert ("never wrote a checkpoint; it is replaced" in said) and saved_step(run) == 4
    assert [event["event"] for event in read_history(run)].count("saved") == 1
    history = run / "history.jsonl"
    lines = [line for line in history.open() if '"saved"' not in line]
    history.write_text("".join(lines))  # what a writer leaves that is killed before it notes it
    shutil.rmtree(newest(run))
    train(ALONE, run, data, "--schedule.samples=240", "--run.save-every=4")
    assert saved_step(run) == 8
    shutil.rmtree(run / "checkpoints")
    said = train(ALONE, run, data, "--schedule.samples=240", expect=2)
    assert (
        f"{run} holds a run that had a checkpoint of step 8" in said
        and f"remove {run} to begin" in said
    )


def test_what_is_gone_is_noticed_though_the_notes_are_gone_too(place: Path) -> None:
    run = place / "run"
    one_fewer(place)
    (run / "data.json").unlink()
    output = train(ALONE, run, *words(place), expect=2, recipe=RECIPE)
    assert "taking what the checkpoint says" in output and "1 gone (00002.tar)" in output


def test_checkpoints_tell_their_data_and_the_report_tells_the_restarts(place: Path) -> None:
    run = place / "run"
    replaced(place)
    train(ALONE, run, *words(place), "--run.allow-changed-data", recipe=RECIPE)
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    kept = json.loads((run / "data.json").read_text())
    assert manifest["data"] == kept and len(kept["train"][0]) == 3
    assert all(len(manifest[name]) == 64 for name in ("recipe", "tokenizer"))
    before = json.loads((run / "checkpoints/step_000000002/manifest.json").read_text())
    assert before["data"]["train"] != manifest["data"]["train"]
    command("frugal.common.report", run)
    page = (run / "report.html").read_text()
    assert "Restarts" in page and "went on with other data after step 2" in page
    assert "00001.tar holds other samples" in page


def test_a_damaged_checkpoint_is_named_and_two_processes_go_on_from_the_one_before(
    place: Path,
) -> None:
    run = place / "run"
    (file,) = run.glob("checkpoints/step_000000002/*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output = train(DDP, run, *words(place), recipe=RECIPE)
    assert f"{file} was altered after it was written" in output
    assert "taking" in output and "from step 1 of 3" in output
    assert newest(run).name.endswith("3")
