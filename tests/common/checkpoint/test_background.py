"""Checkpoints are written beside training, survive the trainer, and outlast bad disks."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal.common.checkpoint import host_copy, writer
from frugal.common.checkpoint.background import BackgroundSaves
from frugal.common.checkpoint.store import CheckpointStore, newest_checkpoint
from frugal.common.errors import InputError
from frugal.common.history import read_history
from frugal.common.run import Run, lock_run_dir
from support import start_ranks

LOG = logging.getLogger("frugal.test")
SCRIPT = str(Path(__file__).with_name("saving_ranks.py"))
LARGE = 16_000_000
"""Numbers of a tensor whose writing takes longer than it takes to look."""


def saves_in(
    folder: Path, *, keep: int = 2, max_failures: int = 9, stall_minutes: float | None = None
) -> BackgroundSaves:
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(Run(folder, 0, 1, 0, torch.device("cpu"), LOG), keep=keep)
    return BackgroundSaves(store, max_failures=max_failures, stall_minutes=stall_minutes)


def tensors(seed: int, numbers: int = 15) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight/a": torch.randn(numbers, generator=generator),
        "weight/empty": torch.empty(0, 3),
        "buffer/count": torch.tensor(seed),
        "buffer/mask": torch.tensor([True, False, True]),
        "exp_avg/a": torch.randn(2, 3, generator=generator),
        "weight/nan": torch.full((1,), torch.nan),
    }


def save(saves: BackgroundSaves, step: int, *, numbers: int = 15, is_last: bool = False) -> None:
    saved = tensors(step, numbers)

    def fill(into: Mapping[str, Tensor]) -> None:
        for name, tensor in saved.items():
            into[name].copy_(tensor)

    saves.save(saved, fill, {"step": step}, is_last=is_last)


def newest_step(folder: Path) -> int | None:
    checkpoints = folder / "checkpoints"
    found = newest_checkpoint(checkpoints) if checkpoints.is_dir() else None
    return found.step if found else None


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_child(action: Callable[[], None]) -> int:
    """The exit code of a fork that does something; minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            logging.exception("in the child")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def writers() -> list[psutil.Process]:
    """Those that this process has started."""
    return [p for p in psutil.Process().children() if writer.__name__ in p.cmdline()]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").iterdir() if path.name[0] == "."]


