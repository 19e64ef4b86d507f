"""Steps of real runs, computed again: whether they agree, and if not where and why."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from forks import fork
from frugal.common.checkpoint.manifest import digest_file, write_manifest
from frugal.common.engine.digests import digest_all, from_hex, to_hex
from frugal.common.history import note
from support import ALONE, DDP, ROOT, Launcher, train, zero

WORDS = (
    "--schedule.samples=240", "--run.digests", "--run.save-every=4", "--run.keep=9",
    "--run.log-every=3",
)  # fmt: skip
"""Ten steps with checkpoints after 4, 8 and 10."""
SPOILED = "model.image.blocks.0.mlp.fc2.weight"
SPOIL = """
import sys
import frugal.common.engine.step as step_module
from frugal.common.train import main
from frugal.flip.recipes import RECIPES
import torch

honest = step_module.digest_step


def spoiled(engine, step, batches, micro_batches):
    if step == 7:
        gradient = engine.objective.get_parameter("{parameter}").grad
        gradient.view(torch.int32).view(-1)[3] ^= 1 << 20
    return honest(engine, step, batches, micro_batches)


step_module.digest_step = spoiled
main(RECIPES, method="flip")
"""
"""FLIP on a machine whose memory flips one bit of one gradient in step 7."""


GOES_BACK = """
import os
import signal
import sys
from dataclasses import replace

import torch

import frugal.common.engine.loop as loop
import frugal.common.replay as replay
from frugal.common.engine.logger import MetricsLogger
from frugal.common.train import main
from frugal.flip.recipes import RECIPES

honest = loop.train_step


def poisoned(engine, recipe, step, micro_batches, average=None):
    if step + 1 in (6, 7):
        images = torch.full_like(micro_batches[0].images, torch.nan, dtype=torch.float32)
        micro_batches = [replace(micro_batches[0], images=images), *micro_batches[1:]]
    return honest(engine, recipe, step, micro_batches, average)


def killed(logger, step):
    os.kill(os.getpid(), signal.SIGKILL)


loop.train_step = replay.train_step = poisoned
if {is_killed}:
    MetricsLogger.rewind = killed
if any(word.startswith("--step") for word in sys.argv):
    replay.main()
else:
    main(RECIPES, method="flip")
