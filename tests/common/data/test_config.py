"""Images without captions: the same order, crops and accounting as pairs, and class numbers."""

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from frugal.common.data.config import ImageData
from frugal.common.data.labeled import LabeledImages
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.recipe import ModelInputs

SIZE = (16, 24)


@pytest.fixture
def open_images():
    """The stream of one process of a small run on images alone."""

    def make(
        *train, batch_size=4, first_sample=0, rank=0, world_size=1, num_classes=None, **options
    ):
        data = ImageData(train=tuple(map(str, train)), **{"workers": 0} | options)
        recipe = SimpleNamespace(
            batch_size=batch_size,
            engine=SimpleNamespace(accumulate=1, virtual_processes=None),
            objective=SimpleNamespace(groups_by=None),
            virtual_per_process=lambda world_size: 1,
            run=SimpleNamespace(seed=3),
            model=SimpleNamespace(
                inputs=lambda: ModelInputs(height_width=SIZE, num_classes=num_classes)
            ),
            reduction=SimpleNamespace(text=None),
        )
        run = SimpleNamespace(
            rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"),
            log=logging.getLogger("frugal.test"),
        )  # fmt: skip
        return data.build(recipe, run, first_sample=first_sample, state={}, engine=None)

    return make


@pytest.fixture
def class_folders(tmp_path, make_picture, encode):
    """Folders of 3, 1 and 4 pictures; the class number is that of the sorted folder."""
    counts = {"ant": 3, "bee": 1, "cat": 4}
    for number, (name, count) in enumerate(counts.items()):
        for place in range(count):
            path = tmp_path / "folders" / name / f"{place}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(make_picture(10 * number + place)))
    return tmp_path / "folders"


@pytest.fixture
def tar_with_classes(tmp_path, write_tar, make_picture, encode):
    """A tar of numbered pictures with the given members of class."""

    def write(classes, name="00000.tar"):
        members = []
        for number, label in enumerate(classes):
            members.append((f"{number:05d}.jpg", encode(make_picture(number))))
            if label is not None:
                members.append((f"{number:05d}.cls", str(label).encode()))
        return write_tar(tmp_path / "tars" / name, members)

    return write


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_every_image_of_class_folders_comes_once_with_its_class(class_folders, open_images):
    stream = open_images(class_folders)
    assert stream.epoch_samples == 8
    batches = take(stream, 2)
    found = {k: int(n) for b in batches for k, n in zip(b.keys, b.labels, strict=True)}
    assert len(found) == 8
    for key, label in found.items():
        assert key.split("/")[-2] == ("ant", "bee", "cat")[label]
    assert all(b.token_ids is None and b.labels.dtype == torch.int64 for b in batches)
    assert all(b.valid.all() and b.damage == {} for b in batches)


def test_crops_are_those_of_pairs(class_folders, open_images):
    for batch in take(open_images(class_folders), 4):
        for row, (key, number) in enumerate(zip(batch.keys, batch.sample_numbers, strict=True)):
            draw = sample_generator(3, "crop", int(number))
            content = Path(key).read_bytes()
            expected = RandomResizedCrop().decode(content, size=SIZE, generator=draw)
            assert np.array_equal(batch.images[row], expected)


