"""Released archives are read as they were written, in every style; damage is named."""

import json
import math
import random
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from frugal.common.errors import InputError
from frugal.flip.flax_index import Extent, read_index
from frugal.flip.t5x_archive import open_archive
from t5x_writer import (
    Style,
    array_extension,
    decode,
    sides_of,
    write_checkpoint,
    zip_folder,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"
ARCHIVE = GOLDEN / "t5x_checkpoint_file.zip"


def read(array) -> np.ndarray:
    """Into memory with strides of its own, which held something else."""
    backwards = np.full(array.shape[::-1], np.nan, dtype=np.float32)
    array.read_into(backwards.T)
    return backwards.T


def parameters(source: Path) -> dict[str, np.ndarray]:
    with open_archive(source) as archive:
        return {name: read(array) for name, array in archive.parameters.items()}


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    """A small tree: no two sides equal, one dimension to four, and none."""
    generator = np.random.default_rng(seed)
    shapes = {
        "img_encoder/embedding/kernel": (4, 5, 3, 7),
        "img_encoder/cls": (1, 1, 7),
        "txt_encoder/token_embedding/embedding": (23, 6),
        "txt_encoder/Transformer/encoderblock_00/LayerNorm_0/bias": (6,),
        "logit_scale": (1,),
        "scalar": (),
    }
    return {
        name: np.asarray(generator.standard_normal(shape), dtype=np.float32)
        for name, shape in shapes.items()
    }


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_every_array_of_the_reference_archive_is_read_exactly():
    expected = load_file(GOLDEN / "t5x_checkpoint_file_expected.safetensors")
    described = json.loads((GOLDEN / "t5x_checkpoint_file_expected.json").read_text())
    with open_archive(ARCHIVE) as archive:
        assert archive.step == described["step"]
        found = {name: read(array) for name, array in archive.arrays.items()}
    params = {n.replace("params/", "target/"): v for n, v in expected.items() if "params/" in n}
    state = {n.replace("opt/", "state/"): v for n, v in expected.items() if n.startswith("opt/")}
    assert len(params) == described["n_params"]
    assert found.keys() == params.keys() | state.keys()
    for name, value in (params | state).items():
        np.testing.assert_array_equal(found[name].reshape(value.shape), value, err_msg=name)


STYLES = {
    "as written locally": Style(),
    "a bucket's": Style(driver="gcs"),
    "gfile": Style(driver="gfile"),
    "an old tensorstore's": Style(driver="gfile", path_on_top=True),
    "old, on a bucket": Style(driver="gcs", path_on_top=True),
    "paths of another machine": Style(path_prefix="/home/somebody/checkpoint_2/"),
    "chunks that divide": Style(chunks=sides_of(1)),
    "chunks in every dimension, ragged": Style(chunks=sides_of(3, 2, 2, 4)),
    "chunks, ragged, Fortran": Style(chunks=sides_of(3, 2, 2, 4), order="F"),
    "Fortran": Style(order="F"),
    "chunk numbers in folders": Style(chunks=sides_of(2, 4), separator="/"),
    "no separator named": Style(chunks=sides_of(2, 4), separator=None),
    "zlib": Style(compressor="zlib", chunks=sides_of(5)),
    "uncompressed": Style(compressor=None, chunks=sides_of(5)),
    "float16": Style(dtype="<f2", chunks=sides_of(5)),
    "bfloat16": Style(dtype="bfloat16", chunks=sides_of(5)),
    "bfloat16, Fortran": Style(dtype="bfloat16", order="F"),
    "big-endian": Style(dtype=">f4"),
    "float64": Style(dtype="<f8"),
    "all inline": Style(inline=lambda name: True),
    "inline, flax before msgpack 1": Style(inline=lambda name: True, raw_as_text=True),
    "inline in pieces": Style(inline=lambda name: True, chunked_from=10),
    "inline in more than ten pieces": Style(inline=lambda name: True, chunked_from=2),
    "inline bfloat16": Style(inline=lambda name: True, dtype="bfloat16"),
    "inline float16 in pieces": Style(inline=lambda n: True, dtype="<f2", chunked_from=7),
    "some inline": Style(inline=lambda name: name.startswith("target/img"), driver="gcs"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_every_style_is_read_as_it_was_written(tmp_path: Path, style: Style, packed: bool):
    params = draw()
    source = tmp_path / "files"
    write_checkpoint(source / "checkpoint_2", params, style=style)
    if packed:
        source = zip_folder(source, tmp_path / "archive.zip")
    expected = {name: decode(value, style.dtype) for name, value in params.items()}
    assert_equal(parameters(source), expected)


def test_an_archive_is_found_from_wherever_it_is_pointed_at(tmp_path: Path):
    params = draw()
    step = write_checkpoint(tmp_path / "unpacked" / "checkpoint_70", params, step=70)
    deep = tmp_path / "deep" / "flip_large" / "release"
    write_checkpoint(deep / "checkpoint_70", params, step=70)
    renamed = write_checkpoint(tmp_path / "renamed" / "flip_large", params, step=70)
    shadow = tmp_path / "mac" / "__MACOSX" / "checkpoint_70"
    shadow.mkdir(parents=True)
    (shadow / "._checkpoint").write_bytes(b"\0\5\26\7")
    (shadow / "checkpoint").write_bytes(b"\0\5\26\7")
    write_checkpoint(tmp_path / "mac" / "checkpoint_70", params, step=70)
    sources = [
        step.parent,
        step,
        step / "checkpoint",
        tmp_path / "deep",
        renamed,
        renamed.parent,
        zip_folder(step.parent, tmp_path / "parent.zip"),
        zip_folder(step, tmp_path / "step.zip"),
        zip_folder(tmp_path / "deep", tmp_path / "deep.zip"),
        zip_folder(tmp_path / "mac", tmp_path / "mac.zip"),
    ]
    for source in sources:
        assert_equal(parameters(source), params)
        with open_archive(source) as archive:
            assert archive.step == 70


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_of_several_steps_the_newest_whole_one_is_taken(tmp_path: Path, packed: bool):
    source = tmp_path / "run"
    for step in (90, 1000, 200):
        write_checkpoint(source / f"checkpoint_{step}", draw(step), step=step)
    write_checkpoint(source / "checkpoint_3000.tmp-1659", draw(1), step=3000)
    if packed:
        source = zip_folder(source, tmp_path / "run.zip")
    with open_archive(source) as archive:
        assert archive.step == 1000
        assert list(archive.older) == ["checkpoint_200", "checkpoint_90"]
    assert_equal(parameters(source), draw(1000))


def test_checkpoints_of_several_runs_are_not_guessed_from(tmp_path: Path):
    for run in ("masked", "tuned"):
        write_checkpoint(tmp_path / run / "checkpoint_5", draw())
    with pytest.raises(InputError, match=r"masked/checkpoint_5 and tuned/checkpoint_5"):
        open_archive(tmp_path)


def test_without_optimizer_state_the_folder_tells_the_step(tmp_path: Path, monkeypatch):
    step = write_checkpoint(tmp_path / "a" / "checkpoint_380000", draw(), step=None)
    monkeypatch.chdir(step)
    for source in (step.parent, step, step / "checkpoint", Path()):
        with open_archive(source) as archive:
            assert archive.step == 380_000
    renamed = write_checkpoint(tmp_path / "weights", draw(), step=None)
    with open_archive(renamed) as archive:
        assert archive.step == 0


def test_moments_are_read_flattened_or_not(tmp_path: Path):
    params = draw()
    first = {f"mu/{name}": value + 1 for name, value in params.items()}
    second = {f"nu/{name}": value.reshape(-1, 1) ** 2 for name, value in params.items()}
    folder = write_checkpoint(tmp_path / "checkpoint_2", params, moments=first | second)
    with open_archive(folder) as archive:
        for name, value in (first | second).items():
            np.testing.assert_array_equal(
                read(archive.arrays[f"state/param_states/0/{name}"]), value
            )


def test_leaves_of_every_kind_beside_the_arrays_are_no_obstacle(tmp_path: Path):
    params = draw()
    extra = {
        "target/extra/scalar": array_extension(np.float32(3), code=3),
        "state/complex": msgpack.ExtType(2, msgpack.packb([1.0, -2.0])),
        "state/timestamp": msgpack.Timestamp(1, 2),
        "state/nothing": None,
        "state/flags": [True, False, None, -1, -200, 2**40, 1.5, "x" * 300, b"y" * 70_000],
        "state/empty": {},
        "state/elsewhere": {"driver": "n5", "kvstore": "gs://bucket/x"},
        "state/lost": {"driver": "zarr", "kvstore": {"driver": "file", "path": "gone/"}},
        "flax_mutables": {str(i): i for i in range(70_000)},
    }
    folder = write_checkpoint(tmp_path / "checkpoint_2", params, extra=extra)
    found = parameters(folder)
    assert found.pop("extra/scalar") == 3
    assert_equal(found, params)


def test_the_index_is_read_as_the_msgpack_package_reads_it():
    generator = random.Random(5)

    def value(depth: int):
        kind = generator.choice(("int", "float", "text", "flag", "list", "map"))
        if kind in ("list", "map") and depth == 4:
            kind = "int"
        length = generator.choice((0, 1, 3, 15, 16, 31, 32, 40))
        if kind == "int":
            return generator.choice((1, -1)) * generator.getrandbits(generator.randrange(1, 63))
        if kind == "float":
            return generator.gauss(0, 1)
        if kind == "text":
            return "é" * generator.choice((0, 5, 15, 16, 100, 200, 40_000))
        if kind == "flag":
            return generator.choice((True, False, None))
        if kind == "list":
            return [value(depth + 1) for _ in range(length)]
        return {f"k{i}": value(depth + 1) for i in range(length)}

    for _ in range(30):
        tree = {"a": value(0), "b": value(0)}
        raw = msgpack.packb(tree)
        assert read_index(memoryview(raw)) == tree


@pytest.mark.parametrize("size", [0, 1, 4, 8, 16, 255, 256, 70_000])
def test_arrays_of_any_size_are_places_in_the_index(size: int):
    values = np.arange(size, dtype=np.uint8)
    raw = msgpack.packb({"a": array_extension(values), "b": 1})
    tree = read_index(memoryview(raw))
    extent = tree["a"]
    assert tree["b"] == 1
    assert isinstance(extent, Extent)
    assert (extent.shape, extent.dtype) == ((size,), "uint8")
    assert raw[extent.offset : extent.offset + extent.size] == values.tobytes()


@pytest.mark.parametrize(
    ("fill", "expected"), [(0.0, 0.0), (-1.5, -1.5), ("NaN", math.nan), ("-Infinity", -math.inf)]
)
def test_chunks_that_are_not_stored_hold_the_fill_value(tmp_path: Path, fill, expected):
    values = draw()["txt_encoder/token_embedding/embedding"]
    values[5:10, 2:4] = 0
    style = Style(chunks=sides_of(5, 2), fill_value=fill, leave_out_zeros=True)
    folder = write_checkpoint(tmp_path / "checkpoint_2", {"table": values}, style=style)
    assert not (folder / "target.table" / "1.1").exists()
    values[5:10, 2:4] = expected
    np.testing.assert_array_equal(parameters(folder)["table"], values)


def test_without_a_fill_value_no_chunk_may_be_missing(tmp_path: Path):
    style = Style(chunks=sides_of(5, 2))
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), style=style)
    (folder / "target.txt_encoder.token_embedding.embedding" / "3.1").unlink()
    with pytest.raises(
        InputError, match=r"token_embedding/embedding is damaged: its chunk \S+3\.1"
    ):
        parameters(folder)


def damaged(tmp_path: Path, damage, *, compressor: str | None = "gzip") -> Path:
    """An archive one of whose chunks went through ``damage``."""
    style = Style(chunks=sides_of(5, 2), compressor=compressor)
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), style=style)
    chunk = folder / "target.txt_encoder.token_embedding.embedding" / "3.1"
    chunk.write_bytes(damage(bytearray(chunk.read_bytes())))
    return folder


