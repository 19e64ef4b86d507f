import itertools
import json
import logging
import os
import pickle
import resource
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from frugal.common.data.config import PairData
from frugal.common.data.damage import DamageCounter, Damaged
from frugal.common.data.sample_transform import SampleTransform
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index, open_source
from frugal.common.data.stores.index import find_index
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.stream import ReaderCache
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.errors import InputError
from frugal.common.ports import free_port
from frugal.common.randomness import sample_generator
from frugal.common.recipe_json import from_json, to_json

SHARDS = [5, 3, 9, 1, 4]  # 22 samples


def take(stream, count):
    return list(itertools.islice(stream, count))


def rows(batches):
    """Everything that belongs to a sample, by its number."""
    found = {}
    for batch in batches:
        for row, number in enumerate(batch.sample_numbers.tolist()):
            assert number not in found
            found[number] = (
                batch.keys[row],
                batch.images[row].numpy().tobytes(),
                batch.token_ids[row].tolist(),
                int(batch.text_lengths[row]),
                bool(batch.valid[row]),
            )
    return found


def test_every_sample_is_delivered_exactly_once_per_epoch(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "d", SHARDS)
    stream = open_stream(tmp_path / "d", batch_size=11, shuffle_shards=2)
    assert stream.epoch_samples == 22
    for _ in range(3):
        keys = [key for batch in take(stream, 2) for key in batch.keys]
        assert len(keys) == len(set(keys)) == 22
    epochs = take(stream, 6)
    assert sorted(k for b in epochs[:2] for k in b.keys) == sorted(
        k for b in epochs[4:] for k in b.keys
    )
    assert [k for b in epochs[:2] for k in b.keys] != [k for b in epochs[4:] for k in b.keys]


def test_a_batch_holds_what_the_shard_holds(tmp_path, write_pairs, open_stream, pair):
    write_pairs(tmp_path / "d", SHARDS)
    batch = take(open_stream(tmp_path / "d", batch_size=22, augmentation=CenterCrop()), 1)[0]
    assert batch.images.shape == (22, 3, 16, 24) and batch.images.dtype == torch.uint8
    assert batch.valid.all() and batch.damage == {}
    for row, key in enumerate(batch.keys):
        shard, _, name = key.rpartition("/")
        assert shard.startswith(str(tmp_path / "d"))
        number = int(name)
        expected = CenterCrop().decode(pair(number)[0][1], size=(16, 24))
        assert np.array_equal(batch.images[row], expected)
        assert batch.token_ids[row].tolist() == [number + 3, 4, 5, 0, 0, 0]
        assert batch.text_lengths[row] == 3


def test_crops_belong_to_the_sample_number(tmp_path, write_pairs, open_stream, pair):
    write_pairs(tmp_path / "d", SHARDS)
    for batch in take(open_stream(tmp_path / "d", batch_size=10, seed=7), 5):
        for row, key in enumerate(batch.keys):
            draw = sample_generator(7, "crop", int(batch.sample_numbers[row]))
            content = pair(int(key[-9:]))[0][1]
            expected = RandomResizedCrop().decode(content, size=(16, 24), generator=draw)
            assert np.array_equal(batch.images[row], expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 1), (6, 0)])
def test_ranks_workers_and_micro_batches_do_not_change_a_sample(
    tmp_path, write_pairs, open_stream, accumulate, world_size, workers
):
    write_pairs(tmp_path / "d", SHARDS)
    options = {"batch_size": 12, "shuffle_shards": 2}
    whole = rows(take(open_stream(tmp_path / "d", **options), 5))
    parts = {}
    for rank in range(world_size):
        stream = open_stream(
            tmp_path / "d",
            rank=rank,
            world_size=world_size,
            accumulate=accumulate,
            workers=workers,
            **options,
        )
        batches = take(stream, 5 * accumulate)
        local = 12 // accumulate // world_size
        for number, batch in enumerate(batches):
            first = number * 12 // accumulate + rank * local
            assert batch.sample_numbers.tolist() == list(range(first, first + local))
        own = rows(batches)
        assert not own.keys() & parts.keys()
        parts |= own
    assert parts == whole


