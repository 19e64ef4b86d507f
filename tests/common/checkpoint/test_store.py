"""Checkpoints on disk: whole or not there, verified, and refused with a sentence when damaged."""

import json
import logging
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.checkpoint import store as store_module
from frugal.common.checkpoint.store import (
    CheckpointStore,
    find_checkpoint,
    load_weights,
    open_checkpoint,
    owners,
    save_weights,
)
from frugal.common.errors import InputError
from frugal.common.run import Run


def store_in(folder: Path, *, keep: int = 2) -> CheckpointStore:
    run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
    return CheckpointStore(run, keep=keep)


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight/a": torch.randn(5, 3, generator=generator),
        "exp_avg/a": torch.randn(5, 3, generator=generator),
        "weight/nan": torch.full((1,), torch.nan),
    }


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(tensors(step), {"step": step})


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 7)
    checkpoint = store.newest()
    assert checkpoint is not None
    assert checkpoint.step == 7
    read = checkpoint.reader()
    for name, tensor in tensors(7).items():
        assert read(name).equal(tensor) or tensor.isnan().all()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(store, step)
    assert [folder.name for folder in store.whole()] == ["step_000000020", "step_000000030"]


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    half = tmp_path / "checkpoints" / ".step_000000020.writing"
    half.mkdir()
    (half / "tensors-00000-of-00001.safetensors").write_bytes(b"half")
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10
    save(store, 20)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 20
    assert not half.exists()


def test_a_crash_between_rename_and_pointer_loses_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.unlink()
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    store = store_in(tmp_path)
    file = save(store, 10) / "tensors-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[-3] ^= 1
        file.write_bytes(content)
    with pytest.raises(InputError, match=file.name):
        store.newest()


def test_removing_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    newer = save(store, 20)
    for file in newer.iterdir():
        file.unlink()
    newer.rmdir()
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