def test_what_is_written_in_the_background_is_what_was_copied(tmp_path: Path) -> None:
    saves = saves_in(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(saves, step, is_last=step == 30)
    assert newest_step(tmp_path) == 30
    assert not (tmp_path / "checkpoints" / "step_000000010").exists()
    for step in (20, 30):
        folder = tmp_path / "checkpoints" / f"step_{step:09d}"
        save_file(tensors(step), tmp_path / "expected")
        (file,) = folder.glob("*.safetensors")
        assert file.read_bytes() == (tmp_path / "expected").read_bytes()
        assert len(list(folder.iterdir())) == 3
    saves.close()
    assert not leftovers(tmp_path)


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    saves = saves_in(tmp_path)
    save(saves, 10, numbers=LARGE)
    assert newest_step(tmp_path) is None  # it is being written
    save(saves, 20, numbers=LARGE)
    assert newest_step(tmp_path) == 10
    assert saves.settle()
    assert newest_step(tmp_path) == 20
    saves.close()


def test_a_run_that_goes_back_finds_what_it_had_begun_to_write_and_drops_what_is_later(
    tmp_path: Path,
) -> None:
    saves, store = saves_in(tmp_path, keep=3), saves_in(tmp_path)._store
    for step in (10, 20, 30):
        save(saves, step, numbers=LARGE if step == 30 else 15)
    assert not store.holds(30)
    saves.finish()
    assert store.holds(30) and not leftovers(tmp_path)
    store.drop_after(10)
    assert newest_step(tmp_path) == 10
    assert not store.holds(20) and not store.holds(30)
    save(saves, 20, is_last=True)
    assert newest_step(tmp_path) == 20
    saves.close()


def test_a_trainer_that_is_killed_right_after_the_copy_loses_nothing_and_is_waited_for(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def train() -> None:
        saves = saves_in(run)
        lock = lock_run_dir(run, patience=0, log=LOG)
        assert lock is not None
        saves.lock = lock.fileno()
        save(saves, 10, numbers=LARGE)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(train) == -signal.SIGKILL
    assert newest_step(run) is None
    lock = lock_run_dir(run, patience=60, log=LOG)  # as whoever continues the run
    assert lock is not None
    lock.close()
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest.step == 10
    assert newest.reader()("weight/a").equal(tensors(10, LARGE)["weight/a"])
    assert not leftovers(run)


def test_whoever_continues_a_run_is_patient_while_its_last_checkpoint_grows(
    tmp_path: Path,
) -> None:
    held = lock_run_dir(tmp_path, patience=0, log=LOG)
    assert held is not None
    file = tmp_path / "checkpoints" / ".step_000000010.abc.writing" / "tensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half")
    threading.Timer(0.5, held.close).start()
    lock = lock_run_dir(tmp_path, patience=0, log=LOG)
    assert lock is not None
    for then in (0, time.time() + 3600):  # a clock may have been set back
        os.utime(file, (then, then))
        with pytest.raises(InputError, match="is being trained by another process"):
            lock_run_dir(tmp_path, patience=0, log=LOG)
    lock.close()


@pytest.mark.parametrize(("when", "step"), [("copied", 20), ("copying", 10)])
def test_on_several_processes_only_what_all_have_copied_counts(
    tmp_path: Path, when: str, step: int
) -> None:
    (tmp_path / "run").mkdir()
    processes = start_ranks(SCRIPT, 2, tmp_path, when)
    processes.wait(timeout=120)
    run = tmp_path / "run"
    if when == "copied":
        wait_until(lambda: newest_step(run) == step)
        newest = newest_checkpoint(run / "checkpoints")
        assert newest is not None
        read = newest.reader()
        assert [read(f"weight/{rank}").unique().item() for rank in (0, 1)] == [20.0, 21.0]
    else:
        wait_until(lambda: len(read_history(run)) > 1)
        saved, line = read_history(run)
        assert saved["event"] == "saved" and saved["step"] == 10
        assert line["event"] == "checkpoint_lost" and line["step"] == 20
        # the first one too is killed where another has died, as launchers do
        assert line["reason"].endswith("ended before it was copied")
        assert newest_step(run) == step
    assert (run / "checkpoints" / "latest").read_text() == f"step_{step:09d}\n"


def saves_whose_writer_stands_still(folder: Path) -> BackgroundSaves:
    """After one checkpoint, that of step 10."""
    saves = saves_in(folder, stall_minutes=1 / 60)
    save(saves, 10, is_last=True)
    (process,) = writers()
    os.kill(process.pid, signal.SIGSTOP)
    return saves


@pytest.mark.parametrize("is_last", [False, True])
def test_a_writer_that_stands_still_is_ended_and_replaced(
    is_last: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = saves_whose_writer_stands_still(tmp_path / "run")
    begun = time.monotonic()
    save(saves, 20, is_last=is_last)  # which training would wait for, at the next one or its end
    save(saves, 30, is_last=True)
    assert 1 <= time.monotonic() - begun < 10
    assert newest_step(tmp_path / "run") == 30
    assert "the process that writes it stood still for 1 seconds and was ended" in caplog.text
    assert (checkpoint_path(tmp_path, 20)).exists() == is_last, "it is written by the trainer then"
    saves.close()
    assert not leftovers(tmp_path / "run")


@pytest.mark.parametrize("pending", [False, True], ids=["nothing to write", "something to write"])
def test_a_writer_that_stands_still_at_the_end_does_not_keep_the_run(
    pending: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = saves_whose_writer_stands_still(tmp_path / "run")
    if pending:
        save(saves, 20)
    begun = time.monotonic()
    saves.close()
    assert 1 <= time.monotonic() - begun < 10
    assert not writers() and newest_step(tmp_path / "run") == 10
    assert ("checkpoint of step 20 could not be written" in caplog.text) == pending, caplog.text


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step:09d}"


def test_a_writer_that_was_killed_is_told_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = saves_in(tmp_path)
    save(saves, 10, is_last=True)
    (process,) = writers()
    save(saves, 20)
    process.kill()
    saves.settle()
    save(saves, 30, is_last=True)
    assert newest_step(tmp_path) == 30
    told = "the process that writes it ended (exit code -9); that of step 30 takes its place"
    assert told in caplog.text or (tmp_path / "checkpoints/step_000000020").is_dir()
    saves.close()
    assert not leftovers(tmp_path)


def test_where_writers_do_not_start_the_trainer_writes_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    saves = saves_in(tmp_path)
    save(saves, 10, is_last=True)
    assert newest_step(tmp_path) == 10
    for step in (20, 30, 40):
        save(saves, step)
    saves.finish()
    assert newest_step(tmp_path) == 40
    assert caplog.text.count("training waits: processes that write them end") == 1
    saves.close()
    assert not leftovers(tmp_path)


def test_what_tells_a_trainer_to_stop_does_not_stop_its_writer(tmp_path: Path) -> None:
    saves = saves_in(tmp_path)
    save(saves, 10, numbers=LARGE)
    (process,) = writers()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    assert saves.settle()
    assert newest_step(tmp_path) == 10
    saves.close()
    assert not writers()


@pytest.mark.parametrize("lacks", ["memory", "memfd"])
def test_without_memory_to_hand_over_training_waits_and_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacks: str
) -> None:
    if lacks == "memory":
        monkeypatch.setattr(host_copy, "available_memory", lambda: 100)
    else:
        monkeypatch.delattr(os, "memfd_create")
    saves = saves_in(tmp_path)
    for step in (10, 20):
        save(saves, step)
        assert newest_step(tmp_path) == step
    assert caplog.text.count("checkpoints are written while training waits: ") == 1


def test_a_byte_that_the_disk_holds_otherwise_is_noticed(tmp_path: Path) -> None:
    memory = os.memfd_create("test")
    os.write(memory, bytes(range(256)) * 40_000)
    process = writer.Writer(memory, 0, 1, requests=0)
    path = tmp_path / "file"
    process._copy_to(path)
    process._read_back(path)
    with path.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"X")
    with pytest.raises(OSError, match="file reads back differently"):
        process._read_back(path)
    os.close(memory)