@pytest.mark.parametrize("world_size", [1, 3])
def test_virtual_processes_get_the_batches_that_processes_of_their_own_get(
    tmp_path, write_pairs, open_stream, world_size
):
    write_pairs(tmp_path / "d", SHARDS)
    options = {"batch_size": 12, "shuffle_shards": 2, "accumulate": 2}
    virtual = 6 // world_size
    for rank in range(world_size):
        stream = open_stream(
            tmp_path / "d", rank=rank, world_size=world_size, virtual_processes=6, **options
        )
        batches = take(stream, 4 * virtual)
        for place in range(virtual):
            own = open_stream(tmp_path / "d", rank=rank * virtual + place, world_size=6, **options)
            found, expected = batches[place::virtual], take(own, 4)
            assert [batch.keys for batch in found] == [batch.keys for batch in expected]
            assert rows(found) == rows(expected)
            shapes = [[batch.token_ids.shape for batch in part] for part in (found, expected)]
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize("first_batch", [1, 2, 3, 7])
def test_seeking_gives_what_replaying_gives(tmp_path, write_pairs, open_stream, first_batch):
    write_pairs(tmp_path / "d", SHARDS)
    options = {"batch_size": 8, "shuffle_shards": 2, "seed": 3}
    replayed = rows(take(open_stream(tmp_path / "d", **options), 12)[first_batch:])
    stream = open_stream(tmp_path / "d", first_sample=8 * first_batch, **options)
    assert rows(take(stream, 12 - first_batch)) == replayed
    assert stream.state() == {}


def test_another_seed_is_another_order_with_other_crops(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "d", SHARDS)
    one, two = (
        rows(take(open_stream(tmp_path / "d", batch_size=22, seed=seed), 1)) for seed in (0, 1)
    )
    assert [row[0] for row in one.values()] != [row[0] for row in two.values()]
    pictures = [{row[0]: row[1] for row in rows.values()} for rows in (one, two)]
    assert sum(pictures[0][key] != pictures[1][key] for key in pictures[0]) > 15


