import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import webdataset
from open_clip.transform import image_transform
from PIL import Image

from frugal.common.data.labeled import CaptionedImages, LabeledImages, walk_images
from frugal.common.data.samples import Fields
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError

SIZE = (16, 16)


@pytest.fixture
def benchmark(tmp_path, write_tar, encode, make_picture):
    """clip_benchmark's layout for classification: twelve shards of unequal size."""
    folder = tmp_path / "wds"
    number = 0
    for shard in range(12):
        members = []
        for _ in range(shard % 4):
            members += [
                (f"s{number:05d}.webp", encode(make_picture(number, 30, 40), "WEBP")),
                (f"s{number:05d}.cls", str(number % 5).encode()),
            ]
            number += 1
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text("12")
    (folder / "classnames.txt").write_text("cat\ndog \nbird\nfish\nant\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    return folder


def collect(data, world_size, batch_size, workers=0):
    """Every column of every process's batches, in order of the ranks."""
    parts = [
        batch
        for rank in range(world_size)
        for batch in data.batches(rank, world_size, batch_size, workers)
    ]
    assert all(0 < len(part[0]) <= batch_size for part in parts)
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def test_benchmark_shards_are_read_in_their_order(benchmark):
    data = LabeledImages(benchmark, size=SIZE)
    assert data.class_names == ["cat", "dog", "bird", "fish", "ant"]
    assert data.templates == ["a photo of a {c}.", "a {c}"]
    images, labels, places = collect(data, 1, 7)
    urls = f"{benchmark}/test/{{0..11}}.tar"
    theirs = list(
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("webp", "cls")
    )
    transform = image_transform(16, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert len(data) == len(theirs) == 18
    assert labels.tolist() == [label for _, label in theirs]
    assert places.tolist() == list(range(18))
    expected = torch.stack([transform(image) for image, _ in theirs]) * 255
    assert (images - expected).abs().max() <= 1.01


@pytest.mark.parametrize(
    ("world_size", "batch_size", "workers"), [(2, 4, 0), (5, 3, 1), (30, 8, 0)]
)
def test_every_image_comes_once_whatever_the_processes(benchmark, world_size, batch_size, workers):
    data = LabeledImages(benchmark, size=SIZE)
    whole, parts = collect(data, 1, 100), collect(data, world_size, batch_size, workers)
    assert all(torch.equal(one, many) for one, many in zip(whole, parts, strict=True))


def test_class_folders_are_labeled_as_torchvision_does(tmp_path, make_picture):
    for number, name in enumerate(("b_c", "a", "d")):
        (tmp_path / "f" / name).mkdir(parents=True)
        for picture in range(number + 1):
            make_picture(picture, 20, 30).save(tmp_path / "f" / name / f"{picture}.png")
    data = LabeledImages(tmp_path / "f", size=(16, 24), crop=CenterCrop(order="crop_first"))
    theirs = torchvision.datasets.ImageFolder(tmp_path / "f")
    images, labels, _ = collect(data, 2, 4)
    assert labels.tolist() == theirs.targets
    assert data.class_names == ["a", "b c", "d"] and data.templates is None
    assert images.shape == (6, 3, 16, 24)


def test_tars_in_the_folder_itself_need_no_class_names(tmp_path, write_tar, encode, make_picture):
    content = encode(make_picture(0))
    write_tar(tmp_path / "d" / "0.tar", [("0.jpg", content), ("0.cls", b"3"), ("0.txt", b"\xff")])
    data = LabeledImages(tmp_path / "d", size=SIZE)
    assert data.class_names is None and data.templates is None
    assert collect(data, 1, 4)[1].tolist() == [3]


def test_every_line_is_a_caption_in_benchmark_retrieval(tmp_path, write_tar, encode, make_picture):
    members = []
    for number in range(3):
        members.append((f"{number}.jpg", encode(make_picture(number))))
        members.append((f"{number}.txt", f"first {number}\nsecond {number}\n".encode()))
    write_tar(tmp_path / "d" / "test" / "0.tar", members)
    (tmp_path / "d" / "dataset_type.txt").write_text("retrieval\n")
    data = CaptionedImages(tmp_path / "d", size=SIZE)
    assert data.captions == [[f"first {n}", f"second {n}"] for n in range(3)]
    images, places = collect(data, 2, 2)
    assert len(images) == len(data) == 3 and places.tolist() == [0, 1, 2]


def test_captions_of_training_shards_are_found_too(tmp_path, write_tar, pair):
    write_tar(tmp_path / "d" / "0.tar", [*pair(1, ["one", "two"]), *pair(2)])
    assert CaptionedImages(tmp_path / "d", size=SIZE).captions == [["one", "two"], ["w2 w1 w2"]]
    texts = CaptionedImages(tmp_path / "d", size=SIZE, fields=Fields(caption=("txt",)))
    assert texts.captions == [["w1 w1 w2"], ["w2 w1 w2"]]


def test_real_photos_of_any_shape_are_evaluated_as_open_clip_does(real_data):
    folder = real_data / "coco_mini" / "val"
    data = CaptionedImages(folder, size=(64, 64))
    assert len(data) == 106 and {len(captions) for captions in data.captions} == {5}
    images, _ = collect(data, 3, 10)
    samples = webdataset.WebDataset(str(folder / "00000.tar"), shardshuffle=False)
    transform = image_transform(64, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for ours, sample in zip(images, samples, strict=True):
        theirs = transform(Image.open(io.BytesIO(sample["jpg"]))) * 255
        assert (ours - theirs).abs().max() <= 1.01


def test_a_damaged_image_ends_the_evaluation(tmp_path, write_tar, pair):
    broken = [("000000009.jpg", b"\xff\xd8 no picture"), ("000000009.cls", b"1")]
    members = [*pair(0), ("000000000.cls", b"0"), *broken]
    write_tar(tmp_path / "d" / "0.tar", members)
    data = LabeledImages(tmp_path / "d", size=SIZE)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"0\.tar/000000009 cannot be evaluated") as caught:
            collect(data, 1, 4, workers)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_counted_exactly_is_refused(tmp_path, benchmark, write_tar, pair):
    write_tar(tmp_path / "d" / "0.tar", pair(0))
    with pytest.raises(InputError, match="000000000 has no class number"):
        collect(LabeledImages(tmp_path / "d", size=SIZE), 1, 4)
    write_tar(tmp_path / "e" / "0.tar", pair(0)[:1])
    with pytest.raises(InputError, match="000000000 has no caption"):
        CaptionedImages(tmp_path / "e", size=SIZE)
    (benchmark / "test" / "3.tar").unlink()
    with pytest.raises(InputError, match=r"says '12' shards but .* holds 11"):
        LabeledImages(benchmark, size=SIZE)
    path = write_tar(tmp_path / "f" / "0.tar", [*pair(0), *pair(1)])
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    with pytest.raises(InputError, match="every image"):
        CaptionedImages(tmp_path / "f", size=SIZE)
    with pytest.raises(InputError, match="does not exist"):
        LabeledImages(tmp_path / "nothing", size=SIZE)


def test_images_are_uint8_of_the_wanted_shape(benchmark):
    images, labels, places = next(LabeledImages(benchmark, size=(12, 20)).batches(0, 1, 5))
    assert images.shape == (5, 3, 12, 20) and images.dtype == torch.uint8
    assert labels.dtype == places.dtype == torch.int64
    assert np.ptp(images.numpy()) > 50


def test_tensorflows_kernels_hand_out_gray_levels(benchmark):
    crop = CenterCrop(order="crop_first", interpolation="tf1_bicubic")
    data = LabeledImages(benchmark, size=(12, 20), crop=crop)
    images, _, _ = collect(data, 3, 5)
    assert images.shape == (18, 3, 12, 20) and images.dtype == torch.float32
    samples = webdataset.WebDataset(
        f"{benchmark}/test/{{0..11}}.tar", shardshuffle=False, empty_check=False
    )
    for ours, sample in zip(images, samples, strict=True):
        assert np.array_equal(ours, crop.gray_levels(sample["webp"], size=(12, 20)))


def test_folders_that_are_numbers_are_counted_as_numbers(tmp_path, make_picture):
    for name in ("10", "9", "100", "0"):
        (tmp_path / "v2" / name).mkdir(parents=True)
        make_picture(int(name), 20, 20).save(tmp_path / "v2" / name / "a.jpeg")
    data = LabeledImages(tmp_path / "v2", size=SIZE)
    assert data.class_folders == data.class_names == ["0", "9", "10", "100"]
    images, labels, _ = collect(data, 1, 4)
    assert labels.tolist() == [0, 1, 2, 3]
    ten = CenterCrop().decode((tmp_path / "v2" / "10" / "a.jpeg").read_bytes(), size=SIZE)
    assert np.array_equal(images[2], ten)


def test_folders_left_out_of_the_names_are_not_read(tmp_path, make_picture):
    for name in ("a", "b", "c"):
        (tmp_path / "f" / name).mkdir(parents=True)
        make_picture(1, 20, 20).save(tmp_path / "f" / name / "1.png")
    (tmp_path / "f" / "b" / "1.png").write_bytes(b"no picture")
    (tmp_path / "f" / "classnames.json").write_text('{"c": "kite", "a": "tall ship"}')
    data = LabeledImages(tmp_path / "f", size=SIZE)
    assert (data.class_folders, data.class_names) == (["a", "c"], ["tall ship", "kite"])
    assert collect(data, 1, 4)[1].tolist() == [0, 1]


class InThreads:
    """One of several ranks that are threads."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self._parts[self.rank] = tensor.clone()
        self._barrier.wait(60)
        total = torch.stack(self._parts).sum(0)
        self._barrier.wait(60)
        return tensor.copy_(total)


class Numbered:
    """Images that hold their own number, with labels; a rank has whole groups of 64."""

    def __init__(self, count: int, *, repeats: int = 1) -> None:
        self._count, self._repeats = count, repeats

    def __len__(self) -> int:
        return self._count

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        half = 64 * (self._count // 64 // world_size)
        stop = half * (rank + 1) if rank + 1 < world_size else self._count
        places = torch.arange(half * rank, stop).repeat(self._repeats)
        for part in places.split(batch_size):
            yield part.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), part % 7, part


def walked(
    count: int, *, world_size: int, batch_size: int
) -> tuple[list[list[torch.Tensor]], set[int]]:
    """The tables of every rank, and how many images were computed at a time."""
    parts, barrier = [torch.zeros(0)] * world_size, threading.Barrier(world_size)
    sizes: set[int] = set()
    tables = [
        [torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64)] for _ in range(world_size)
    ]

    def compute(images: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> Any:
        sizes.add(len(images))
        return torch.stack([images.mean((1, 2, 3)), 2.0 * places], dim=1), labels

    def work(rank: int) -> None:
        ranks = InThreads(rank, parts, barrier)
        walk_images(Numbered(count), compute, tables[rank], ranks=ranks, batch_size=batch_size)

    with ThreadPoolExecutor(world_size) as threads:
        list(threads.map(work, range(world_size)))
    return tables, sizes


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 200), (1, 10), (2, 48), (3, 64)])
def test_a_walk_computes_every_image_once_and_every_rank_has_all_rows(
    world_size: int, batch_size: int
) -> None:
    tables, sizes = walked(201, world_size=world_size, batch_size=batch_size)
    numbers = torch.arange(201)
    for floats, labels in tables:
        assert torch.equal(floats, torch.stack([numbers, 2 * numbers], dim=1).float())
        assert torch.equal(labels, numbers % 7)
    assert sizes == {64, 201 % 64}  # whatever the batches are that images are read in


def test_a_walk_refuses_to_count_an_image_twice() -> None:
    alone = InThreads(0, [torch.zeros(0)], threading.Barrier(1))
    table = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="5 of 5 images were not evaluated exactly once"):
        walk_images(
            Numbered(5, repeats=2),
            lambda images, labels, places: [labels],
            [table],
            ranks=alone,
            batch_size=2,
        )
