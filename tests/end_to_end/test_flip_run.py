"""FLIP from the command line to the report, launched as users launch it."""

import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from support import (
    ALONE,
    PYTHON,
    Launcher,
    command,
    deepspeed,
    largest_difference,
    losses,
    metrics,
    newest,
    rewrite_shard,
    saved_tensors,
    train,
    zero,
)


@pytest.fixture(scope="module")
def two_stages(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masked and unmasked training under the deepspeed launcher with two ranks, evaluated."""
    folder = tmp_path_factory.mktemp("two_stages")
    words = (
        f"--data.train={scenes / 'train'}",
        f"--evaluation.0.data={scenes}",
        f"--evaluation.1.data={scenes}",
        f"--evaluation.2.data={scenes}",
        "--run.picture-every=10",
    )
    train(deepspeed(1), folder / "masked", *words)
    source = f"--run.start-from={folder / 'masked'}"
    train(deepspeed(1), folder / "unmasked", *words, source, recipe="demo-tuning")
    return folder


def test_a_run_directory_holds_what_is_promised(two_stages: Path) -> None:
    run = two_stages / "masked"
    for name in (
        "recipe.json",
        "model.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints/latest",
    ):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events.*"))
    assert list((run / "tokenizer").iterdir())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["engine"] == "deepspeed zero1"
    line = metrics(run)[-1]
    for name in (
        "loss", "learning_rate", "logit_scale", "gradient_norm", "samples_per_second",
        "tokens_per_second", "data_wait", "flops_per_second", "share_of_peak",
    ):  # fmt: skip
        assert isinstance(line[name], float), name
    assert 0 < line["share_of_peak"] < 1.5
    assert line["image_tokens"] == 8 + 1  # half of sixteen patches, and the class token


def test_the_second_stage_starts_from_the_first_and_sees_whole_images(two_stages: Path) -> None:
    lines = metrics(two_stages / "unmasked")
    assert lines[0]["image_tokens"] == 16 + 1
    assert lines[0]["loss"] < metrics(two_stages / "masked")[0]["loss"]


def test_evaluations_count_every_image_once(two_stages: Path) -> None:
    zero_shot = json.loads((two_stages / "unmasked/evaluation/zero_shot.json").read_text())
    retrieval = json.loads((two_stages / "unmasked/evaluation/retrieval.json").read_text())
    assert zero_shot["zero_shot_images"] == 128
    assert zero_shot["zero_shot_classes"] == 64
    assert retrieval["retrieval_candidates"] == 40
    file = two_stages / "unmasked/evaluation/compositional.json"
    assert json.loads(file.read_text())["compositional_items"] == 7 * 10


@pytest.mark.parametrize("processes", [1, 2])
def test_the_evaluate_command_repeats_the_numbers(
    processes: int, two_stages: Path, scenes: Path, tmp_path: Path
) -> None:
    launcher = (
        ()
        if processes == 1
        else ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m")
    )
    run = two_stages / "unmasked"
    words = (
        "--checkpoint", run, "--data", scenes, "--out", tmp_path, "--batch-size", 50,
        "--workers", 0,
    )  # fmt: skip
    command(*launcher, "frugal.common.evaluate", *words)
    for name in ("zero_shot", "retrieval", "compositional"):
        again = json.loads((tmp_path / f"{name}.json").read_text())
        before = json.loads((run / "evaluation" / f"{name}.json").read_text())
        for key, value in before.items():
            assert again[key] == pytest.approx(value, abs=0.02), key


def test_tensorboard_and_the_file_hold_the_same_scalars(two_stages: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = two_stages / "masked"
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    for name in ("loss", "learning_rate", "gradient_norm", "logit_scale", "samples_per_second"):
        drawn = {event.step: event.value for event in board.Scalars(name)}
        assert drawn == {line["step"]: pytest.approx(line[name]) for line in metrics(run)}
    evaluations = {f"evaluation/{name}" for name in ("zero_shot", "retrieval", "compositional")}
    assert set(board.Tags()["images"]) == {"batch"} | evaluations
    assert any(name.startswith("recipe") for name in board.Tags()["tensors"])


def test_the_report_is_written_with_its_numbers(two_stages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(two_stages, folder)
    command("frugal.common.report", folder)
    report = json.loads((folder / "report.json").read_text())
    for name in (
        "zero_shot_top1", "zero_shot_top1_held_out", "image_retrieval_recall_at_1",
        "text_retrieval_recall_at_1", "retrieval_candidates", "samples_seen", "train_seconds",
        "samples_per_second", "world_size", "engine",
    ):  # fmt: skip
        assert report[name] is not None, name
    assert report["samples_seen"] == 2 * 480
    assert "<img" in (folder / "report.html").read_text()


def spoil(source: Path, target: Path) -> dict[str, int]:
    """Copy a shard with every tenth sample damaged; how many of each kind."""
    spoiled = {"image": 0, "no caption": 0}
    members = itertools.count()

    def change(name: str, content: bytes) -> bytes | None:
        sample = next(members) // 3
        if sample % 20 == 3 and name.endswith(".jpg"):
            spoiled["image"] += 1
            return content[: len(content) // 3]
        if sample % 20 == 13 and not name.endswith(".jpg"):
            spoiled["no caption"] += name.endswith(".txt")
            return None
        return content

    rewrite_shard(source, target, change)
    return spoiled


def test_damaged_samples_are_counted_and_nothing_is_lost(scenes: Path, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    spoiled = spoil(scenes / "train" / "00000.tar", shard)
    assert sum(spoiled.values()) == 4  # of 40
    run = tmp_path / "run"
    words = (f"--data.train={shard}", "--batch-size=20", "--schedule.samples=80")
    output = train(zero(1), run, *words, "--schedule.warmup-samples=0", "--data.max-damaged=0.2")
    for kind in spoiled:  # the first of each kind with its place, and how many at the end
        assert output.count(f": {kind}") == 1, output
    assert f"damaged sample {shard}/" in output
    assert "step 4: 8 of 80 samples damaged so far (image 4, no caption 4): 10.00%" in output
    line = metrics(run)[-1]
    assert line["damaged"] == {kind: 2 * count for kind, count in spoiled.items()}  # two epochs
    assert line["read_samples"] == 80
    assert line["trained_samples"] == 80 - 2 * 4
    output = train(
        deepspeed(1), tmp_path / "strict", *words, "--schedule.warmup-samples=0",
        "--data.max-damaged=0.05", expect=2,
    )  # fmt: skip
    assert "data.max_damaged" in output
    assert "Traceback" not in output
    # it left a checkpoint, from which it goes on with a higher limit
    assert newest(tmp_path / "strict").name in ("step_000000001", "step_000000002")
    words += ("--schedule.warmup-samples=0", "--data.max-damaged=0.2")
    assert "continuing" in train(zero(1), tmp_path / "strict", *words)
    assert losses(tmp_path / "strict") == losses(run)


@pytest.mark.parametrize("launcher", [PYTHON, deepspeed(2)], ids=lambda launcher: launcher.name)
def test_a_loss_that_stays_not_finite_ends_the_run_with_a_sentence(
    launcher: Launcher, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = train(
        launcher, run, f"--data.train={scenes / 'train'}", "--optimizer.learning-rate=1e30",
        "--optimizer.clip-norm=None", "--schedule.warmup-samples=0", "--run.max-skipped=3",
        expect=1,
    )  # fmt: skip
    assert "Traceback" not in output
    sentence = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "3 steps in a row" in sentence
    assert "learning rate of" in sentence
    listing = json.loads((run / "not_finite.json").read_text())
    assert len(listing["keys"]) == 24
    assert all(".tar" in key for key in listing["keys"])


SHORT = "--schedule.samples=144"
ACCUMULATE, CACHE = "--engine.accumulate=2", "--engine.cache-chunk=5"


@pytest.fixture(scope="module")
def short_runs(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process does: with accumulation, and without anything where chunks are cached."""
    folder = tmp_path_factory.mktemp("short")
    data = f"--data.train={scenes / 'train'}"
    train(ALONE, folder / "accumulated", data, SHORT, ACCUMULATE)
    train(ALONE, folder / "plain", data, SHORT)
    return {ACCUMULATE: folder / "accumulated", CACHE: folder / "plain"}


@pytest.mark.parametrize(
    ("launcher", "word"),
    [
        (zero(0), ACCUMULATE), (zero(2), ACCUMULATE), (zero(3), ACCUMULATE), (zero(3), CACHE),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_accumulation_and_gradient_caching_agree_with_one_process(
    launcher: Launcher, word: str, short_runs: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    train(launcher, tmp_path / "run", f"--data.train={scenes / 'train'}", SHORT, word)
    expected = losses(short_runs[word])
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], abs=1e-5)
    left, right = saved_tensors(short_runs[word]), saved_tensors(tmp_path / "run")
    assert largest_difference(left, right) < 1e-5


@pytest.mark.parametrize("launcher", [zero(2)], ids=lambda launcher: launcher.name)
def test_float16_is_scaled_and_follows_float32(
    launcher: Launcher, alone: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(launcher, run, f"--data.train={scenes / 'train'}", "--engine.precision=float16")
    lines = metrics(run)
    skipped = lines[-1]["skipped_steps"]
    assert skipped <= 5  # the first scale is too large for some gradients
    first = losses(alone)[1]
    assert lines[0]["loss"] == pytest.approx(first, abs=0.01)
    assert lines[-1]["loss"] == pytest.approx(losses(alone)[20], abs=0.15)
    state = json.loads((newest(run) / "state.json").read_text())
    assert state["loss_scale"]["scale"] == 2.0 ** (16 - skipped)
    assert state["updates"] == 20 - skipped


def test_help_names_the_recipes_and_loads_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "frugal.flip.train", "--help"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "vit-l16-laion400m" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "tyro" in loaded
    assert not loaded & {"deepspeed", "transformers", "timm", "open_clip", "tensorboard"}


def shrink(name: str, content: bytes) -> bytes:
    """A photo at 48 pixels, so that to read it again and again is cheap; anything else as it is."""
    if not name.endswith(".jpg"):
        return content
    photo, smaller = Image.open(io.BytesIO(content)), io.BytesIO()
    photo.thumbnail((48, 48))
    photo.save(smaller, "jpeg", quality=90)
    return smaller.getvalue()


def test_real_photos_are_learned_under_deepspeed(real_data: Path, tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for shard in sorted((real_data / "flickr8k" / "train").glob("*.tar")):
        rewrite_shard(shard, photos / shard.name, shrink)
    train(
        deepspeed(1), run, f"--data.train={photos}", f"--evaluation.1.data={photos}",
        "--schedule.samples=28000", "--schedule.warmup-samples=3000", "--run.save-every=1000",
        small=(
            "--model.image.depth=1", "--model.image.width=96", "--model.image.heads=3",
            "--model.image.mlp-width=256", "--model.text.depth=1",
        ),
    )  # fmt: skip
    numbers = json.loads((run / "evaluation" / "retrieval.json").read_text())
    assert numbers["retrieval_candidates"] == 1850
    chance = 10 / 1850
    assert numbers["image_retrieval_recall_at_10"] > 8 * chance
    assert numbers["text_retrieval_recall_at_10"] > 8 * chance

    # photographs of any aspect ratio pass through evaluation
    coco = real_data / "coco_mini" / "val"
    with tarfile.open(next(coco.glob("*.tar"))) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(".jpg"))
        width, height = Image.open(archive.extractfile(member)).size
    assert width != height
    words = ("--tasks", "retrieval", "--out", tmp_path, "--workers", 0)
    command("frugal.common.evaluate", "--checkpoint", run, "--data", coco, *words)
    numbers = json.loads((tmp_path / "retrieval.json").read_text())
    assert numbers["retrieval_candidates"] == 106
    assert numbers["retrieval_captions"] == 530