def flip_a_bit(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 4
    return content


DAMAGES = {
    "altered": flip_a_bit,
    "truncated": lambda content: content[:-3],
    "truncated to its half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "foreign": lambda content: b"<html>404</html>",
    "too long": lambda content: content + b"\0",
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("compressor", ["gzip", "zlib"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_chunk_is_named_with_its_array(tmp_path: Path, damage, compressor, packed):
    source = damaged(tmp_path, damage, compressor=compressor)
    if packed:
        source = zip_folder(source, tmp_path / "archive.zip")
    with pytest.raises(InputError) as refusal:
        parameters(source)
    sentence = str(refusal.value)
    assert "the array txt_encoder/token_embedding/embedding is damaged" in sentence
    assert "target.txt_encoder.token_embedding.embedding/3.1" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("damage", ["truncated", "empty", "too long"])
def test_an_uncompressed_chunk_of_another_size_is_damaged(tmp_path: Path, damage):
    with pytest.raises(InputError, match=r"embedding is damaged: its chunk \S+3\.1"):
        parameters(damaged(tmp_path, DAMAGES[damage], compressor=None))


def test_a_chunk_that_decompresses_to_another_size_is_damaged(tmp_path: Path):
    folder = damaged(tmp_path, lambda content: content)
    array = folder / "target.txt_encoder.token_embedding.embedding"
    for key, reason in (("0.0", "is longer than its shape"), ("2.0", "ends early")):
        kept = json.loads((array / ".zarray").read_text())
        rows = 4 if key == "0.0" else 6
        (array / ".zarray").write_text(json.dumps(kept | {"chunks": [rows, 2]}))
        with pytest.raises(InputError, match=reason):
            parameters(folder)
        (array / ".zarray").write_text(json.dumps(kept))


def test_a_bit_that_flipped_inside_a_zip_is_noticed(tmp_path: Path):
    style = Style(compressor=None)
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), style=style)
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(folder))
    chunk = (folder / "target.txt_encoder.token_embedding.embedding" / "0.0").read_bytes()
    content = bytearray(path.read_bytes())
    content[content.index(chunk) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"embedding is damaged: its chunk \S+ cannot be decomp"):
        parameters(path)


def test_an_array_without_its_folder_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw())
    (folder / "target.img_encoder.cls" / ".zarray").unlink()
    with pytest.raises(InputError, match="the array img_encoder/cls is missing"):
        parameters(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"zarr_format": 3}, "zarr format 3"),
        ({"compressor": {"id": "blosc"}}, "compressor 'blosc'"),
        ({"compressor": {}}, None),
        ({"compressor": {"level": 1}}, "incomplete"),
        ({"filters": [{"id": "delta"}]}, "filters"),
        ({"dtype": "<c8"}, "'<c8'"),
        ({"dtype": "nonsense"}, "'nonsense'"),
        ({"dtype": [["a", "<f4"]]}, "not supported"),
        ({"chunks": [1, 1]}, "chunks of"),
        ({"chunks": [1, 0, 7]}, "chunks of"),
        ({"shape": None}, "incomplete"),
        ({"fill_value": "AAAA"}, "AAAA"),
    ],
)
def test_what_an_array_cannot_be_read_for_is_said(tmp_path: Path, change, reason):
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), style=Style(compressor=None))
    file = folder / "target.img_encoder.cls" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if reason is None:  # an empty compressor is none
        parameters(folder)
        return
    with pytest.raises(InputError, match="the array img_encoder/cls") as refusal:
        parameters(folder)
    assert reason in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_a_damaged_description_of_an_array_is_named(tmp_path: Path, content: bytes):
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw())
    (folder / "target.img_encoder.cls" / ".zarray").write_bytes(content)
    with pytest.raises(InputError, match=r"img_encoder/cls cannot be read: its \S+\.zarray"):
        parameters(folder)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_index_cut_anywhere_is_refused(tmp_path: Path, packed: bool):
    style = Style(inline=lambda name: "img" in name)
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), style=style)
    index = folder / "checkpoint"
    content = index.read_bytes()
    for size in [0, 1, 2, 10, *range(30, len(content), 97), len(content) - 1]:
        index.write_bytes(content[:size])
        source = zip_folder(folder, tmp_path / "archive.zip") if packed else folder
        with pytest.raises(InputError, match="no index of a t5x checkpoint"):
            open_archive(source)


