"""Retrieval on files as people write them: type files, line ends, unequal numbers of captions."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from evaluated import OpenClipLike, recipe, telling, tokenizer
from PIL import Image

from frugal.common.data.benchmark_layout import is_multi_labeled
from frugal.common.data.labeled import CaptionedImages
from frugal.common.errors import InputError
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of

COUNT = 14
CAPTIONS = [[f"side {n} of thing {place}" for n in range(1 + place % 4)] for place in range(COUNT)]
CAPTIONS[5] = [CAPTIONS[2][1], "a line\u2028with its separator\x0b\x85and others"]


def text(place: int) -> str:
    """The captions of an image, one per line, as editors of all kinds end lines."""
    end = "\r\n" if place % 3 == 1 else "\n"
    blank = end if place % 5 == 3 else ""
    return blank + (end + blank).join(CAPTIONS[place]) + (end if place % 2 else "")


def pixels(place: int) -> np.ndarray:
    return np.random.default_rng(place).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "0.tar"
    with tarfile.open(path, "w") as archive:
        for place in range(COUNT):
            image = io.BytesIO()
            Image.fromarray(pixels(place)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("txt", text(place).encode())):
                entry = tarfile.TarInfo(f"{place:03d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def folder(root: Path, tar: Path, kind: bytes | None) -> Path:
    """clip_benchmark's layout with some bytes in ``dataset_type.txt``."""
    (root / "test").mkdir(parents=True)
    shutil.copy(tar, root / "test" / "0.tar")
    (root / "test" / "nshards.txt").write_text("1")
    if kind is not None:
        (root / "dataset_type.txt").write_bytes(kind)
    return root


@pytest.mark.parametrize(
    "kind",
    [b"retrieval", b"Retrieval\n\n", b"\xef\xbb\xbfretrieval\r\n", b"\n  RETRIEVAL \n"],
    ids=["bare", "capital", "byte order mark", "blanks"],
)
def test_every_line_is_a_caption_however_the_type_is_written(
    kind: bytes, tar: Path, tmp_path: Path
) -> None:
    data = CaptionedImages(folder(tmp_path / "x", tar, kind), size=(8, 8))
    assert data.captions == CAPTIONS


@pytest.mark.parametrize("kind", [b"", b"captioning", b'"retrieval"', b"retrieval\nmore"])
def test_an_unknown_type_is_refused_wherever_it_is_asked_for(
    kind: bytes, tar: Path, tmp_path: Path
) -> None:
    root = folder(tmp_path / "x", tar, kind)
    for ask in (lambda: CaptionedImages(root, size=(8, 8)), lambda: is_multi_labeled(root)):
        with pytest.raises(InputError, match=r"dataset_type\.txt says .*write one of") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_data_set_of_another_type_has_no_captions(tar: Path, tmp_path: Path) -> None:
    root = folder(tmp_path / "x", tar, b"MultiLabel\n")
    assert is_multi_labeled(root)
    with pytest.raises(InputError, match="says multilabel, but captions are of the type retrieval"):
        CaptionedImages(root, size=(8, 8))


def test_unequal_numbers_of_captions_are_scored_as_in_clip_benchmark(
    tar: Path, tmp_path: Path, run: Run
) -> None:
    plan = recipe()
    model = telling(plan)
    task = Retrieval(data=folder(tmp_path / "x", tar, b"retrieval"))
    ours = task.evaluate(bundle_of(model, plan), run)
    pairs = [(torch.from_numpy(pixels(n)).permute(2, 0, 1), CAPTIONS[n]) for n in range(COUNT)]
    batch = (torch.stack([image for image, _ in pairs]), [texts for _, texts in pairs])
    theirs = zeroshot_retrieval.evaluate(
        OpenClipLike(model).eval(), [batch], tokenizer(), "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    for way in ("image", "text"):
        for k in (1, 5, 10):
            name = f"{way}_retrieval_recall_at_{k}"
            assert ours[name] == pytest.approx(theirs[f"{way}_retrieval_recall@{k}"], abs=1e-6)
    assert ours["retrieval_captions"] == sum(map(len, CAPTIONS))


def test_texts_of_several_lines_without_a_type_are_told_and_counted(
    tar: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    plan, outcomes = recipe(), []
    task = Retrieval(data=folder(tmp_path / "x", tar, None))
    numbers = task.evaluate(bundle_of(telling(plan), plan), run, keep=outcomes.append)
    several = sum(len(captions) > 1 for captions in CAPTIONS)
    assert numbers["retrieval_captions"] == COUNT
    assert numbers["retrieval_captions_of_several_lines"] == several
    assert outcomes[0].facts["captions_of_several_lines"] == several
    assert f"{several} of the {COUNT} captions have several lines" in caplog.text


def test_captions_of_several_images_are_told_and_counted(
    tar: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    plan = recipe()
    task = Retrieval(data=folder(tmp_path / "x", tar, b"retrieval"))
    numbers = task.evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["retrieval_captions_repeated"] == 2  # image 5 has the second one of image 2
    assert f"2 of the {sum(map(len, CAPTIONS))} captions stand at several" in caplog.text


def test_captions_that_are_cut_are_told_and_counted(
    tar: Path, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    plan = recipe(length=7)  # 5 tokens beside the two special ones
    loaded = plan.data.caption_tokenizer.load()
    longer = [len(loaded.encode(caption)) > 5 for own in CAPTIONS for caption in own]
    assert 0 < sum(longer) < len(longer)
    task = Retrieval(data=folder(tmp_path / "x", tar, b"retrieval"))
    numbers = task.evaluate(bundle_of(telling(plan), plan), run)
    assert numbers["retrieval_captions_cut"] == sum(longer)
    assert f"{sum(longer)} of the {len(longer)} captions are longer than the 7" in caplog.text
