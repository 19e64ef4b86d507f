"""Embeddings stored shard by shard."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from forks import fork
from frugal.common.data.sources import build_index
from frugal.common.data.stored_vectors import HEADER
from frugal.common.embed import Options, embed
from frugal.common.errors import InputError
from frugal.common.weights.load import load_model
from support import DDP, ROOT, command, rewrite_shard

WORDS = ("--workers", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of ten samples; of the second one an image and a caption are damaged."""
    folder, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(10):
                file = io.BytesIO()
                pixels = draw.integers(256, size=(5, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 40 + number)).save(file, "PNG")
                captions = json.dumps({"captions": [f"a {number}", f"number {number} of {shard}"]})
                image, text = file.getvalue(), captions.encode()
                if shard == 1 and number == 3:
                    image = image[:60]
                if shard == 1 and number == 7:
                    text = b"{}"
                for extension, content in (("png", image), ("json", text)):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def index_of(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_rows_are_what_the_model_says_of_every_sample(
    alone: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--checkpoint", alone, "--data", shards, "--out", out, "--texts", *WORDS)
    said = command(
        "frugal.common.embed", *given, "--output", "both", "--dtype", "float32", "--batch-size", 4
    ).stderr
    assert "00001.tar: 1 image; these samples are marked" in said.replace("decoding", "image")
    index = index_of(out)
    assert index["complete"] and [each["name"] for each in index["shards"]] == [
        f"{shard:05d}.tar" for shard in range(3)
    ]
    assert [each["images"] for each in index["shards"]] == [10, 9, 10]
    assert [each["texts"] for each in index["shards"]] == [20, 16, 20]

    bundle = load_model(alone)
    for shard, tensors in enumerate(stored(out).values()):
        with tarfile.open(shards / f"{shard:05d}.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for number in range(10):
            if shard == 1 and number == 3:
                assert not tensors["image_valid"][number] and not tensors["image"][number].any()
                continue
            assert tensors["image_valid"][number]
            pixels = bundle.prepare([files[f"{number:06d}.png"]])
            with torch.no_grad():
                expected = bundle.model.encode_image(pixels)  # type: ignore[operator]
                pooled = bundle.model.image.forward_pooled(pixels)  # type: ignore[union-attr, operator]
            torch.testing.assert_close(tensors["image"][number], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                tensors["image_pooled"][number], pooled, rtol=1e-4, atol=1e-5
            )
        samples = tensors["text_sample"].tolist()
        assert samples == sorted(samples)
        for sample in set(samples):  # the captions of a sample in their order
            rows = [row for row, place in enumerate(samples) if place == sample]
            tokens = bundle.tokenize(json.loads(files[f"{sample:06d}.json"])["captions"])
            with torch.no_grad():
                texts = bundle.model.encode_text(*tokens)  # type: ignore[operator]
                pooled = bundle.model.text.forward_pooled(*tokens)  # type: ignore[union-attr, operator]
            torch.testing.assert_close(tensors["text"][rows], texts, rtol=0, atol=1e-5)
            torch.testing.assert_close(tensors["text_pooled"][rows], pooled, rtol=1e-4, atol=1e-5)


def test_any_number_of_processes_stores_the_same_and_goes_on_where_it_was(
    alone: Path, shards: Path, tmp_path: Path
) -> None:
    given = ("--checkpoint", alone, "--data", shards, "--texts", *WORDS)
    one, two = tmp_path / "one", tmp_path / "two"
    command("frugal.common.embed", *given, "--out", one)
    torchrun = ("--standalone", "--nproc_per_node", 2, "-m", "frugal.common.embed")
    command("torch.distributed.run", *torchrun, *given, "--out", two)
    files = sorted(path.name for path in one.iterdir())
    assert files == [*(f"{n:05d}.safetensors" for n in range(3)), "index.json"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    whole = {name: (one / name).read_bytes() for name in files}
    (one / "00001.safetensors").unlink()
    (one / "00002.safetensors").write_bytes(whole["00002.safetensors"][:-9])
    before = (one / "00000.safetensors").stat().st_mtime_ns
    said = command("frugal.common.embed", *given, "--out", one).stderr
    assert "2 of 3 shards are to be embedded, 20 samples" in said
    assert {name: (one / name).read_bytes() for name in files} == whole
    assert (one / "00000.safetensors").stat().st_mtime_ns == before


_LATE = """
import os, sys, time
from pathlib import Path
import frugal.common.embed as module

found = module._is_stored
def late(job, about):
    time.sleep(0.7 * (os.environ["RANK"] == "0"))
    return found(job, about)

module._is_stored = late
checkpoint, data, out = sys.argv[1:]
module.embed(module.Options(
    checkpoint=Path(checkpoint), data=(data,), out=Path(out), workers=0, device="cpu"
))
"""
"""The first process is late to look for what is stored: by then the others may have stored more."""


def test_a_slow_process_shares_out_the_shards_as_all_others_do(
    alone: Path, shards: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "late.py", tmp_path / "out"
    script.write_text(_LATE)
    words = [str(word) for word in (alone, shards, out)]
    processes = fork(
        str(script), words, log=tmp_path / "log", cwd=ROOT, environments=DDP.environments()
    )
    assert processes.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert "3 of 3 shards are to be embedded, 30 samples" in (tmp_path / "log").read_text()
    assert index_of(out)["complete"] and len(stored(out)) == 3


def run(alone: Path, shards: Path, out: Path, **options: object) -> None:
    embed(Options(checkpoint=alone, data=(str(shards),), out=out, workers=0, **options))  # type: ignore[arg-type]


def test_several_views_are_crops_of_their_own_and_the_same_again(
    alone: Path, shards: Path, tmp_path: Path
) -> None:
    for name in ("first", "again"):
        run(alone, shards, tmp_path / name, views=3, seed=5)
    first, again = stored(tmp_path / "first"), stored(tmp_path / "again")
    rows = first["00000.safetensors"]["image"]
    assert rows.shape[:2] == (10, 3) and rows.dtype == torch.float16
    assert torch.equal(rows, again["00000.safetensors"]["image"])
    assert all(len(row.unique(dim=0)) == 3 for row in rows)


def test_captions_alone_need_no_image(alone: Path, shards: Path, tmp_path: Path) -> None:
    run(alone, shards, tmp_path / "out", images=False, texts=True)
    tensors = stored(tmp_path / "out")["00001.safetensors"]
    assert tensors.keys() == {"text", "text_sample"} and len(tensors["text"]) == 18
    assert [each["texts"] for each in index_of(tmp_path / "out")["shards"]] == [20, 18, 20]


def test_what_is_of_something_else_is_refused(alone: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(alone, shards, out)
    with pytest.raises(InputError, match="holds embeddings of dtype 'float16', not 'float32'"):
        run(alone, shards, out, dtype="float32")
    with pytest.raises(InputError, match=r"holds embeddings of (views 1, not 2|crop)"):
        run(alone, shards, out, views=2)
    other = tmp_path / "data"
    other.mkdir()
    for path in shards.glob("*.tar"):
        rewrite_shard(path, other / path.name, lambda name, content: content)
    run(alone, other, out)  # the same samples elsewhere
    rewrite_shard(
        shards / "00002.tar",
        other / "00002.tar",
        lambda name, content: content.replace(b"number", b"Number"),
    )
    with pytest.raises(InputError, match=r"of other data: 00002\.tar has 10 altered samples"):
        run(alone, other, out)
    build_index(other / "00002.tar", rebuild=True)
    with pytest.raises(InputError, match=r"of other data .3 shards; now there are 3, or one"):
        run(alone, other, out)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="holds something else than embeddings"):
        run(alone, shards, tmp_path / "taken")
    with pytest.raises(InputError, match="leaves nothing to embed"):
        run(alone, shards, tmp_path / "new", images=False)
    with pytest.raises(InputError, match="more than once"):
        embed(Options(checkpoint=alone, data=(str(shards), str(shards)), out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_header_tells_what_a_file_is_of(alone: Path, shards: Path, tmp_path: Path) -> None:
    run(alone, shards, tmp_path / "out")
    with safe_open(tmp_path / "out" / "00001.safetensors", framework="pt") as file:
        told = file.metadata()
    index = index_of(tmp_path / "out")
    shard = index["shards"][1]
    identity = [shard["name"], shard["samples"], shard["digest"]]
    assert json.loads(told[HEADER]) == {"about": index["about"], "shard": identity}


def test_lists_are_known_by_their_captions_and_long_ones_are_told(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 40), (9, 200, 30)).save(tmp_path / name)
    table = tmp_path / "pairs.csv"
    table.write_text(f"filepath\ttitle\n1.png\t{'word ' * 40}\n2.png\ttwo\n")
    run(alone, table, tmp_path / "out", texts=True)
    assert "1 captions have more than the 24 tokens of the model and were cut" in (
        capsys.readouterr().err
    )
    run(alone, table, tmp_path / "out", texts=True)
    table.write_text("filepath\ttitle\n1.png\tone\n2.png\ttwo\n")
    with pytest.raises(InputError, match="holds embeddings of other data"):
        run(alone, table, tmp_path / "out", texts=True)
