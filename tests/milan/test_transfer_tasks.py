"""Fine-tuning, linear probing and segmentation through ``frugal.common.evaluate --tasks``."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import segment_cases
import timm

from frugal.common.checkpoint.store import save_weights
from support import ALONE, DDP, ROOT, command, fork, saved_tensors, train

SMALL = ("model.image.width=32", "model.image.depth=2", "model.image.heads=2",
         "model.image.mlp-width=64", "model.image.drop-path=0", "data.workers=0", "batch-size=16",
         "schedule.samples=48", "schedule.warmup-samples=16", "run.log-every=1")  # fmt: skip
EVALUATE = "frugal.common.evaluate"


def words(checkpoint: Path, data: Path, out: Path, *tasks: str) -> list[str]:
    """A command that trains for three steps."""
    return [
        "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--device", "cpu",
        "--workers", "0", "--transfer.recipe", "demo", "--tasks", *tasks,
        "--transfer.changes", *SMALL,
    ]  # fmt: skip


def numbers(file: Path) -> dict:
    return {
        name.partition("top")[1] + name.rpartition("_")[2]: value
        for name, value in json.loads(file.read_text()).items()
        if name.endswith(("_top1", "_top5", "_loss", "_images"))
    }


def test_an_encoder_is_fine_tuned_and_probed_by_one_command(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = words(pretrained, scenes, out, "milan-finetune", "milan-linear-probe")
    done = command(EVALUATE, *given)
    for name in ("milan_finetune", "milan_linear_probe"):
        assert f"{name}_top1" in done.stdout
        (loss,) = re.findall(rf"{name}_loss +([0-9.]+)\n", done.stdout)  # no share of anything
        found = numbers(out / f"{name}.json")
        assert len(found) == 4
        # the program measures the last step itself, and names the best one
        best = json.loads((out / name / "checkpoints" / "best.json").read_text())
        measured = json.loads((out / f"{name}.json").read_text())
        assert float(loss) == pytest.approx(measured[f"{name}_loss"], rel=1e-2)
        assert f"step_{measured['step']:09}" == best["checkpoint"]
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
        recipe = json.loads((out / name / "recipe.json").read_text())
        assert recipe["run"]["start_from"] == str(pretrained)
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["classification"] * 2
    finetuned = json.loads((out / "milan_finetune.json").read_text())
    assert float(rows[0]["acc1"]) == finetuned["milan_finetune_top1"]
    assert rows[0]["dataset"] == str(scenes)
    before = (out / "milan_finetune" / "metrics.jsonl").read_bytes()
    again = command(EVALUATE, *given)
    assert (out / "milan_finetune" / "metrics.jsonl").read_bytes() == before
    assert again.stdout == done.stdout


def test_what_was_trained_on_top_of_other_weights_is_not_measured_again(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pretrained, model)
    given = words(model, scenes, out, "milan-linear-probe")
    command(EVALUATE, *given)
    (step,) = (model / "checkpoints").glob("step_*")
    tensors = saved_tensors(model)
    name = next(name for name in tensors if name.startswith("weight/model.image.blocks"))
    save_weights(
        model / "checkpoints",
        {
            key.partition("/")[2]: tensor + (key == name)
            for key, tensor in tensors.items()
            if key.startswith(("weight/", "buffer/"))
        },
        step=int(step.name.removeprefix("step_")) + 1,
    )
    refusal = command(EVALUATE, *given, expect=2).stderr
    assert "holds what was trained on top of other weights than those of" in refusal
    assert len(refusal.splitlines()) == 1


def test_what_was_trained_before_is_measured_as_this_command_says(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = words(pretrained, scenes, out, "milan-linear-probe")
    command(EVALUATE, *given)
    log = (out / "milan_linear_probe" / "metrics.jsonl").read_bytes()
    for share in (0.5, 1.0):
        command(EVALUATE, *given, f"evaluation.0.crop.share={share}")
        measured = json.loads((out / "milan_linear_probe.json").read_text())
        assert measured["milan_linear_probe_settings"]["crop"]["share"] == share
    assert (out / "milan_linear_probe" / "metrics.jsonl").read_bytes() == log


def test_a_model_of_another_library_is_trained_on_with_its_own_pixels(
    scenes: Path, tmp_path: Path
) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=small)
    file = tmp_path / "timm" / "config.json"
    about = json.loads(file.read_text())
    about["pretrained_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    file.write_text(json.dumps(about))
    out = tmp_path / "out"
    given = words(tmp_path / "timm", scenes, out, "milan-linear-probe")
    refusal = command(EVALUATE, *given, expect=2).stderr
    assert "a flag of the recipe goes behind --transfer.changes" in refusal
    pixels = ["model.image.mean=0.5 0.4 0.3", "model.image.std=0.2 0.2 0.2"]
    flags = refusal.partition("give ")[2].partition(";")[0].split("--")[1:]
    changes = [f"{flag.partition(' ')[0]}={flag.partition(' ')[2].strip()}" for flag in flags]
    assert set(pixels) <= set(changes)
    command(EVALUATE, *given, *changes)
    trained = saved_tensors(out / "milan_linear_probe")
    blocks = model.state_dict()["blocks.0.attn.qkv.weight"]
    assert trained["buffer/model.image.blocks.0.attn.qkv.weight"].equal(blocks)


def test_published_crops_are_not_for_what_trains(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    given = words(pretrained, scenes, tmp_path / "out", "milan-finetune")
    refusal = command(EVALUATE, "--published", *given, expect=2).stderr
    assert "--published is for what the model says of images, but milan-finetune" in refusal


def test_on_two_processes_it_trains_and_measures_the_same(
    alone: Path, scenes: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    small = words(alone, scenes, one, "milan-linear-probe")
    small[small.index("demo")] = "demo-clip"
    small += ["model.image.depth=1", "model.image.heads=2", "model.image.mlp-width=64"]
    command(EVALUATE, *small)
    small[small.index(str(one))] = str(two)
    log = tmp_path / "log"
    process = fork(EVALUATE, small, log=log, cwd=ROOT, environments=DDP.environments())
    assert process.wait(timeout=300) == 0, log.read_text()
    expected = numbers(one / "milan_linear_probe.json")
    assert numbers(two / "milan_linear_probe.json") == pytest.approx(expected, rel=1e-5)


SLOW_BEST = """
import time
from frugal.common import evaluate as program
from frugal.common.checkpoint.store import CheckpointStore