"""
"""FLIP on data of which steps 6 and 7 are not finite, perhaps killed while it goes back."""


def replay(
    launcher: Launcher,
    run: Path,
    step: int,
    *more: str,
    expect: int = 0,
    module: str = "frugal.common.replay",
) -> str:
    """What it says."""
    log = run.parent / "replay.log"
    log.unlink(missing_ok=True)
    words = [str(run), f"--step={step}", *more, "--local_rank=0"]  # which deepspeed adds
    process = fork(
        module, words, log=log, cwd=ROOT,
        environments=launcher.environments(),
    )  # fmt: skip
    code = process.wait(timeout=300)
    assert code == expect, log.read_text()[-4000:]
    return log.read_text()


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("replayed") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", *WORDS)
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def alter(file: Path, step: int, change: Callable[[dict], None]) -> None:
    """Change what a line says of a step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["step"] == step:
            change(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def alter_gradient(run: Path, step: int) -> None:
    """Note another gradient of a step, as another machine would have had it."""

    def change(line: dict) -> None:
        if "parameters" in line:
            parameters = from_hex(line["parameters"])
            parameters[0] += 1
            line["parameters"], found[:] = to_hex(parameters), [digest_all(parameters)]

    found = []
    alter(run / "digests_of_parts.jsonl", step, change)
    alter(run / "digests.jsonl", step, lambda line: line.update(gradient=found[0]))


@pytest.mark.parametrize(("step", "first"), [(8, 5), (3, 1)])
def test_an_undisturbed_run_is_repeated_bit_for_bit(step: int, first: int, finished: Path) -> None:
    before = bytes_of(finished)
    assert f"steps {first} to {step} agree" in replay(ALONE, finished, step)
    assert bytes_of(finished) == before, "nothing is written into the run directory"


def test_several_processes_repeat_a_run_of_as_many(scenes: Path, tmp_path: Path) -> None:
    run, launcher = tmp_path / "run", zero(2)
    words = ("--engine.ema-decay=0.9", "--engine.accumulate=2")
    train(launcher, run, f"--data.train={scenes / 'train'}", *WORDS, *words)
    assert "steps 5 to 7 agree" in replay(launcher, run, 7)
    said = replay(ALONE, run, 7, expect=2)
    assert "taken by 2 processes" in said and "--nproc_per_node 2" in said


def test_weights_that_every_process_keeps_whole_at_stage_3_are_put_back_a_second_time(
    scenes: Path, tmp_path: Path
) -> None:
    run, launcher = tmp_path / "run", zero(3)
    train(launcher, run, f"--data.train={scenes / 'train'}", *WORDS, "--schedule.samples=120")
    alter_gradient(run, 5)
    assert "a second time it came out as now" in replay(launcher, run, 5, expect=1)


def test_with_virtual_processes_one_repeats_a_run_of_two(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--engine.virtual-processes=2", "--engine.accumulate=2")
    train(DDP, run, f"--data.train={scenes / 'train'}", *WORDS, *words)
    alter_gradient(run, 7)
    said = replay(ALONE, run, 7, expect=1)
    assert "step 7 has another gradient" in said, "those of steps 5 and 6 are the same"
    # neither the number of processes nor the engine can be the reason
    assert "it was the machine of the run" in said


def test_engines_and_stages_note_the_same_digests(scenes: Path, tmp_path: Path) -> None:
    # of two processes: the sum of two numbers does not depend on their order
    noted = []
    for launcher in (DDP, zero(0), zero(1), zero(3)):
        run = tmp_path / launcher.name
        train(launcher, run, f"--data.train={scenes / 'train'}", *WORDS, "--schedule.samples=48")
        lines = [json.loads(line) for line in (run / "digests.jsonl").open()]
        noted.append([(line["step"], line["gradient"], line["samples"]) for line in lines])
    assert noted[0] == noted[1] == noted[2] == noted[3]
    assert [step for step, _, _ in noted[0]] == [1, 2]


@pytest.mark.parametrize("name", ["gradient", "samples"])
def test_notes_that_were_altered_are_not_called_the_machine(name: str, copy: Path) -> None:
    alter(copy / "digests.jsonl", 7, lambda line: line.update({name: "0" * 16}))
    said = replay(ALONE, copy, 8, expect=1)
    assert "digests_of_parts.jsonl contradict each other about step 7: one of them was" in said
    assert "machine" not in said.partition("contradict")[2]


def test_weights_that_were_noted_otherwise_may_be_an_altered_note(copy: Path) -> None:
    def change(line: dict) -> None:
        if "weights" in line:
            line["weights"] = "0" * 16 + line["weights"][16:]

    for step, last in ((4, 6), (8, 8)):
        notes = copy / "digests_of_parts.jsonl"
        kept = notes.read_text()
        alter(notes, step, change)
        assert "or digests_of_parts.jsonl was altered" in replay(ALONE, copy, last, expect=1)
        notes.write_text(kept)


def test_a_step_of_which_nothing_was_noted_does_not_agree(copy: Path) -> None:
    notes = copy / "digests.jsonl"
    lines = notes.read_text().splitlines(keepends=True)
    notes.write_text("".join(line for line in lines if json.loads(line)["step"] != 6))
    said = replay(ALONE, copy, 6, expect=2)
    assert f"step 6 of {copy} has no digest in digests.jsonl" in said and "such as 5" in said
    assert "of 2 steps are the same, bit for bit (of 1 between" in replay(ALONE, copy, 7)


def test_a_history_that_lacks_why_a_step_is_missing_is_not_called_the_machine(copy: Path) -> None:
    notes = copy / "digests.jsonl"
    lines = notes.read_text().splitlines(keepends=True)
    notes.write_text("".join(line for line in lines if json.loads(line)["step"] != 6))
    alter_gradient(copy, 7)
    said = replay(ALONE, copy, 7, expect=1)
    assert "has nothing of step 6, which history.jsonl does not leave out: one of them" in said
    assert "why step 7 comes out otherwise cannot be told" in said and "machine" not in said


def test_a_history_that_leaves_out_a_step_that_was_taken_is_altered(copy: Path) -> None:
    note(copy, "rewind", step=3, to=1, left_out=[2])
    assert "killed while it went back" in replay(ALONE, copy, 3)
    note(copy, "continued", step=1)
    said = replay(ALONE, copy, 3, expect=2)
    assert "history.jsonl and digests.jsonl in" in said and "about step 2" in said


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_where_the_notes_of_the_data_are_gone_the_checkpoint_tells(kind: str, copy: Path) -> None:
    data = Path(shutil.copytree(recipe_of(copy)["data"]["train"][0], copy.parent / "fewer"))
    sorted(data.glob("*.tar"))[-1].unlink()
    (copy / "data.json").unlink()
    if kind == "damaged":
        (copy / "data.json").write_text("{")
    assert "steps 5 to 6 agree" in replay(ALONE, copy, 6)
    said = replay(ALONE, copy, 6, f"--train={data}", expect=1)
    assert "1 gone (00003.tar)" in said and "it was the data" in said


def test_what_else_lies_in_a_run_directory_is_left_alone(copy: Path) -> None:
    (copy / "a").symlink_to("/nowhere")
    (copy / "b").symlink_to(copy / "b")
    (copy / "c").symlink_to(copy)
    os.mkfifo(copy / "d")
    (copy / "e").mkdir()
    os.mkfifo(copy / "e" / "f")
    for threads, packages in ((-4, "abc"), (2.5, []), ("abc", 3), (10**30, None)):
        environment = json.loads((copy / "environment.json").read_text())
        environment |= {"threads_per_process": threads, "packages": packages}
        (copy / "environment.json").write_text(json.dumps(environment))
        alter_gradient(copy, 5)
        assert "step 5 has another gradient" in replay(ALONE, copy, 5, expect=1)


GARBAGE = (
    "[]", "7", "{", '{"step": 9, "gradient": 5}', '{"step": "x"}', '{"step": true}',
    '{"step": 9, "gradient": "' + "0" * 16 + '", "samples": "' + "0" * 16 + '"}',
    '{"step": 9, "gradient": "' + "z" * 16 + '", "samples": "", "processes": 1, "engine": "e"}',
)  # fmt: skip


def test_lines_that_are_none_are_counted(copy: Path) -> None:
    lines = "".join(line + "\n" for line in GARBAGE)
    with (copy / "digests.jsonl").open("a") as file:
        file.write(lines)
    with (copy / "digests_of_parts.jsonl").open("a") as file:
        file.write('{"step": 9, "weights": "0"}\n{"step": 9, "samples": [1]}\n{"step": 9}\n')
    said = replay(ALONE, copy, 10)
    assert "steps 9 to 10 agree" in said
    assert f"digests.jsonl: {len(GARBAGE)} lines are damaged" in said
    assert "digests_of_parts.jsonl: 3 lines are damaged" in said
    (copy / "digests.jsonl").write_text(lines)
    assert "no digests of steps 9 to 10" in replay(ALONE, copy, 10, expect=2)


def test_a_flipped_bit_is_found_in_its_step_and_parameter(scenes: Path, tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "spoiled.py"
    script.write_text(SPOIL.replace("{parameter}", SPOILED))
    train(ALONE, run, f"--data.train={scenes / 'train'}", *WORDS, module=str(script))
    assert "steps 5 to 6 agree" in replay(ALONE, run, 6)
    said = replay(ALONE, run, 8, expect=1)
    assert (
        f"step 7 has another gradient from the same samples: 1 of 38 parameters from {SPOILED}"
        in said
    )
    assert "it was the machine of the run" in said
    environment = json.loads((run / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (run / "environment.json").write_text(json.dumps(environment))
    said = replay(ALONE, run, 7, expect=1)
    assert (
        "torch was 1.0 and is" in said and "it was the code, the recipe or another machine" in said
    )


def test_a_weight_that_was_altered_in_the_checkpoint_is_named(copy: Path) -> None:
    folder = copy / "checkpoints" / "step_000000004"
    state = json.loads((folder / "state.json").read_text())
    (entry,) = state["files"]
    file = folder / entry["name"]
    tensors = load_file(file)
    tensors[f"weight/{SPOILED}"][1, 2] += 1e-6
    save_file(tensors, file)
    entry |= digest_file(file)
    (folder / "state.json").write_text(json.dumps(state))
    sha256 = {f.name: digest_file(f)["sha256"] for f in (folder / "state.json", file)}
    write_manifest(folder, sha256, {})
    said = replay(ALONE, copy, 7, expect=1)
    assert f"1 of 38 parameters from {SPOILED}" in said
    assert "weights of the checkpoint of step 4" in said


def test_a_sample_that_was_changed_is_named(scenes: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scenes / "train", data)
    train(ALONE, run, f"--data.train={data}", *WORDS, "--run.save-every=1000")
    shard = sorted(data.glob("*.tar"))[1]
    key = brighten(shard, number=5)
    # every sample comes once in the first seven steps, and a key says once of which step
    said = replay(ALONE, run, 7, expect=1)
    assert f"has other samples: {shard}/{key};" in said and "it was the data" in said


def brighten(shard: Path, *, number: int) -> str:
    """Change one image of a shard; the key of its sample."""
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    images = [i for i, (member, _) in enumerate(members) if member.name.endswith((".jpg", ".png"))]
    member, content = members[images[number]]
    image = Image.open(io.BytesIO(content))
    file = io.BytesIO()
    image.point(lambda value: 255 - value).save(file, format=image.format)
    member.size = len(file.getvalue())
    members[images[number]] = (member, file.getvalue())
    with tarfile.open(shard, "w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return members[images[number]][0].name.rpartition(".")[0]


def test_other_weights_to_start_from_are_named(
    scenes: Path, finished: Path, tmp_path: Path
) -> None:
    run, source = tmp_path / "run", Path(shutil.copytree(finished, tmp_path / "source"))
    words = (*WORDS, "--schedule.samples=72", f"--run.start-from={source}")
    train(ALONE, run, f"--data.train={scenes / 'train'}", *words)
    assert "steps 1 to 2 agree" in replay(ALONE, run, 2)
    (source / "checkpoints" / "latest").write_text("step_000000004\n")
    said = replay(ALONE, run, 2, expect=1)
    assert f"it was what run.start_from names ({source}): it holds other weights" in said


def test_the_code_that_took_a_step_is_compared_and_not_that_of_the_last_start(copy: Path) -> None:
    history = copy / "history.jsonl"
    began = json.loads(history.read_text().splitlines()[0])
    alter_gradient(copy, 7)
    earlier = began | {"environment": began["environment"] | {"code": "of yesterday"}}
    later = began | {"event": "continued", "step": 8}
    history.write_text(json.dumps(earlier) + "\n" + json.dumps(later) + "\n")
    said = replay(ALONE, copy, 7, expect=1)
    assert "code was of yesterday and is" in said
    assert "it was the code, the recipe or another machine" in said


def test_a_step_is_taken_again_as_the_process_took_it_that_took_it(copy: Path) -> None:
    go_back_to(copy, 4)
    words = ("--engine.precision=bfloat16", "--engine.deterministic")
    data = recipe_of(copy)["data"]["train"][0]
    said = train(ALONE, copy, f"--data.train={data}", *WORDS, *words)
    assert "otherwise: engine.deterministic was False and is now True; engine.precision was" in said
    assert "steps 1 to 4 agree" in replay(ALONE, copy, 4)
    said = replay(ALONE, copy, 7)
    assert "steps 5 to 7 agree" in said and "deterministic kernels alone" in said


def go_back_to(run: Path, step: int) -> None:
    """Remove what a run has saved after a step."""
    for folder in (run / "checkpoints").glob("step_*"):
        if folder.name > f"step_{step:09d}":
            shutil.rmtree(folder)


def recipe_of(run: Path) -> dict:
    return json.loads((run / "recipe.json").read_text())


def test_a_stream_begins_at_the_same_place_a_second_time(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (*WORDS, "--data.resampled-samples=150")
    train(ALONE, run, f"--data.train={scenes / 'train'}", *words)
    alter_gradient(run, 7)
    assert "a second time it came out as now" in replay(ALONE, run, 7, expect=1)


def test_a_damaged_checkpoint_is_passed_over(copy: Path) -> None:
    (file,) = (copy / "checkpoints" / "step_000000004").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    said = replay(ALONE, copy, 5)
    assert f"{file} has" in said and "taking the beginning of the run" in said
    assert "steps 1 to 5 agree" in said


def test_data_may_lie_elsewhere_now(scenes: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(scenes / "train", tmp_path / "data")), tmp_path / "run"
    train(ALONE, run, f"--data.train={data}", *WORDS, "--schedule.samples=48")
    moved = data.rename(tmp_path / "moved")
    assert f"{data}, which does not exist" in replay(ALONE, run, 2, expect=2)
    assert "steps 1 to 2 agree" in replay(ALONE, run, 2, f"--train={moved}")


def test_the_step_that_a_run_stopped_for_is_computed_again(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    spoiled = (
        "--optimizer.learning-rate=1e30", "--optimizer.clip-norm=None",
        "--schedule.warmup-samples=0", "--run.max-skipped=3",
    )  # fmt: skip
    output = train(ALONE, run, f"--data.train={scenes / 'train'}", *WORDS, *spoiled, expect=1)
    dump = json.loads((run / "not_finite.json").read_text())
    assert f"python -m frugal.common.replay {run} --step {dump['step']}" in output
    said = replay(ALONE, run, dump["step"])
    assert f"step {dump['step']} has loss nan and no finite gradient, on {dump['keys'][0]}" in said


def test_what_cannot_be_replayed_is_refused(copy: Path, alone: Path) -> None:
    assert "steps 1 to 10" in replay(ALONE, copy, 11, expect=2)
    assert "--run.digests" in replay(
        ALONE, Path(shutil.copytree(alone, copy.parent / "a")), 7, expect=2
    )
    assert "holds no run (recipe.json)" in replay(ALONE, copy / "tokenizer", 7, expect=2)


@pytest.mark.parametrize("is_killed", [False, True], ids=["went back", "killed meanwhile"])
def test_a_step_that_a_run_went_back_for_is_computed_again(
    is_killed: bool, scenes: Path, tmp_path: Path
) -> None:
    run, module = tmp_path / "run", tmp_path / "goes_back.py"
    module.write_text(GOES_BACK.replace("{is_killed}", str(is_killed)))
    words = (*WORDS, "--run.on-divergence=rewind", "--run.max-skipped=2")
    output = train(
        ALONE, run, f"--data.train={scenes / 'train'}", *words,
        module=str(module), expect=-9 if is_killed else 0,
    )  # fmt: skip
    assert f"python -m frugal.common.replay {run} --step 7 computes that step again" in output
    said = replay(ALONE, run, 7, module=str(module))
    compared = "3 steps" if is_killed else "1 steps are the same, bit for bit (of 2 between"
    assert f"steps 5 to 7 agree: samples and gradients of {compared}" in said
    assert "step 7 has loss nan and no finite gradient, on " in said
    assert ("the run went back and left it out" in said) != is_killed
    assert "1 steps are the same" in replay(ALONE, run, 5, module=str(module))
    if is_killed:
        assert f"{run} was killed while it went back" in said
        assert "of 4 steps are the same" in replay(ALONE, run, 8, module=str(module))
        said = replay(ALONE, run, 9, module=str(module), expect=2)
        assert "step 9 of" in said and "has no digest in digests.jsonl" in said
    else:
        assert "of 2 steps are the same" in replay(ALONE, run, 8, module=str(module))


def test_where_a_run_left_out_all_that_it_had_taken_nothing_is_compared(copy: Path) -> None:
    note(copy, "rewind", step=10, to=8, left_out=[9, 10])
    (copy / "digests.jsonl").write_text(json.dumps({"step": 8, "gradient": "0" * 16}) + "\n")
    said = replay(ALONE, copy, 10)
    assert "steps 9 to 10 were computed, and compared with nothing: the run went back" in said
    assert "step 10 has loss" in said and "a gradient of norm" in said