@pytest.mark.parametrize(
    "content",
    [
        b'model_checkpoint_path: "model.ckpt-1"\n',
        b"PK",
        b"\x80\x04\x95torch",
        b"\x81\xc1",
        b"\x81\xa1\xff\x01",
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\x90\x01",
        b"\x81\xa1a\xc7\x05\x01hello",
        b"\x81\xa1a\xd4\x01\x01",
        msgpack.packb([1, 2]),
        msgpack.packb({"optimizer": {"target": 3}}),
        msgpack.packb({"model": {}}),
        msgpack.packb({"target": {"a": {"__msgpack_chunked_array__": True, "shape": {}}}}),
        msgpack.packb({"target": {"a": msgpack.ExtType(1, msgpack.packb(["x", "f", b""]))}}),
    ],
)
def test_files_that_are_no_index_are_refused_in_one_sentence(tmp_path: Path, content: bytes):
    (tmp_path / "checkpoint").write_bytes(content)
    for source in (tmp_path, tmp_path / "checkpoint"):
        with pytest.raises(InputError) as refusal:
            open_archive(source)
        assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["checkpoint", "target.img_encoder.cls/.zarray", "zip"])
def test_random_damage_never_ends_in_another_error(tmp_path: Path, file: str):
    generator = random.Random(11)
    style = Style(inline=lambda name: "embedding" in name, chunked_from=20)
    folder = write_checkpoint(tmp_path / "files", draw(), style=style)
    source = zip_folder(folder, tmp_path / "archive.zip") if file == "zip" else folder
    victim = source if file == "zip" else folder / file
    content = victim.read_bytes()
    refused = 0
    for _ in range(400):
        altered = bytearray(content)
        for _ in range(generator.choice((1, 3, 20))):
            altered[generator.randrange(len(altered))] = generator.randrange(256)
        victim.write_bytes(altered)
        try:
            with open_archive(source) as archive:
                arrays = archive.parameters.values()
                if all(math.prod(array.shape) < 1_000_000 for array in arrays):
                    parameters(source)
                assert archive.step >= 0
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_what_is_no_archive_is_refused_in_one_sentence(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"\0" * 100)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n")
    whole = ARCHIVE.read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "begun.zip").write_bytes(whole[:3])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("readme.txt", "hello")
    expected = {
        "nothing": "there is no",
        "empty": "holds no t5x checkpoint",
        "file.bin": "no index of a t5x checkpoint",
        "photo.png": "no index of a t5x checkpoint",
        "cut.zip": "no whole zip file",
        "begun.zip": "no whole zip file",
        "other.zip": "holds no t5x checkpoint",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=words) as refusal:
            open_archive(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value)


