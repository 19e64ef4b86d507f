"""What the tests of the data package share: pictures, tars and streams made on the spot."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import WordPiece
from frugal.common.recipe import ModelInputs
from frugal.common.reduction.text import Truncate

WORDS = ["[PAD]", "[UNK]", "[CLS]", *(f"w{number}" for number in range(200))]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes never go to the home folder of who runs the tests."""
    folder = tmp_path / "cache_home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def real_data() -> Path:
    """The folder of real photos with human captions; skips where there is none."""
    named = os.environ.get("FRUGAL_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data here: set FRUGAL_TEST_DATA")
    return folder


def picture(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    """A smooth random picture, as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def make_picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


Members = Sequence[tuple[str, bytes]]


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Writes (name, bytes) pairs as a tar."""

    def write(path: Path, members: Members, **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", **options) as archive:
            for name, content in members:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def pair() -> Callable[..., Members]:
    """The members of one image-text pair; its caption names the pair."""

    def make(number: int, captions: Sequence[str] = (), *, side: int = 24) -> Members:
        key = f"{number:09d}"
        described = {"key": key, "captions": list(captions)} if captions else {"key": key}
        return [
            (f"{key}.jpg", encoded(picture(number, side, side + number % 5))),
            (f"{key}.json", json.dumps(described).encode()),
            (f"{key}.txt", f"w{number} w1 w2".encode()),
        ]

    return make


@pytest.fixture
def write_pairs(
    write_tar: Callable[..., Path], pair: Callable[..., Members]
) -> Callable[..., list[Path]]:
    """Writes numbered pairs into tars of the given numbers of samples."""

    def write(folder: Path, counts: Sequence[int], *, first: int = 0) -> list[Path]:
        paths = []
        for shard, count in enumerate(counts):
            members = [m for number in range(first, first + count) for m in pair(number)]
            paths.append(write_tar(folder / f"{shard:05d}.tar", members))
            first += count
        return paths

    return write


@pytest.fixture
def vocabulary(tmp_path: Path) -> WordPiece:
    """A tokenizer for the captions of the pairs: word n is token n + 3."""
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return WordPiece(vocab=path)


@pytest.fixture
def open_stream(vocabulary: WordPiece) -> Callable[..., Any]:
    """The stream of one process of a small run."""

    def make(
        *train: Path | str,
        batch_size: int = 4,
        accumulate: int = 1,
        virtual_processes: int | None = None,
        first_sample: int = 0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        size: tuple[int, int] = (16, 24),
        length: int = 6,
        vocabulary_size: int = len(WORDS),
        state: dict[str, Any] | None = None,
        log: logging.Logger | None = None,
        **options: Any,
    ) -> Any:
        data = PairData(
            train=tuple(map(str, train)),
            **{"tokenizer": vocabulary, "workers": 0} | options,
        )
        captions = SimpleNamespace(length=length, vocabulary=vocabulary_size, pad_id=0)
        recipe = SimpleNamespace(
            batch_size=batch_size,
            engine=SimpleNamespace(accumulate=accumulate, virtual_processes=virtual_processes),
            objective=SimpleNamespace(groups_by=None),
            virtual_per_process=lambda world_size: (virtual_processes or world_size) // world_size,
            run=SimpleNamespace(seed=seed),
            model=SimpleNamespace(inputs=lambda: ModelInputs(height_width=size, captions=captions)),
            reduction=SimpleNamespace(text=Truncate()),
        )
        run = SimpleNamespace(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            device=torch.device("cpu"),
            log=log or logging.getLogger("frugal.test"),
        )
        return data.build(
            recipe,  # type: ignore[arg-type]
            run,  # type: ignore[arg-type]
            first_sample=first_sample,
            state=state or {},
            engine=None,
        )

    return make


@pytest.fixture
def old_index() -> Callable[..., Path]:
    """Writes the index of a tar in the form of version 1, one member to a sample."""

    def write(path: Path, *, names: Sequence[str], checksums: Sequence[int]) -> Path:
        with tarfile.open(path) as archive:
            members = [archive.getmember(name) for name in names]
        encoded = [name.encode() for name in names]
        place = path.with_name(f"{path.name}.index.safetensors")
        tensors = {
            "names": np.frombuffer(b"".join(encoded), np.uint8),
            "name_ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
            "offsets": np.array([member.offset_data for member in members], np.int64),
            "lengths": np.array([member.size for member in members], np.int64),
            "checksums": np.array(checksums, np.uint32),
            "first_member": np.arange(len(names) + 1, dtype=np.int64),
            "damage": np.zeros(len(names), np.uint8),
        }
        described = {
            "version": "1",
            "samples": str(len(names)),
            "shard_bytes": str(path.stat().st_size),
            "note": "",
        }
        save_file(tensors, place, metadata=described)
        return place

    return write