def test_another_format_is_refused(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    path = save(store, 10) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        store.newest()


def test_a_run_a_folder_of_checkpoints_and_one_step_all_name_a_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    step = save(store, 20)
    assert find_checkpoint(tmp_path).step == 20
    assert find_checkpoint(tmp_path / "checkpoints").step == 20
    assert find_checkpoint(step).step == 20
    with pytest.raises(InputError, match="elsewhere does not exist"):
        find_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_failure_to_write_leaves_older_checkpoints_alone(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)

    def lose_the_folder(value: Any) -> list[Any]:
        shutil.rmtree(tmp_path / "checkpoints" / ".step_000000020.writing", ignore_errors=True)
        return [value]

    with pytest.raises(InputError, match="step 20 could not be written"):
        store.save(tensors(20), {"step": 20}, gather=lose_the_folder)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


def test_writing_is_spread_evenly_and_every_name_has_one_owner() -> None:
    sizes = {f"p{n}": (n * 37) % 101 + 1 for n in range(50)}
    owner = owners(sizes.items(), 4)
    assert owner.keys() == sizes.keys()
    load = [sum(sizes[name] for name in sizes if owner[name] == rank) for rank in range(4)]
    assert max(load) - min(load) <= max(sizes.values())
    assert owners(reversed(sizes.items()), 4) == owner


def test_weights_alone_are_a_checkpoint_to_start_from_but_not_to_continue(tmp_path: Path) -> None:
    weights = {"a": torch.randn(5, 3), "b": torch.tensor(2.0)}
    folder = save_weights(tmp_path / "checkpoints", weights, step=380_000)
    assert folder == tmp_path / "checkpoints" / "step_000380000"
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.step == 380_000
    found = load_weights(checkpoint)
    assert found.keys() == weights.keys()
    assert all(found[name].equal(value) for name, value in weights.items())
    with pytest.raises(InputError, match="which no run can continue"):
        store_in(tmp_path).newest()


@pytest.mark.parametrize("row", [0, 700, 999])
def test_a_large_tensor_that_was_written_wrongly_is_noticed_in_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    tensor = torch.randn(1000, 10)
    wrong = tensor.clone()
    wrong[row, 3] += 1
    monkeypatch.setattr(store_module, "_READ_BACK", 1 << 12)

    def write_wrongly(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(dict.fromkeys(tensors, wrong), path)

    monkeypatch.setattr(store_module, "save_file", write_wrongly)
    with pytest.raises(InputError, match="weight/a reads back differently"):
        save_weights(tmp_path / "checkpoints", {"a": tensor}, step=1)
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["cut state", "no state", "missing file", "deep state"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_that_is_told(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    state = save(store, 20) / "state.json"
    if damage == "no state":
        state.unlink()
    elif damage == "missing file":
        (state.parent / "tensors-00000-of-00001.safetensors").unlink()
    else:
        cut = state.read_text()[:40]
        state.write_text(cut if damage == "cut state" else "[" * 100_000)
    for found in (store.newest(), find_checkpoint(tmp_path)):
        assert found is not None
        assert found.step == 10
    assert "step_000000020" in caplog.text and "taking" in caplog.text
    with pytest.raises(InputError):  # asked for by name, nothing else will do
        find_checkpoint(state.parent / "state.json" if damage == "no state" else state.parent)


@pytest.mark.parametrize("content", [bytes(range(128, 255)), b"", b"../../etc", b"step\0x", b"\n"])
def test_a_pointer_to_nothing_is_no_reason_to_stop(tmp_path: Path, content: bytes) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 10


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a checkpoint", "link to nothing"])
def test_a_pointer_that_is_no_file_is_told_where_it_is_read_and_written(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path)
    pointer = tmp_path / "checkpoints" / "latest"
    target = save(store, 10)
    pointer.unlink()
    if kind == "folder":
        pointer.mkdir()
        (pointer / "kept").touch()
    elif kind == "pipe":
        os.mkfifo(pointer)
    else:
        pointer.symlink_to(target if kind == "link to a checkpoint" else tmp_path / "nothing")
    newest = store.newest()
    assert newest is not None and newest.step == 10
    assert f"{pointer} cannot be read (" in caplog.text
    if kind == "folder":
        with pytest.raises(InputError, match="a folder has that name: remove it"):
            save(store, 20)
        assert (pointer / "kept").exists()
    else:
        save(store, 20)
        assert pointer.read_text() == "step_000000020\n" and not pointer.is_symlink()
        assert open_checkpoint(target).step == 10, "what it led to is as it was"


def test_where_all_checkpoints_are_damaged_each_is_named(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=3)
    files = [save(store, step) / "tensors-00000-of-00001.safetensors" for step in (10, 20, 30)]
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(b"x" * files[2].stat().st_size)
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole: ") as refusal:
        store.newest()
    said = str(refusal.value)
    assert f"{files[2]} was altered" in said and f"{files[1]} has 0 bytes" in said
    assert f"{files[0]} is missing" in said and "older checkpoint" not in said


def test_a_copy_that_somebody_keeps_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=1)
    kept = tmp_path / "checkpoints" / "step_000000010_backup"
    shutil.copytree(save(store, 10), kept)
    (tmp_path / "checkpoints" / "latest").unlink()
    newest = store.newest()
    assert newest is not None and newest.folder.name == "step_000000010"
    save(store, 20)
    assert [folder.name for folder in store.whole()] == ["step_000000020"]
    assert open_checkpoint(kept).step == 10


@pytest.mark.parametrize("fits", ["nothing", "the tensors"])
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(tmp_path: Path, fits: str) -> None:
    """In a process whose files may not grow beyond some bytes."""
    (written,) = save(store_in(tmp_path), 10).glob("*.safetensors")
    bytes_allowed = 0 if fits == "nothing" else written.stat().st_size
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, bytes_allowed))
        try:
            state = {"step": 20, "long": "x" * 1000}
            store_in(tmp_path).save(tensors(20), state)
        except InputError as error:
            told = "step 20 could not be written" in str(error)
            os._exit(7 if told and "older checkpoints are untouched" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    newest = store_in(tmp_path).newest()
    assert newest is not None
    assert newest.step == 10
    assert not [f for f in (tmp_path / "checkpoints").iterdir() if f.name.startswith(".")]


def test_a_folder_that_cannot_be_made_stops_every_process_alike(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return ["", value]

    with pytest.raises(InputError, match="could not be written"):
        store_in(tmp_path).save(tensors(1), {"step": 1}, gather=gather)
    assert len(asked) == 1  # the others are told instead of left waiting


def test_going_back_forgets_a_best_checkpoint_that_is_dropped(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for step in (4, 8):
        save(store, step)
    assert store.note_best(8, "top1", 0.5)
    store.drop_after(4)
    save(store, 8)  # of other weights now
    assert store.note_best(8, "top1", 0.4)


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_written_last_stays_though_later_checkpoints_are_damaged(
    tmp_path: Path, keep: int
) -> None:
    store = store_in(tmp_path, keep=3)
    for step in (10, 20, 30):
        damaged = save(store, step) / "tensors-00000-of-00001.safetensors"
        if step > 10:
            damaged.write_bytes(damaged.read_bytes()[:-1])
    store = store_in(tmp_path, keep=keep)
    for step in (11, 12):  # of a run that went on from step 10
        save(store, step)
        newest = store.newest()
        assert newest is not None and newest.step == step
    assert len([f for f in store.whole() if f.name < "step_000000020"]) == keep
    save(store, 20)  # what is taken once more takes the place of what is damaged
    newest = store.newest()
    assert newest is not None and newest.step == 20


@pytest.mark.parametrize("change", ["remove_old", "replace", "drop_after"])
def test_who_is_killed_while_a_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, keep=1)
    save(store, 10)
    killed_at: list[str] = []

    def unlink_one_and_die(folder: Path, **_: Any) -> None:
        if Path(folder).is_dir():
            next(iter(Path(folder).iterdir())).unlink()
            killed_at.append(Path(folder).name)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if change == "drop_after":
            save(store_in(tmp_path, keep=3), 20)
        patch.setattr(shutil, "rmtree", unlink_one_and_die)
        if change == "drop_after":
            store.drop_after(10)
        save(store, 10 if change == "replace" else 20)
    assert killed_at
    folders = [folder for folder in store.folder.glob("step_*") if folder.is_dir()]
    assert folders
    for folder in folders:
        assert open_checkpoint(folder).folder == folder
    save(store, 30)
    assert sorted(f.name for f in store.folder.iterdir()) == ["latest", "step_000000030"]