def test_an_encrypted_zip_is_refused(tmp_path: Path):
    path = tmp_path / "archive.zip"
    content = bytearray(ARCHIVE.read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + place] |= 1  # the flag of encryption
    path.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        open_archive(path)


@pytest.mark.parametrize(
    "leaf",
    [
        {"driver": "zarr"},
        {"driver": "zarr", "path": "../../etc/"},
        {"driver": "zarr", "kvstore": {"driver": "file"}, "path": ""},
        {"driver": "zarr", "kvstore": {"driver": "file", "path": "/"}},
    ],
)
def test_an_array_without_a_path_in_the_index_is_named(tmp_path: Path, leaf):
    folder = write_checkpoint(tmp_path / "checkpoint_2", draw(), extra={"target/a": leaf})
    with pytest.raises(InputError, match="the array a is damaged: the index does not tell its"):
        parameters(folder)


@pytest.mark.parametrize(
    "leaf",
    [
        {"kvstore": "gs://bucket/run/checkpoint_2/target.img_encoder.cls/"},
        {"kvstore": {"driver": "gcs", "path": "run/7/"}, "path": "target.img_encoder.cls"},
        {"kvstore": {"driver": "file", "path": "./target.img_encoder.cls"}},
    ],
)
def test_a_path_is_that_of_a_folder_beside_the_index(tmp_path: Path, leaf):
    params = draw()
    extra = {"target/same": {"driver": "zarr"} | leaf}
    folder = write_checkpoint(tmp_path / "checkpoint_2", params, extra=extra)
    np.testing.assert_array_equal(parameters(folder)["same"], params["img_encoder/cls"])


