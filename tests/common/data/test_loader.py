"""What is waited for has a limit, what is lost is told, and nothing is left behind."""

import errno
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from frugal.common.data import loader as loader_module
from frugal.common.data.damage import DamageCounter, Damaged, note_of, warning
from frugal.common.data.loader import Loader
from frugal.common.data.stores.streamed_tar import ShardSizes, stream_tar
from frugal.common.data.stores.url import Patience, UrlStream
from frugal.common.errors import InputError


class Numbers(Dataset):
    """Rows of ones; what happens at a row is the test's."""

    def __init__(self, happens=None) -> None:
        self.happens = happens or (lambda row: None)

    def __getitem__(self, row):
        self.happens(row)
        return {"row": row, "images": torch.full((2, 3), row), "views": [torch.ones(row + 1)]}


def commands(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]


def wait_until(true, seconds=10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_command_that_gives_nothing_is_given_up_and_ended_with_its_children() -> None:
    stream = UrlStream("pipe:sleep 54320 | cat; echo", Patience(0.4))
    wait_until(lambda: commands("54320"))
    with pytest.raises(TimeoutError, match="nothing has come for"):
        stream.read(10)
    stream.close()
    wait_until(lambda: not commands("54320"))


def test_a_command_ends_with_the_process_that_reads_it_however_that_ends() -> None:
    child = os.fork()
    if not child:
        UrlStream("pipe:sleep 54321 | cat; echo", Patience(60.0))
        time.sleep(60)
    wait_until(lambda: commands("54321"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: not commands("54321"))


def test_a_shard_that_hangs_is_damage_and_nothing_at_all_is_a_sentence() -> None:
    patience = Patience(0.4)
    ((key, damaged),) = stream_tar("pipe:sleep 54322", patience=patience)
    assert key == "pipe:sleep 54322"
    assert damaged.kind == "unreadable" and "nothing has come for" in damaged.detail
    with pytest.raises(InputError, match=r"from pipe:sleep 54322 .*--data\.timeout-minutes"):
        list(stream_tar("pipe:sleep 54322", patience=patience))


def test_who_waits_says_for_what(monkeypatch, caplog) -> None:
    monkeypatch.setattr("frugal.common.data.stores.url._FIRST_WARNING", 0.1)
    list(stream_tar("pipe:sleep 54323", patience=Patience(0.6)))
    assert "waiting for pipe:sleep 54323" in caplog.text


def test_the_exit_status_of_a_command_is_checked_and_named(tmp_path, write_pairs) -> None:
    (path,) = write_pairs(tmp_path, [3])
    *sound, (key, damaged) = stream_tar(f"pipe:cat {path}; echo no quota >&2; exit 3")
    assert len(sound) == 3 and not any(isinstance(s, Damaged) for _, s in sound)
    assert key.startswith("pipe:cat")
    assert damaged.detail == "the command ended with exit status 3: no quota"
    ((_, damaged),) = stream_tar("pipe:cat /no/such/file")
    assert "exit status 1: cat: /no/such/file: No such file" in damaged.detail


def test_a_shard_that_ends_early_counts_as_its_samples(tmp_path, write_pairs) -> None:
    cut, whole = write_pairs(tmp_path, [10, 10])
    content = cut.read_bytes()
    sizes = ShardSizes()
    pipe = f"pipe:cat {cut}"

    def lost() -> tuple[int, int, str]:
        *sound, (_, damaged) = stream_tar(pipe, sizes=sizes)
        return len(sound), damaged.lost, damaged.detail

    cut.write_bytes(content[: len(content) // 3])
    read, behind, detail = lost()
    assert behind == 0 and "nobody knows how many" in detail
    list(stream_tar(str(whole), sizes=sizes))
    assert lost()[:2] == (read, 10 - read - 1)
    cut.write_bytes(content)
    list(stream_tar(pipe, sizes=sizes))
    cut.write_bytes(content[: len(content) // 3])
    assert lost()[:2] == (read, 10 - read - 1) and "it held 10" in lost()[2]
    cut.unlink()
    assert lost()[:2] == (0, 9)


def test_tars_one_after_the_other_are_one_stream_and_bytes_behind_them_are_told(
    tmp_path, write_pairs
) -> None:
    first, second = write_pairs(tmp_path, [2, 3])
    joined = list(stream_tar(f"pipe:cat {first} {second}"))
    assert len(joined) == 5 and not any(isinstance(sample, Damaged) for _, sample in joined)
    *sound, (_, damaged) = stream_tar(f"pipe:cat {first}; head -c 512 /dev/zero | tr '\\0' x")
    assert len(sound) == 2 and "behind the end-of-archive marker" in damaged.detail


def test_damage_travels_with_the_batch_with_its_place_reason_and_source(
    tmp_path, write_pairs, open_stream
) -> None:
    good, bad = write_pairs(tmp_path, [8, 4])
    data = bytearray(bad.read_bytes())
    open_stream(good, bad)  # indexes them
    data[512:600] = bytes(88)  # the first image, now of another checksum
    bad.write_bytes(data)
    batch = next(iter(open_stream(good, bad, batch_size=12, workers=1)))
    (note,) = batch.damage_notes
    assert (note.kind, note.source) == ("checksum", 1) and note.key.startswith(str(bad))
    assert batch.sources == {0: 8, 1: 3}
    assert batch.damage == {"checksum": 1}
    assert batch.rows(0, 3).damage_notes == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_always_fails_is_seen_by_its_share(
    tmp_path, write_pairs, open_stream, workers
) -> None:
    (good,) = write_pairs(tmp_path, [20])
    names = (f"pipe:cat {good}", "pipe:echo out of order >&2; exit 7")
    stream = open_stream(*names, batch_size=16, resampled_samples=64, workers=workers)
    counter = DamageCounter(0.5)
    for batch, _ in zip(stream, range(4), strict=False):
        notes, sources = batch.damage_notes, batch.sources
        counter.add(batch.damage, len(batch), notes=notes, sources=sources)
    assert counter.shares() == {0: 1.0, 1: 0.0}
    (note,) = counter.notes.values()
    told = warning(note, names)
    assert names[1] in told and "exit status 7: out of order" in told
    assert f"{names[1]}: {counter.damaged + counter.lost} damaged, 0.0%" in counter.describe(names)


def test_damage_counters_of_processes_add_up_and_survive_a_checkpoint() -> None:
    total, other = DamageCounter(0.1), DamageCounter(0.1)
    note = note_of("a.tar/1", Damaged("truncated", "cut <_io.BytesIO object at 0x7f00>", lost=40))
    other.add({"truncated": 1}, 300, notes=[note], sources={0: 299})
    assert total.add_counter(other) == [note] and total.add_counter(other) == []
    assert note.detail == "cut"
    assert (total.read, total.damaged, total.lost) == (600, 2, 80)
    assert total.is_too_much  # 82 of 680, though 2 of 600 slots
    again = DamageCounter(0.1)
    again.load_state(total.state())
    assert again.state() == total.state()
    again.load_state({"read": 5, "kinds": {"image": 1}})  # of an older version
    assert again.state() == {"read": 5, "kinds": {"image": 1}}


def test_a_loader_process_that_is_killed_is_one_sentence() -> None:
    rows = iter(Loader(Numbers(lambda row: time.sleep(row > 4)), sampler=range(9), workers=2))
    next(rows)
    children = sorted(psutil.Process().children(), key=lambda child: child.pid)
    victim = [child for child in children if child.status() != psutil.STATUS_ZOMBIE][-1]
    victim.kill()
    sentence = rf"loader process 2 of 2 \(pid {victim.pid}\) was ended by SIGKILL.*workers 0"
    with pytest.raises(InputError, match=sentence):
        list(rows)


def test_the_rest_comes_from_this_process_where_that_is_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    numbers = Numbers(lambda row: time.sleep(row > 4 and get_worker_info() is not None))
    rows = iter(Loader(numbers, sampler=range(9), workers=2, finishes_alone=True))
    first = next(rows)
    children = sorted(psutil.Process().children(), key=lambda child: child.pid)
    [child for child in children if child.status() != psutil.STATUS_ZOMBIE][-1].kill()
    rest = list(rows)
    assert [row["row"] for row in (first, *rest)] == list(range(9))
    assert all(row["images"].eq(row["row"]).all() for row in rest)
    assert "ends" not in first and "was ended by SIGKILL" in rest[-1]["ends"]
    assert "reading in this process until the run ends" in caplog.text


class StartingWith:
    """A sampler that is first asked when loader processes have been started; what happens then."""

    def __init__(self, happens) -> None:
        self.happens = happens

    def __iter__(self):
        # a set gives them in any order
        started = sorted(multiprocessing.active_children(), key=lambda child: child.pid)
        self.happens(started)
        yield from range(10_000)


def test_a_loader_process_that_is_killed_amid_the_start_is_one_sentence() -> None:
    def kill(started) -> None:
        os.kill(started[0].pid, signal.SIGKILL)
        started[0].join(9)

    began = time.monotonic()
    with pytest.raises(InputError, match=r"loader process 1 of 2 .* was ended by SIGKILL"):
        list(Loader(Numbers(), sampler=StartingWith(kill), workers=2))
    assert time.monotonic() - began < 20


def test_a_start_that_fails_leaves_no_loader_process_behind() -> None:
    children = []

    def fail(started) -> None:
        children.extend(started)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match=r"cannot be started \(.*No space left"):
        list(Loader(Numbers(), sampler=StartingWith(fail), workers=2))
    assert len(children) == 2
    wait_until(lambda: not any(child.is_alive() for child in children), seconds=3)


@pytest.mark.slow
def test_loader_processes_that_give_nothing_are_given_up_and_leave_nobody_behind() -> None:
    rows = Loader(Numbers(lambda row: time.sleep(600)), sampler=range(4), workers=2, limit=-29.0)
    before = set(psutil.Process().children())
    with pytest.raises(InputError, match="gave nothing for"):
        list(rows)
    left = set(psutil.Process().children()) - before
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


def test_signals_for_the_whole_group_leave_loader_processes_at_work() -> None:
    def signaled(row: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    rows = [fields["row"] for fields in Loader(Numbers(signaled), sampler=range(4), workers=1)]
    assert rows == [0, 1, 2, 3]


@pytest.mark.parametrize("what", ["memory", "files"])
def test_without_room_in_shared_memory_data_comes_through_pipes(what, monkeypatch, caplog) -> None:
    caplog.set_level(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if what == "memory":
        monkeypatch.setattr(loader_module, "SHARED_MEMORY", "/no/such/place")
    else:
        open_now = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard))
    try:
        found = list(Loader(Numbers(), sampler=range(5), workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [fields["row"] for fields in found] == [0, 1, 2, 3, 4]
    for row, fields in enumerate(found):
        assert fields["images"].equal(torch.full((2, 3), row))
        assert [view.shape for view in fields["views"]] == [(row + 1,)]
    (record,) = caplog.records
    said = record.getMessage()
    assert ("ulimit -n" if what == "files" else "/no/such/place has 0 bytes free") in said
    assert "--data.workers 0" in said


def test_a_loader_process_that_took_a_lock_along_does_not_hold_up_the_end(monkeypatch) -> None:
    monkeypatch.setattr(loader_module, "_GRACE", 0.3)
    items, processes = loader_module._start(Loader(Numbers(), sampler=range(9), workers=1)._loader)
    next(items)
    lock = items._workers_done_event._cond
    assert lock.acquire(timeout=9)  # as where it was killed while it asked whether it may end
    os.kill(processes[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with loader_module._ended_afterwards(items, processes):
        pass
    assert time.monotonic() - started < 5
    lock.release()


def test_loader_processes_hear_that_they_may_end_before_they_are_killed() -> None:
    items, processes = loader_module._start(Loader(Numbers(), sampler=range(99), workers=2)._loader)
    next(items)
    with loader_module._ended_afterwards(items, processes):
        pass
    assert [process.exitcode for process in processes] == [0, 0]


ENDS_BADLY = """
import sys
from frugal.common.data.loader import Loader

sys.path.insert(0, {tests!r})
from test_loader import Numbers

rows = iter(Loader(Numbers(), sampler=range(99), workers=1))
kept = next(rows), rows
raise KeyError("nobody expected this")
"""
"""A process that ends with a stack trace, whose loader is there up to the interpreter's end."""


def test_a_process_that_ends_with_an_error_does_not_wait_for_its_loader() -> None:
    code = ENDS_BADLY.format(tests=str(Path(__file__).parent))
    path = os.pathsep.join(sys.path)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "KeyError: 'nobody expected this'" in process.stderr


def test_too_many_open_files_are_no_damage(tmp_path, write_pairs, open_stream) -> None:
    (path,) = write_pairs(tmp_path, [4])
    stream = open_stream(path, batch_size=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(InputError, match=r"too many files are open.*ulimit -n"):
            next(iter(stream))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_url_that_nothing_can_read_is_refused_at_the_start(open_stream) -> None:
    with pytest.raises(InputError, match=r"s3://bucket/0\.tar.*pipe:aws s3 cp"):
        open_stream("s3://bucket/{0..3}.tar", resampled_samples=10)