def test_processes_share_the_order_and_a_resume_continues_it(class_folders, open_images):
    whole = take(open_images(class_folders), 5)
    parts = [take(open_images(class_folders, rank=r, world_size=2), 5) for r in range(2)]
    for step, batch in enumerate(whole):
        for name in ("images", "labels", "sample_numbers"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
    resumed = take(open_images(class_folders, first_sample=12, workers=1), 2)
    for batch, expected in zip(resumed, whole[3:], strict=True):
        assert torch.equal(batch.images, expected.images) and batch.keys == expected.keys
        assert torch.equal(batch.labels, expected.labels)


def test_tars_have_classes_where_they_have_cls_members(tar_with_classes, open_images):
    path = tar_with_classes([4, None, 0, 2])
    batch = take(open_images(path, augmentation=CenterCrop()), 1)[0]
    labels = {key[-5:]: int(label) for key, label in zip(batch.keys, batch.labels, strict=True)}
    assert labels == {"00000": 4, "00001": -1, "00002": 0, "00003": 2}
    without = tar_with_classes([None, None], "00001.tar")
    batch = take(open_images(without, batch_size=2), 1)[0]
    assert batch.labels is None and batch.valid.all()


def test_a_model_with_classes_counts_samples_without_one_as_damaged(tar_with_classes, open_images):
    path = tar_with_classes([1, None, 3, 0, -1, 2])
    batch = take(open_images(path, batch_size=6, num_classes=3), 1)[0]
    damaged = {key[-5:] for key, ok in zip(batch.keys, batch.valid.tolist(), strict=True) if not ok}
    assert damaged == {"00001", "00002", "00004"}
    assert batch.damage == {"no label": 2, "label": 1}  # -1 stands for none
    assert not batch.labels[~batch.valid].any() and not batch.images[~batch.valid].any()
    assert sorted(batch.labels[batch.valid].tolist()) == [0, 1, 2]


def test_a_flat_folder_is_read_where_no_classes_are_needed(
    tmp_path, make_picture, encode, open_images
):
    folder = tmp_path / "flat"
    (folder / "notes").mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode(make_picture(number), "PNG"))
    stream = open_images(folder, batch_size=3)
    batch = take(stream, 1)[0]
    assert stream.epoch_samples == 3 and batch.valid.all() and batch.labels is None
    assert sorted(key.rpartition("/")[2] for key in batch.keys) == ["0.png", "1.png", "2.png"]
    for file in folder.glob("*.png"):
        file.rename(file.with_suffix(".dat"))
    with pytest.raises(InputError, match="holds no data"):
        open_images(folder)
    assert open_images(folder, image_extensions=("dat",)).epoch_samples == 3
    for file in folder.glob("*.dat"):
        file.rename(file.with_suffix(".png"))
    with pytest.raises(InputError, match=r"flat holds images but no class folders; put the images"):
        open_images(folder, num_classes=3)
    with pytest.raises(InputError, match="no class folders"):
        LabeledImages(folder, size=SIZE)


def test_classes_that_are_not_the_models_are_refused_before_training(
    class_folders, tar_with_classes, tmp_path, open_images
):
    with pytest.raises(InputError, match=r"has 3 class folders, but the model tells apart .* = 10"):
        open_images(class_folders, num_classes=10)
    path = tar_with_classes([None, None])
    with pytest.raises(InputError, match="have no classes, which this model needs"):
        open_images(path, num_classes=3)
    rows = "\n".join(f"{file},x" for file in class_folders.rglob("*.JPEG"))
    (tmp_path / "list.csv").write_text(f"filepath,title\n{rows}\n")
    with pytest.raises(InputError, match=r"list\.csv have no classes"):
        open_images(tmp_path / "list.csv", num_classes=3)
    other = tmp_path / "other"
    for name in ("ant", "bee", "dog"):
        (other / name).mkdir(parents=True)
        (other / name / "0.jpg").write_bytes((class_folders / "bee" / "0.JPEG").read_bytes())
    with pytest.raises(InputError, match="has other class folders than"):
        open_images(class_folders, other, num_classes=3)


def test_a_damaged_first_image_does_not_hide_the_classes(tmp_path, write_tar, open_images):
    # the first look for classes passes over what cannot be read
    members = [("a.txt", b"no image"), ("b.jpg", b"broken"), ("b.cls", b"1")]
    path = write_tar(tmp_path / "d.tar", members)
    batch = take(open_images(path, batch_size=2, num_classes=2), 1)[0]
    assert batch.damage == {"no image": 1, "image": 1}


def test_no_data_at_all_is_one_sentence(open_images):
    with pytest.raises(InputError, match=r"data\.train is empty; say where the images are"):
        open_images()