def test_nothing_is_written_and_nothing_read_beside_the_archive(tmp_path: Path):
    params = draw()
    folder = write_checkpoint(tmp_path / "in" / "checkpoint_2", params)
    outside = tmp_path / "target.outside"
    folder.joinpath("target.img_encoder.cls").rename(outside)
    index = msgpack.unpackb(
        (folder / "checkpoint").read_bytes(),
        ext_hook=lambda code, data: msgpack.ExtType(code, data),
    )
    leaf = index["optimizer"]["target"]["img_encoder"]["cls"]
    for path in (f"{outside}/", "../../target.outside/"):
        leaf["kvstore"]["path"] = path
        (folder / "checkpoint").write_bytes(msgpack.packb(index))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="img_encoder/cls"):
            parameters(folder)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "style",
    [
        Style(),
        Style(compressor=None),
        Style(dtype="bfloat16"),
        Style(order="F"),
        Style(inline=lambda name: True),
        Style(inline=lambda name: True, chunked_from=3_000_000),
    ],
    ids=["one chunk", "uncompressed", "bfloat16", "Fortran", "inline", "inline in pieces"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_array_is_never_held_twice(tmp_path: Path, style: Style, packed: bool):
    values = np.random.default_rng(1).standard_normal((8_000, 1_000)).astype(np.float32)
    source = tmp_path / "files"
    write_checkpoint(source / "checkpoint_2", {"table": values}, style=style)
    if packed:
        source = zip_folder(source, tmp_path / "archive.zip")
    result = np.zeros((1_000, 8_000), dtype=np.float32).T  # as a kernel's transposed view
    tracemalloc.start()
    with open_archive(source) as archive:
        archive.parameters["table"].read_into(result)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(result, decode(values, style.dtype))
    assert peak < values.nbytes // 4


@pytest.mark.parametrize("library", ["msgpack", "zarr"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, library: str):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library}.*pip install frugal-flip\[t5x\]") as refusal:
        parameters(ARCHIVE)
    assert "\n" not in str(refusal.value)


def test_a_full_disk_for_temporary_files_is_named(tmp_path: Path):
    values = {"table": np.ones((1000, 1000), np.float32)}
    folder = write_checkpoint(tmp_path / "checkpoint_2", values)
    code = (
        "import resource; from pathlib import Path; import numpy as np\n"
        "from frugal.flip.t5x_archive import open_archive\n"
        f"with open_archive(Path({str(folder)!r})) as archive:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_001, 2_000_001))\n"
        "    archive.arrays['target/table'].read_into(np.empty((1000, 1000), np.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError" in done.stderr.splitlines()[-1]
    assert "TMPDIR" in done.stderr.splitlines()[-1]


def test_reading_imports_neither_jax_nor_tensorstore_nor_torch():
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from frugal.flip.t5x_archive import open_archive\n"
        f"with open_archive(Path({str(ARCHIVE)!r})) as archive:\n"
        "    for array in archive.arrays.values():\n"
        "        array.read_into(np.empty(array.shape))\n"
        "assert not {'jax', 'flax', 'tensorstore', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
