import itertools
import json
from collections import Counter

import pytest

from frugal.common.data.damage import Damaged
from frugal.common.data.patterns import find_streams
from frugal.common.data.resampled import ShardDraws
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.errors import InputError

SHARDS = [5, 3, 9, 1, 4, 6]


def take(stream, count):
    return list(itertools.islice(stream, count))


def rows(batches):
    found = {}
    for batch in batches:
        for row, number in enumerate(batch.sample_numbers.tolist()):
            found[number] = (batch.keys[row], batch.images[row].numpy().tobytes())
    return found


@pytest.fixture
def open_resampled(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "d", SHARDS)

    def make(**options):
        pipe = f"pipe:cat {tmp_path}/d/{{00000..00005}}.tar"
        options = {"batch_size": 8, "resampled_samples": 28, "shuffle_shards": 4} | options
        return open_stream(pipe, **options)

    return make


def test_pipes_are_streamed_with_replacement(tmp_path, open_resampled):
    stream = open_resampled()
    assert stream.epoch_samples == 28
    batches = take(stream, 60)
    assert all(batch.valid.all() and not batch.damage for batch in batches)
    numbers = [number for batch in batches for number in batch.sample_numbers.tolist()]
    assert numbers == list(range(480))
    counts = Counter(key for batch in batches for key in batch.keys)
    assert len(counts) == 28  # every sample of every shard
    first = batches[0].keys[0]
    assert first.startswith(f"pipe:cat {tmp_path}/d/0000")
    for batch in batches:
        for key, ids in zip(batch.keys, batch.token_ids.tolist(), strict=True):
            assert ids[0] - 3 == int(key[-9:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_resumed_run_sees_what_it_would_have_seen(open_resampled, workers, stop):
    whole = rows(take(open_resampled(workers=workers), 16))
    interrupted = open_resampled(workers=workers)
    seen = rows(take(interrupted, stop))
    state = json.loads(json.dumps(interrupted.state()))
    resumed = open_resampled(workers=workers, first_sample=8 * stop, state=state)
    assert seen | rows(take(resumed, 16 - stop)) == whole
    # and once more, from a checkpoint of the resumed run
    state = json.loads(json.dumps(resumed.state()))
    again = open_resampled(workers=workers, first_sample=8 * 16, state=state)
    longer = rows(take(open_resampled(workers=workers), 20))
    assert rows(take(again, 4)) == {n: row for n, row in longer.items() if n >= 8 * 16}


def test_ranks_and_seeds_draw_other_shards(open_resampled):
    def keys(**options):
        return [key for batch in take(open_resampled(**options), 12) for key in batch.keys]

    one, two = (keys(rank=rank, world_size=2) for rank in (0, 1))
    assert one != two and keys(seed=1) != keys(seed=0) and keys(seed=1) == keys(seed=1)


def test_another_number_of_ranks_draws_afresh(open_resampled):
    # without a state that fits, the draws of the beginning do not come again
    keys = [k for b in take(open_resampled(), 8) for k in b.keys]
    later = [k for b in take(open_resampled(first_sample=64), 8) for k in b.keys]
    assert keys != later


def test_damaged_shards_cost_one_slot_each_and_end_no_run(tmp_path, write_pairs, open_stream):
    paths = write_pairs(tmp_path / "d", [4, 4, 4])
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[: len(content) // 3])
    paths[2].write_bytes(b"<html>busy</html>" * 100)
    pipe = f"pipe:cat {tmp_path}/d/{{00000..00003}}.tar 2>/dev/null"
    stream = open_stream(pipe, batch_size=8, resampled_samples=100, workers=1)
    damage = Counter()
    read = trained = 0
    for batch in take(stream, 30):
        damage.update(batch.damage)
        read, trained = read + len(batch), trained + int(batch.valid.sum())
    assert damage.keys() == {"truncated", "unreadable"}
    assert trained + damage.total() == read
    assert damage["unreadable"] > damage["truncated"] > 0


@pytest.mark.parametrize("scheme", ["{}", "file:{}", "pipe:cat {}", "pipe:gzip -c {}"])
def test_a_tar_is_streamed_whole(tmp_path, write_pairs, scheme):
    (path,) = write_pairs(tmp_path, [3])
    samples = list(stream_tar(scheme.format(path)))
    assert [key.rpartition("/")[2] for key, _ in samples] == [f"{n:09d}" for n in range(3)]
    assert all(members.keys() == {"jpg", "txt", "json"} for _, members in samples)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.35, 0.5, 0.8])
def test_a_tar_cut_anywhere_ends_in_one_damaged_sample(tmp_path, write_pairs, part):
    (path,) = write_pairs(tmp_path, [6])
    whole = dict(stream_tar(str(path)))
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end[: int(part * len(end))])
    *sound, last = stream_tar(str(path))
    assert isinstance(last[1], Damaged)
    assert last[1].kind == ("truncated" if sound or part else "unreadable")
    assert all(whole[key] == members for key, members in sound)


def test_a_command_that_fails_is_one_damaged_sample():
    for url in ("pipe:exit 3", "pipe:cat /no/such/file 2>/dev/null", "/no/such/file"):
        ((key, damaged),) = stream_tar(url)
        assert key == url and damaged.kind == "unreadable"


def test_sources_are_drawn_in_their_shares():
    draws = ShardDraws([["a1", "a2", "a3"], ["b"]], [1.0, 3.0], seed=0)
    counts = Counter(draws.url("0/0/0/0", draw) for draw in range(4000))
    assert abs(counts["b"] - 3000) < 120  # four standard deviations are 110
    assert all(abs(counts[name] - 333) < 75 for name in ("a1", "a2", "a3"))
    even = ShardDraws([["a1", "a2", "a3"], ["b"]], [], seed=0)
    counts = Counter(even.url("0/0/0/0", draw) for draw in range(4000))
    assert all(abs(counts[name] - 1000) < 110 for name in ("a1", "a2", "a3", "b"))


def test_only_tars_can_be_resampled(tmp_path):
    (tmp_path / "0.tfrecord").write_bytes(b"x")
    with pytest.raises(InputError, match=r"0\.tfrecord is no tar"):
        find_streams(str(tmp_path))
    assert find_streams("s3://b/{0..2}.tar") == ["s3://b/0.tar", "s3://b/1.tar", "s3://b/2.tar"]


def test_what_is_passed_over_in_streams_is_told_once(
    tmp_path, write_tar, pair, open_stream, caplog
):
    members = [m for number in range(4) for m in (*pair(number), (f"._{number}.jpg", b"mac"))]
    path = write_tar(tmp_path / "0.tar", members)
    take(open_stream(f"pipe:cat {path}", batch_size=4, resampled_samples=4), 5)
    (told,) = [line for line in caplog.messages if "hidden members" in line]
    assert "._0.jpg" in told