def test_memory_that_is_there_is_seen() -> None:
    assert 1 << 20 < host_copy.available_memory() < 1 << 50


# Bad disks: in a process with mounts of its own, which end with it.


def mounted(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def mount_apart(folder: Path, size: str) -> None:
    """Mount a disk that this process, and what it starts, has for itself."""
    new_namespace = 0x00020000  # CLONE_NEWNS; os.unshare came with Python 3.12
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    mounted("mount", "--make-rprivate", "/")
    mounted("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small file system can be mounted."""

    if in_child(lambda: mount_apart(tmp_path, "1m")):
        pytest.skip("nothing can be mounted here: it takes root, in a container CAP_SYS_ADMIN")
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def on_disk(disk: Path, action: Callable[[Path], None], log: Path) -> str:
    """Do something in a process with a disk of 4 MiB; what it logged."""

    def act() -> None:
        handler = logging.FileHandler(log)
        LOG.addHandler(handler)
        mount_apart(disk, "4m")
        action(disk)

    code = in_child(act)
    said = log.read_text()
    assert code == 0, said
    return said


def test_a_full_disk_is_waited_out_while_training_goes_on(disk: Path, tmp_path: Path) -> None:
    def train(folder: Path) -> None:
        saves = saves_in(folder / "run")
        save(saves, 10, numbers=250_000)  # a MiB
        assert saves.settle()
        (folder / "junk").write_bytes(bytes(5 << 19))
        started = time.monotonic()
        save(saves, 20, numbers=250_000)
        assert not saves.settle()
        save(saves, 30, numbers=250_000)
        assert newest_step(folder / "run") == 10
        assert time.monotonic() - started < 5
        (folder / "junk").unlink()
        wait_until(lambda: newest_step(folder / "run") == 30, 10)
        assert saves.settle()
        save(saves, 40, numbers=250_000, is_last=True)
        assert [path.name[-2:] for path in (folder / "run/checkpoints").glob("step_*")]
        assert not leftovers(folder / "run")
        saves.close()

    said = on_disk(disk, train, tmp_path / "log")
    assert "the checkpoint of step 20 could not be written" in said
    assert "No space left on device (" in said and "MiB are free there, 1.0 MiB are needed" in said
    assert "training goes on, older checkpoints are untouched, and it is tried again in 1 s" in said
    assert "that of step 30 takes its place" in said


def test_a_disk_that_may_not_be_written_stops_a_run_only_after_enough_attempts(
    disk: Path, tmp_path: Path
) -> None:
    def train(folder: Path) -> None:
        saves = saves_in(folder / "run", max_failures=2)
        save(saves, 10, is_last=True)
        mounted("mount", "-o", "remount,ro", str(folder))
        save(saves, 20)
        assert not saves.settle()
        save(saves, 30)  # one attempt failed so far
        wait_until(lambda: saves.poll() or saves._writer.failures == 2, 10)
        try:
            save(saves, 40)
        except InputError as error:
            LOG.warning("%s", error)
        assert newest_step(folder / "run") == 10
        saves.close()

    said = on_disk(disk, train, tmp_path / "log")
    assert "step 20 could not be written" in said and "Read-only file system" in said
    assert "step 30 could not be written" in said
    assert "2 attempts in a row failed, and run.max_failed_saves is 2" in said


def test_a_mount_that_vanishes_is_not_replaced_by_what_lies_below_it(
    disk: Path, tmp_path: Path
) -> None:
    def train(folder: Path) -> None:
        real = folder / "real"
        place = folder / "mount"
        real.mkdir()
        place.mkdir()
        mounted("mount", "--bind", str(real), str(place))
        saves = saves_in(place / "run")
        save(saves, 10, is_last=True)
        mounted("umount", "-l", str(place))
        save(saves, 20)
        assert not saves.settle()
        assert not list(place.iterdir())
        mounted("mount", "--bind", str(real), str(place))
        wait_until(lambda: newest_step(place / "run") == 20, 10)
        saves.close()

    said = on_disk(disk, train, tmp_path / "log")
    assert "step 20 could not be written" in said and "No such file or directory" in said


def test_the_last_checkpoint_has_some_attempts_and_then_it_is_a_sentence(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path) -> None:
        saves = saves_in(folder / "run")
        save(saves, 10, is_last=True)
        mounted("mount", "-o", "remount,ro", str(folder))
        with pytest.raises(InputError, match=r"step 20 could not .*; older checkpoints are unt"):
            save(saves, 20, is_last=True)
        mounted("mount", "-o", "remount,rw", str(folder))
        save(saves, 20, is_last=True)
        assert newest_step(folder / "run") == 20
        saves.close()

    said = on_disk(disk, train, tmp_path / "log")
    # not behind the last of four attempts, and no training goes on
    assert said.count("it is tried again") == 3 and "training goes on" not in said


def test_a_killed_trainer_of_a_full_disk_leaves_no_half_of_a_checkpoint(
    disk: Path, tmp_path: Path
) -> None:
    def train(folder: Path) -> None:
        run = folder / "run"

        def killed() -> None:
            saves = saves_in(run)
            save(saves, 10, numbers=250_000, is_last=True)
            (folder / "junk").write_bytes(bytes(5 << 19))
            save(saves, 20, numbers=250_000)
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(killed) == -signal.SIGKILL
        wait_until(lambda: len(read_history(run)) > 1, 30)
        assert read_history(run)[1]["event"] == "checkpoint_lost"
        assert "No space left" in read_history(run)[1]["reason"]
        assert newest_step(run) == 10 and not leftovers(run)

    on_disk(disk, train, tmp_path / "log")


def test_a_process_that_was_forked_meanwhile_keeps_no_writer_from_its_end(tmp_path: Path) -> None:
    """As loader processes are, which outlive the loop of a run."""
    saves = saves_in(tmp_path / "run")
    save(saves, 1)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        ended = threading.Thread(target=lambda: (saves.finish(), saves.close()), daemon=True)
        ended.start()
        ended.join(timeout=30)
        assert not ended.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert newest_step(tmp_path / "run") == 1