def damaged_members(pair):
    """One sample of every kind of damage among sound ones."""
    jpeg = pair(0)[0][1]
    return {
        "sound a": pair(1),
        "image": [("2.jpg", jpeg[: len(jpeg) // 2]), ("2.txt", b"w2")],
        "no image": [("3.txt", b"w3"), ("3.json", b"{}")],
        "no caption": [("4.jpg", jpeg), ("4.json", b'{"captions": [], "caption": null}')],
        "text": [("5.jpg", jpeg), ("5.txt", b"\xff\xfe w5")],
        "text (json)": [("6.jpg", jpeg), ("6.json", b"{not json")],
        "label": [("7.jpg", jpeg), ("7.txt", b"w7"), ("7.cls", b"seven")],
        "duplicate": [("8.jpg", jpeg), ("8.txt", b"w8"), ("8.txt", b"w9")],
        "checksum": pair(9),
        "sound b": [("10.png", jpeg), ("10.txt", b"w10")],
        "truncated": pair(11),
    }


def write_damaged(tmp_path, write_tar, pair):
    members = [member for part in damaged_members(pair).values() for member in part]
    path = write_tar(tmp_path / "d" / "0.tar", members)
    with tarfile.open(path) as archive:
        return path, archive.getmembers()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_counted_by_kind_and_keep_their_slots(
    tmp_path, write_tar, pair, open_stream, workers
):
    path, headers = write_damaged(tmp_path, write_tar, pair)
    path.write_bytes(path.read_bytes()[: headers[-1].offset])
    stream = open_stream(path, batch_size=11, workers=workers)
    content = bytearray(path.read_bytes())
    flipped = next(header for header in headers if header.name == "000000009.jpg")
    content[flipped.offset_data + 30] ^= 4
    path.write_bytes(content)
    counter = DamageCounter(max_damaged=1.0)
    for batch in take(stream, 3):  # three epochs
        assert batch.damage == {
            "image": 1, "no image": 1, "no caption": 1, "text": 2, "label": 1,
            "duplicate": 1, "checksum": 1, "truncated": 1,
        }  # fmt: skip
        sound = {
            key.rpartition("/")[2] for key, ok in zip(batch.keys, batch.valid, strict=True) if ok
        }
        assert sound == {"000000001", "10"}
        assert len(set(batch.keys)) == 11
        empty = ~batch.valid
        assert not batch.images[empty].any() and not batch.token_ids[empty].any()
        assert (batch.text_lengths[empty] == 1).all()
        counter.add(batch.damage, len(batch))
        trained = int(batch.valid.sum())
        assert trained + sum(batch.damage.values()) == len(batch)
    assert counter.read == 33 and counter.damaged == 27


def test_a_damaged_shard_is_named_in_the_log(tmp_path, write_tar, pair, open_stream, caplog):
    path, headers = write_damaged(tmp_path, write_tar, pair)
    path.write_bytes(path.read_bytes()[: headers[-1].offset])
    with caplog.at_level(logging.WARNING):
        open_stream(path)
    assert str(path) in caplog.text and "cut off" in caplog.text


def test_a_run_puts_up_with_some_damage_but_not_with_more():
    counter = DamageCounter(max_damaged=0.1, patience=100)
    counter.add({"image": 90}, 99)
    counter.check()  # too early to judge
    assert counter.was_too_much  # if the run ends here
    counter = DamageCounter(max_damaged=0.1, patience=100)
    counter.add({"image": 6, "checksum": 4}, 100)
    counter.check()
    copy = DamageCounter(max_damaged=0.1, patience=100)
    copy.load_state(json.loads(json.dumps(counter.state())))
    assert copy == counter
    copy.add({"image": 1}, 1)
    with pytest.raises(InputError, match=r"11 of the 101 samples .*checksum 4, image 7.*= 0\.1"):
        copy.check()


def test_captions_of_an_image_are_drawn_uniformly(tmp_path, write_tar, pair, open_stream):
    members = [*pair(1, ["w10", "w20", "w30"]), *pair(2, ["w40"])]
    path = write_tar(tmp_path / "0.tar", members)
    batch = take(open_stream(path, batch_size=1200), 1)[0]
    counts = Counter(batch.token_ids[:, 0].tolist())
    assert counts.keys() == {13, 23, 33, 43}
    assert counts[43] == 600
    # binomial with n = 600, p = 1/3: four standard deviations are 46
    assert all(abs(counts[token] - 200) < 50 for token in (13, 23, 33))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {13, 23}),
        ({"caption": ("txt",)}, {4}),
        ({"caption": ("txt",), "caption_per_line": True}, {4, 5}),
        ({"caption": ("json.title",)}, {53}),
        ({"caption": ("json.nothing", "json.title")}, {53}),
    ],
)
def test_captions_are_found_where_the_recipe_says(
    tmp_path, write_tar, encode, make_picture, open_stream, fields, expected
):
    from frugal.common.data.samples import Fields

    members = [
        ("0.jpg", encode(make_picture(0))),
        ("0.txt", b"w1\n\n w2 \n"),
        ("0.json", json.dumps({"captions": ["w10", "w20"], "title": "w50"}).encode()),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    batch = take(open_stream(path, batch_size=40, fields=Fields(**fields)), 1)[0]
    assert set(batch.token_ids[:, 0].tolist()) == expected
    assert batch.valid.all()


def test_long_captions_are_cut_and_short_ones_padded(tmp_path, write_tar, pair, open_stream):
    path = write_tar(tmp_path / "0.tar", pair(1, ["w1 w2 w3 w4 w5 w6 w7 w8"]))
    batch = take(open_stream(path, batch_size=1, length=5), 1)[0]
    assert batch.token_ids.tolist() == [[4, 5, 6, 7, 8]]
    path = write_tar(tmp_path / "1.tar", pair(1, ["w3"]))
    batch = take(open_stream(path, batch_size=1, length=5), 1)[0]
    assert batch.token_ids.tolist() == [[6, 0, 0, 0, 0]] and batch.valid.all()


def test_images_alone_are_read_without_a_tokenizer(
    tmp_path, write_tar, encode, make_picture, open_stream
):
    path = write_tar(tmp_path / "0.tar", [("0.png", encode(make_picture(0), "PNG"))])
    batch = take(open_stream(path, batch_size=2, tokenizer=None), 1)[0]
    assert batch.token_ids is None and batch.text_lengths is None and batch.valid.all()


def test_weighted_sources_are_mixed(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "a", [10, 10])
    write_pairs(tmp_path / "b", [5], first=100)
    stream = open_stream(
        tmp_path / "a", tmp_path / "b", weights=(1.0, 3.0), batch_size=400, size=(16, 16)
    )
    numbers = take(stream, 1)[0].token_ids[:, 0] - 3
    assert abs(float((numbers >= 100).float().mean()) - 0.75) < 0.08
    assert stream.epoch_samples == 25


def test_a_set_can_be_sent_to_spawned_loader_processes(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "d", SHARDS)
    stream = open_stream(tmp_path / "d", batch_size=22)
    dataset = stream._loader.dataset
    expected = dataset[np.arange(22)]
    copy = pickle.loads(pickle.dumps(dataset))[np.arange(22)]
    assert copy["keys"] == expected["keys"] and torch.equal(copy["images"], expected["images"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_replaced_under_way_ends_the_run_with_one_sentence(
    tmp_path, write_pairs, open_stream, workers
):
    paths = write_pairs(tmp_path / "d", [4])
    stream = open_stream(paths[0], workers=workers)
    paths[0].write_bytes(paths[0].read_bytes()[:3000])
    with pytest.raises(InputError, match="was cut or replaced") as caught:
        take(stream, 1)
    assert "\n" not in str(caught.value)


def test_a_shard_that_vanishes_under_way_is_damage(tmp_path, write_pairs, open_stream):
    paths = write_pairs(tmp_path / "d", [2, 2])
    stream = open_stream(tmp_path / "d", batch_size=4)
    paths[1].unlink()
    batch = take(stream, 1)[0]
    assert batch.damage == {"unreadable": 2}
    assert batch.valid.sum() == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": -1}, "data.workers is -1"),
        ({"shuffle_shards": 0}, "data.shuffle_shards is 0"),
        ({"max_damaged": 1.5}, "data.max_damaged is 1.5"),
        ({"resampled_samples": 0}, "data.resampled_samples is 0"),
        ({"weights": (1.0, 2.0)}, "2 numbers for the 1 entries"),
        ({"weights": (1.0,)}, "single source"),
        ({"train": ("a", "b"), "weights": (1.0, 0.0)}, "must be positive"),
        ({"train": ("a", "b"), "weights": (1.0, float("nan"))}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        PairData(**{"train": ("x",), "tokenizer": ClipBpe()} | options)


def test_unusable_data_is_refused_with_one_sentence(tmp_path, write_pairs, open_stream):
    paths = write_pairs(tmp_path / "d", [2])
    (tmp_path / "empty").mkdir()
    for train, sentence in (
        ([], "data.train is empty"),
        ([tmp_path / "none.tar"], "none.tar, which does not exist"),
        ([tmp_path / "empty"], "empty holds no data"),
        ([tmp_path / "*.parquet"], "matches nothing"),
        ([paths[0], tmp_path / "d" / "*.tar"], "more than once"),
        (["pipe:cat x.tar"], "data.resampled_samples"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            open_stream(*train)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path, write_pairs, open_stream):
    write_pairs(tmp_path / "d", [2])
    with pytest.raises(InputError, match="49408 tokens, more than the table"):
        open_stream(tmp_path / "d", tokenizer=ClipBpe())


def test_a_recipe_keeps_its_data(vocabulary):
    data = PairData(
        train=("a", "b"),
        weights=(1.0, 2.0),
        tokenizer=vocabulary,
        augmentation=RandomResizedCrop(scale=(0.2, 0.9)),
    )
    assert from_json(json.loads(json.dumps(to_json(data)))) == data


def test_real_photos_with_five_captions_pass_through(real_data, open_stream):
    shards = real_data / "coco_mini" / "val" / "00000.tar"
    with tarfile.open(shards) as archive:
        truth = {
            member.name.removesuffix(".json"): json.load(archive.extractfile(member))["captions"]
            for member in archive
            if member.name.endswith(".json")
        }
    stream = open_stream(
        shards, batch_size=106, tokenizer=ClipBpe(), vocabulary_size=49408, length=32
    )
    tokenizer = ClipBpe().load()
    seen = set()
    for batch in take(stream, 4):
        assert batch.valid.all()
        for row, key in enumerate(batch.keys):
            ids = batch.token_ids[row, : batch.text_lengths[row]].tolist()
            expected = {
                caption: tokenizer.assemble(tokenizer.encode(caption), 32)
                for caption in truth[key.rpartition("/")[2]]
            }
            seen.add(next(caption for caption, tokens in expected.items() if tokens == ids))
    assert len(seen) > 2 * 106  # of the five captions of an image, another one each epoch


def _build_together(rank, folder, port, results):
    import torch.distributed as dist

    from frugal.common.data import sources

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    built = []
    build = sources.build_index
    sources.build_index = lambda path: built.append(path.name) or build(path)
    paths = sorted(folder.glob("*.tar"))
    sources.index_missing(paths, logging.getLogger("frugal.test"))
    results.put((rank, built, all(find_index(path) for path in paths)))
    dist.destroy_process_group()


def test_processes_share_the_indexing(tmp_path, write_pairs):
    write_pairs(tmp_path / "d", SHARDS)
    port = free_port()
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_build_together, args=(rank, tmp_path / "d", port, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    built = [name for _, names, _ in found for name in names]
    assert sorted(built) == [f"{number:05d}.tar" for number in range(5)]
    assert all(names for _, names, _ in found) and all(complete for *_, complete in found)


def test_too_many_open_files_are_not_taken_for_damage(tmp_path, write_pairs):
    paths = write_pairs(tmp_path / "d", [1] * 8)
    source = open_source(f"{tmp_path}/d", Fields(), [p for p in paths if build_index(p)])
    readers = ReaderCache(source.shards, Fields())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft >= min(hard, 65_536)  # a cache takes what it can get
    next_free = os.dup(0)
    os.close(next_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free + 3, hard))
    try:
        with pytest.raises(InputError, match=r"too many files are open.*ulimit -n.*shuffle-shards"):
            for shard in range(8):
                readers.reader(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_odd_in_tars_is_told_when_training_opens_them(
    tmp_path, write_tar, pair, open_stream, caplog
):
    members = [*pair(1), *pair(2), ("._x.jpg", b"mac")]
    write_tar(tmp_path / "d" / "0.tar", members[::2] + members[1::2])
    batch = next(iter(open_stream(tmp_path / "d", batch_size=2)))
    assert bool(batch.valid.all())
    assert "2 samples whose members lie apart were joined" in caplog.text
    assert "1 passed over: hidden members" in caplog.text


def test_a_missing_caption_is_told_with_the_members_that_there_are(tmp_path, write_tar, pair):
    path = write_tar(tmp_path / "0.tar", [pair(1)[0], ("000000001.title", b"w1")])
    build_index(path)
    raw = TarReader(path, Fields()).read(0)
    transform = SampleTransform.__new__(SampleTransform)
    with pytest.raises(Damaged, match=r"--data\.fields\.caption.*members are jpg, title"):
        transform.caption(raw, 0)