note_best, evaluate = CheckpointStore.note_best, program.evaluate


def slowly(*given):  # as on a slow disk
    time.sleep(2)
    return note_best(*given)


def told(options, **more):
    print("measures", options.checkpoint.name, flush=True)
    evaluate(options, **more)


CheckpointStore.note_best, program.evaluate = slowly, told
program.main()
"""


def test_every_process_measures_the_checkpoint_that_the_first_one_found_best(
    pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    script, log = tmp_path / "slow_best.py", tmp_path / "log"
    script.write_text(SLOW_BEST)
    given = words(pretrained, scenes, tmp_path / "out", "milan-linear-probe")
    processes = fork(str(script), given, log=log, cwd=ROOT, environments=DDP.environments())
    assert processes.wait(timeout=300) == 0, log.read_text()
    assert log.read_text().count("measures best.json") == 2


def test_a_segmenter_is_trained_and_measured(
    pretrained: Path, pretraining_words: tuple[str, ...], tmp_path: Path
) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "out"
    for split in ("training", "validation"):
        segment_cases.write_folder(data, [(64, 64)] * 16, num_classes=5, split=split)
    recipe = json.loads((pretrained / "recipe.json").read_text())
    given = (
        f"--objective.teacher.source={recipe['objective']['teacher']['source']}",
        f"--data.train={recipe['data']['train'][0]}", "--model.image.depth=4",
    )  # fmt: skip
    train(ALONE, run, *given, module="frugal.milan.pretrain", small=pretraining_words)
    more = ("model.num-classes=5", "run.interpolate", "model.image.depth=4")
    done = command(EVALUATE, *words(run, data, out, "milan-segment"), *more)
    assert "milan_segment_miou" in done.stdout
    measured = json.loads((out / "milan_segment.json").read_text())
    assert measured["milan_segment_images"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.remove("demo") or w.remove("--transfer.recipe"),
            "with --transfer.recipe, one of vit-s",
        ),
        (lambda w: w.__setitem__(w.index("demo"), "vit-b99"), "there is no recipe 'vit-b99'"),
        (
            lambda w: w.__setitem__(w.index("demo"), "tests/golden/runs_before/flip/recipe.json"),
            "the recipe trains nothing on top of an image tower; choose from vit-s16",
        ),
        (lambda w: w.__setitem__(3, "/nowhere"), "give a folder with images to train on in train/"),
        (lambda w: w.__setitem__(w.index("milan-finetune"), "linear-probe"), "add one to --tasks"),
        (lambda w: w.extend(["model.image.width", "48"]), "has '48', which changes no field of"),
        (
            lambda w: w.append("data.train=it's"),
            """has "data.train=it's", which changes no field""",
        ),
        (lambda w: w.append("run.start-from=runs/x"), "gives run.start-from, but milan-finetune"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    change, message, pretrained: Path, scenes: Path, tmp_path: Path
) -> None:
    given = words(pretrained, scenes, tmp_path / "out", "milan-finetune")
    change(given)
    refusal = command(EVALUATE, *given, expect=2).stderr
    assert refusal.startswith("error: ") and len(refusal.splitlines()) == 1, refusal
    assert message in refusal
    assert not (tmp_path / "out").exists()
