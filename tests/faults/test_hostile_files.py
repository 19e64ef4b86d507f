"""Files that somebody made to do harm, in every place where a file is read.

Each is read in a process whose memory, time and writing are watched (``benchmarks/confined.py``).
"""

from __future__ import annotations

import io
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import hostile
from confined import FINE, Bounds, Outcome, confined_each

from frugal.cit.curation_files import read_about
from frugal.cit.metadata import Metadata
from frugal.cit.trained_pairs import _open as open_pairs
from frugal.cit.yfcc import _Archives, _read_numbers, _read_subset, _rows
from frugal.clipa.frequency_masking import FrequencyMasking
from frugal.clipa.published_weights import read_published
from frugal.common.checkpoint.store import (
    Checkpoint,
    find_checkpoint,
    load_weights,
    newest_checkpoint,
    save_weights,
)
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.decoding import Window, open_image, resize_window
from frugal.common.data.samples import Fields, decode_classes
from frugal.common.data.stores.class_folders import read_class_folders
from frugal.common.data.stores.csv import open_list
from frugal.common.data.stores.folder import open_image_folder
from frugal.common.data.stores.index import load_index, read_summary, write_index
from frugal.common.data.stores.streamed_tar import stream_tar
from frugal.common.data.stores.tar import TarReader, index_tar
from frugal.common.data.stores.tfrecord import index_records
from frugal.common.data.tokenizers import HuggingFace, load_tokenizer
from frugal.common.data.word_pieces import read_entries
from frugal.common.engine.deepspeed import read_config
from frugal.common.engine.logger import _keep_steps
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import load_sample_results
from frugal.common.evaluation.class_names import held_out_classes
from frugal.common.evaluation.features import _read as read_features
from frugal.common.evaluation.results import read_facts
from frugal.common.evaluation.sugarcrepe import read_contrasts
from frugal.common.files import LARGEST_FILE, read_bytes, read_json, read_lines
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.named import clip_encoder
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.report.collect import read_metrics
from frugal.common.transfer.masked_folder import _decode_mask
from frugal.common.weights.files import read_weights
from frugal.common.weights.load import load_model
from frugal.flip.recipes import RECIPES
from frugal.flip.t5x_archive import open_archive

pytestmark = pytest.mark.slow

MIB = 1 << 20
MEMORY = 256 * MIB
"""Bytes by which a process may grow for a file of a few KB."""
Reader = tuple[str, Callable[[Path], object]]
"""The name of a file, and what reads it, or the folder that it lies in."""


def faults(
    contents: Mapping[str, bytes],
    write_and_read: Callable[[bytes], object],
    folder: Path,
    *,
    memory: int = MEMORY,
    seconds: float = 10,
) -> dict[str, Outcome]:
    """What is neither read nor refused in one sentence nor damaged, or takes too much."""
    canary = folder / "canary"
    actions = [lambda content=content: write_and_read(content) for content in contents.values()]
    logging.disable(logging.CRITICAL)
    try:
        outcomes = list(confined_each(actions, Bounds(seconds=seconds, folders=(folder,))))
    finally:
        logging.disable(logging.NOTSET)
    assert not canary.exists()
    return {
        name: outcome
        for name, outcome in zip(contents, outcomes, strict=True)
        if outcome.ending not in FINE or "\n" in outcome.words or outcome.memory > memory
    }


def _parent(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda file: read(file.parent)


def _run(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Of a file that lies in ``checkpoints/step_000000020``."""
    return lambda file: read(file.parents[2])


def _counts(file: Path) -> object:
    return FrequencyMasking(counts=file)._common_words()


def _weights_of(run: Path) -> object:
    checkpoint = find_checkpoint(run)
    checkpoint.tensor_bytes()
    return load_weights(checkpoint)


def _tensors_of(file: Path) -> object:
    """A file of a checkpoint whose checksum is right, as whoever altered it would have it."""
    entry = {"name": file.name, "tensors": ["weight/a"], "bytes": 0, "crc32": 0}
    checkpoint = Checkpoint(file.parent, {"step": 1, "files": [entry]})
    checkpoint.tensor_bytes()
    return checkpoint.reader()("weight/a")


def _tokenized(folder: Path) -> object:
    return HuggingFace(name=str(folder)).load()


TEXT_READERS: dict[str, Reader] = {
    "recipe": ("recipe.json", load_recipe),
    "state of a checkpoint": ("state.json", _parent(find_checkpoint)),
    "best checkpoint": ("best.json", find_checkpoint),
    "tokenizer of a run": ("tokenizer_description.json", _parent(load_tokenizer)),
    "vocabulary": ("vocab.txt", read_entries),
    "tokenizer of transformers": ("tokenizer.json", _parent(_tokenized)),
    "word pieces of transformers": ("tokenizer.json", _parent(read_entries)),
    "names of classes": ("classnames.json", _parent(
        lambda folder: read_class_folders(folder, ("jpg",), PassedOver()))),
    "held out classes": ("held_out.txt", _parent(lambda folder: held_out_classes(folder, 9))),
    "a list": ("list.txt", read_lines),
    "any JSON": ("a.json", read_json),
    "metadata of CiT": ("names.txt", lambda file: Metadata(sources=(str(file),)).classes()),
    "word counts": ("counts.json", _counts),
    "settings of DeepSpeed": ("zero.json", read_config),
    "contrasts": ("swap_att.json", _parent(lambda folder: read_contrasts(folder, None))),
    "numbers of an evaluation": ("zero_shot.json", _parent(
        lambda folder: read_facts(folder, "zero_shot"))),
    "logged metrics": ("metrics.jsonl", _parent(read_metrics)),
    "metrics of a resumed run": ("metrics.jsonl", lambda file: _keep_steps(
        file, 0, 3, logging.getLogger("frugal"))),
    "caption list": ("captions.csv", lambda file: open_list(file, Fields())),
    "index of weights": ("w.safetensors.index.json", read_weights),
    "settings of open_clip": ("open_clip_config.json", _parent(load_model)),
    "settings of transformers or timm": ("config.json", _parent(load_model)),
    "description of a run": ("model.json", _parent(load_model)),
    "numbers of YFCC": ("subset.tsv", _read_subset),
}  # fmt: skip
"""Everything that reads text or JSON."""
BINARY_READERS: dict[str, Reader] = {
    "weights, safetensors": ("w.safetensors", read_weights),
    "weights, torch": ("w.pt", read_weights),
    "weights, any": ("pytorch_model.bin", read_weights),
    "tensors of a checkpoint": ("tensors.safetensors", _tensors_of),
    "CLIPA's weights": ("w.npz", read_published),
    "CLIPA's weights, torch": ("w.pt", read_published),
    "CLIPA's weights, safetensors": ("w.safetensors", read_published),
    "FLIP's archive": ("flip.zip", open_archive),
    "shard": ("0.tar", index_tar),
    "streamed shard": ("0.tar", lambda file: list(stream_tar(str(file)))),
    "records": ("0.tfrecord", index_records),
    "index of a shard": ("0.tar.index.safetensors", lambda file: _indexed(file.with_name("0.tar"))),
    "picture": ("a.jpg", lambda file: _see(read_bytes(file))),
    "mask": ("a.png", lambda file: _decode_mask(read_bytes(file))),
    "classes of a sample": ("a.npy", lambda file: decode_classes(read_bytes(file))),
    "kept embeddings": ("a.safetensors", lambda file: read_features(file, "")),
    "outcomes of an evaluation": ("a.safetensors", load_sample_results),
    "curation of CiT": ("0.parquet", read_about),
    "trained pairs of CiT": ("0.parquet", open_pairs),
    "texts of YFCC": ("0.parquet", lambda file: list(_rows(file))),
    "ids of YFCC": ("0.npy", _read_numbers),
    "pictures of YFCC": ("345.zip", _parent(
        lambda folder: _image_of_yfcc(folder))),
}  # fmt: skip
"""Everything that reads anything else."""


def _indexed(shard: Path) -> None:
    shard.write_bytes(bytes(10_240))
    read_summary(shard)
    load_index(shard)


def _image_of_yfcc(folder: Path) -> None:
    archives = folder / "12"
    archives.mkdir(exist_ok=True)
    (folder / "345.zip").rename(archives / "345.zip")
    _Archives(folder).image("12345678")


def _see(encoded: bytes) -> None:
    image = open_image(encoded)
    resize_window(image, Window(0, 0, image.height, image.width), (16, 16), reduced=True)


def _written(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def write_and_read(content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return write_and_read


@pytest.mark.parametrize("reader", [*TEXT_READERS, *BINARY_READERS])
def test_no_pickle_is_run_and_no_content_is_more_than_a_sentence(
    reader: str, tmp_path: Path
) -> None:
    name, read = (TEXT_READERS | BINARY_READERS)[reader]
    canary = tmp_path / "canary"
    contents = {**hostile.pickles(canary), **hostile.torch_pickles(canary), **hostile.TEXTS}
    if "safetensors" in name or reader == "weights, any":
        contents |= hostile.lying_safetensors()
    assert not faults(contents, _written(tmp_path, name, read), tmp_path)


@pytest.mark.parametrize("reader", TEXT_READERS)
def test_a_text_file_of_gibibytes_is_refused_before_it_is_read(reader: str, tmp_path: Path) -> None:
    name, read = TEXT_READERS[reader]
    if reader in ("caption list", "numbers of YFCC", "metrics of a resumed run", "logged metrics"):
        pytest.skip("it is read line by line, or may be as long as a run")

    def write_and_read(content: bytes) -> object:
        with (tmp_path / name).open("wb") as file:
            file.truncate(8 << 30)
        return read(tmp_path / name)

    assert not faults({"holes": b""}, write_and_read, tmp_path, memory=64 * MIB)


# ------------------------------------------------------------------------------------------------
# Weights


def test_a_small_file_of_torchs_never_becomes_a_large_one(tmp_path: Path) -> None:
    bombs = hostile.torch_bombs(bytes(200 * MIB))
    found = faults(bombs, _written(tmp_path, "w.pt", read_weights), tmp_path, memory=64 * MIB)
    assert not found
    with pytest.raises(InputError, match="would unpack to 209,71"):
        _written(tmp_path, "w.pt", read_weights)(bombs["deflated zeros"])


def test_an_npz_that_swells_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "w.npz", **{"params/a": np.zeros(200 * MIB, np.uint8)})
    whole = (tmp_path / "w.npz").read_bytes()
    write_and_read = _written(tmp_path, "w.npz", read_published)
    assert not faults({"zeros": whole}, write_and_read, tmp_path, memory=64 * MIB)
    with pytest.raises(InputError, match="would unpack to"):
        write_and_read(whole)


def test_a_part_of_an_index_lies_beside_it_and_is_no_index(tmp_path: Path) -> None:
    index = tmp_path / "w.safetensors.index.json"
    (tmp_path.parent / "other.safetensors").touch()
    for part in ("../other.safetensors", "/etc/passwd", index.name):
        index.write_text(json.dumps({"weight_map": {"a": part}}))
        with pytest.raises(InputError, match="no file of weights beside it"):
            read_weights(index)


SETTINGS = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vision_cfg", "text_cfg"])
def test_open_clips_settings_are_believed_as_far_as_the_weights_bear_them_out(
    tower: str, tmp_path: Path
) -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**SETTINGS)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    strange = (10**8, 10**9, 10**18, 10**30, 10**400, -1, 0, 1.5, True, "a", [], {}, [10**9])
    contents = {
        f"{name} = {str(value)[:9]}": json.dumps(_with(SETTINGS, tower, name, value)).encode()
        for name in (*SETTINGS[tower], "mlp_ratio", "ls_init_value", "pool_type")
        for value in strange
    }
    for name, value in (("embed_dim", 10**18), (tower, 3), (tower, "a"), (tower, [1])):
        contents[f"{name} = {value}"] = json.dumps(SETTINGS | {name: value}).encode()
    contents = {name: b'{"model_cfg": %s}' % text for name, text in contents.items()}
    write_and_read = _written(tmp_path, "open_clip_config.json", _parent(load_model))
    assert not faults(contents, write_and_read, tmp_path, memory=768 * MIB)
    for name in ("layers", "width"):
        text = json.dumps(_with(SETTINGS, tower, name, 10**8)).encode()
        with pytest.raises(InputError, match=f"says that {name} is 100000000, but the weights"):
            write_and_read(b'{"model_cfg": %s}' % text)


def _with(settings: Mapping[str, Any], tower: str, name: str, value: Any) -> dict[str, Any]:
    return {**settings, tower: {**settings[tower], name: value}}


def _tiny() -> DualEncoderConfig:
    config = clip_encoder("B/16")
    image = {"width": 24, "depth": 1, "heads": 3, "mlp_width": 60, "patch_size": 8}
    text = {"width": 20, "depth": 1, "heads": 2, "mlp_width": 48, "length": 16}
    return replace(
        config,
        image=replace(config.image, **image, image_size=32),
        text=replace(config.text, **text),
        embed_dim=12,
    )


def _write_run(folder: Path) -> dict[str, Any]:
    """A run directory with weights alone, and its recipe."""
    recipe = replace(RECIPES["demo"](), model=_tiny())
    weights = {f"model.{n}": t for n, t in DualEncoder(recipe.model).state_dict().items()}
    save_weights(folder / "checkpoints", weights, step=20)
    recipe.data.save_tokenizer(folder / "tokenizer")
    described = to_json(recipe)
    (folder / "recipe.json").write_text(json.dumps(described))
    return described


def test_a_recipe_is_believed_as_far_as_the_weights_of_its_run_bear_it_out(tmp_path: Path) -> None:
    recipe = _write_run(tmp_path)
    assert isinstance(load_model(tmp_path), ModelBundle)
    contents = {}
    for tower in ("image", "text"):
        for name in ("depth", "width", "mlp_width", "heads", "pooling"):
            for value in (10**8, 10**30, -1, "a", []):
                changed = json.loads(json.dumps(recipe))
                changed["model"][tower][name] = value
                contents[f"{tower}.{name} = {value}"] = json.dumps(changed).encode()
    for kind in ("os.system", "frugal.common.recipe.difference", 3, ["a"], None):
        contents[f"type = {kind}"] = json.dumps(recipe | {"type": kind}).encode()
    write_and_read = _written(tmp_path, "recipe.json", _parent(load_model))
    assert not faults(contents, write_and_read, tmp_path)


# ------------------------------------------------------------------------------------------------
# Checkpoints


def _two_checkpoints(folder: Path) -> Path:
    for step in (10, 20):
        save_weights(folder / "checkpoints", {"model.a": torch.ones(3)}, step=step)
    return folder / "checkpoints"


@pytest.mark.parametrize("content", [b"\xff\0garbage", b"", b"../../etc", b"step_000000099"])
def test_a_garbage_pointer_is_told_and_the_newest_checkpoint_taken(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _two_checkpoints(tmp_path)
    (folder / "latest").write_bytes(content)
    found = newest_checkpoint(folder)
    assert found is not None and found.step == 20
    assert "which is no checkpoint that is there; the newest one is taken" in caplog.text


def test_a_checkpoint_without_its_last_file_is_called_unfinished(tmp_path: Path) -> None:
    for folder in _two_checkpoints(tmp_path).glob("step_*"):
        (folder / "state.json").unlink()
    with pytest.raises(InputError, match=r"000020.state\.json is not there, .* no whole"):
        find_checkpoint(tmp_path)


def test_a_state_that_names_files_elsewhere_or_tensors_that_are_not_there_is_refused(
    tmp_path: Path,
) -> None:
    folder = _two_checkpoints(tmp_path) / "step_000000020"
    state = json.loads((folder / "state.json").read_text())
    contents = {}
    for name, value in (
        ("name", "../step_000000010/tensors-00000-of-00001.safetensors"), ("name", "/etc/passwd"),
        ("name", 3), ("tensors", ["weight/other"]), ("tensors", 3), ("tensors", [[]]),
        ("bytes", "a"), ("crc32", None),
    ):  # fmt: skip
        entry = state["files"][0] | {name: value}
        contents[f"{name} = {value}"] = json.dumps(state | {"files": [entry]}).encode()
    for name, value in (("step", "a"), ("step", -1), ("step", 1.5), ("files", 3), ("files", [3])):
        contents[f"{name} = {value}"] = json.dumps(state | {name: value}).encode()
    read = _written(folder, "state.json", lambda file: _weights_of(file.parent))
    assert not faults(contents, read, tmp_path)
    for content in contents.values():
        with pytest.raises(InputError):
            read(content)


def test_lines_of_the_metrics_that_are_none_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = b'{"step": 1, "samples": 24}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b"garbage\n\n" + good + b'{"step": 2, "sam')
    assert len(read_metrics(tmp_path)) == 2
    assert "metrics.jsonl: 2 lines are no JSON and are left out" in caplog.text
    caplog.clear()
    _keep_steps(tmp_path / "metrics.jsonl", 0, 5, logging.getLogger("frugal"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == 2 * good
    assert "2 lines are no JSON of a step and are left out" in caplog.text


# ------------------------------------------------------------------------------------------------
# Shards and pictures


def _read_shard(shard: Path) -> None:
    write_index(shard, index_tar(shard))
    reader = TarReader(shard, Fields())
    for number in range(read_summary(shard).num_samples):
        try:
            reader.key(number)
            _see(reader.read(number).image)
        except Damaged:
            continue


TAR_READERS: dict[str, Callable[[Path], object]] = {
    "indexed": _read_shard,
    "streamed": lambda shard: list(stream_tar(str(shard))),
}


@pytest.mark.parametrize("way", TAR_READERS)
def test_a_tar_leads_neither_backward_nor_out_of_its_folder_nor_into_all_memory(
    way: str, tmp_path: Path
) -> None:
    write_and_read = _written(tmp_path, "0.tar", TAR_READERS[way])
    assert not faults(hostile.hostile_tars(), write_and_read, tmp_path, memory=64 * MIB)


@pytest.mark.parametrize("way", TAR_READERS)
def test_a_member_of_gibibytes_is_one_damaged_sample(way: str, tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"

    def write_and_read(content: bytes) -> object:
        with shard.open("wb") as file:
            file.write(hostile.tar_header("0.jpg", LARGEST_FILE + 512))
            file.truncate(LARGEST_FILE + 2_048)
        return TAR_READERS[way](shard)

    assert not faults({"holes": b""}, write_and_read, tmp_path, memory=64 * MIB, seconds=60)
    if way == "streamed":
        ((_, damaged),) = stream_tar(str(shard))
        assert isinstance(damaged, Damaged) and "more than the 1,073,741,824" in damaged.detail


def test_a_tar_of_many_members_of_few_names_takes_time_in_proportion(tmp_path: Path) -> None:
    headers = b"".join(hostile.tar_header(f"{number}.jpg", 0) for number in range(10))

    def write_and_read(content: bytes) -> object:
        return _written(tmp_path, "0.tar", index_tar)(headers * 2_000 + bytes(1_024))

    assert not faults({"20,000 members": b""}, write_and_read, tmp_path, seconds=40)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save

    shard = tmp_path / "0.tar"
    members = (hostile.tar_header(f"{n}.{kind}", 3) + b"abc" + bytes(509)
               for n in range(3) for kind in ("jpg", "txt"))  # fmt: skip
    shard.write_bytes(b"".join(members) + bytes(1_024))
    index = write_index(shard, index_tar(shard))
    from safetensors import safe_open

    with safe_open(index, "numpy") as file:
        about = file.metadata()
    tables, contents = load_file(index), {}
    for name, table in tables.items():
        for value in (-1, 2**62, 2**63 - 1, -(2**63), 2**40):
            changed = table.astype(np.int64)
            changed[len(changed) // 2] = value
            changed = changed.astype(table.dtype)
            contents[f"{name}: {value}"] = save(tables | {name: changed}, about)
        for changed in (table[:-1], table[:0], table[None], table.astype(np.float32)):
            contents[f"{name}: {changed.shape} {changed.dtype}"] = save(
                tables | {name: np.ascontiguousarray(changed)}, about
            )
        less = {other: part for other, part in tables.items() if other != name}
        contents[f"no {name}"] = save(less, about)
    for name in about:
        for value in ("", "x", "-1", "9" * 30, "null", "[]", '{"a": 1}', "[" * 50_000):
            contents[f"{name} = {value[:9]}"] = save(tables, about | {name: value})
        contents[f"without {name}"] = save(tables, {n: v for n, v in about.items() if n != name})

    def read(file: Path) -> None:
        read_summary(shard).lines(shard)
        _read_again(shard)

    assert not faults(contents, _written(tmp_path, index.name, read), tmp_path)


def _read_again(shard: Path) -> None:
    reader = TarReader(shard, Fields())
    for number in range(reader.index.num_samples):
        try:
            reader.key(number)
            reader.read(number)
        except Damaged:
            continue


def test_pictures_that_are_large_only_as_pixels_are_damaged(tmp_path: Path) -> None:
    read = _written(tmp_path, "a.jpg", lambda file: _see(read_bytes(file)))
    images = hostile.hostile_images()
    assert not faults(images, read, tmp_path, memory=640 * MIB)
    for content in images.values():
        with pytest.raises(Damaged):
            _see(content)


def test_a_picture_of_144_megapixels_takes_memory_in_proportion(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(encoded, "PNG", compress_level=1)
    read = _written(tmp_path, "a.png", lambda file: _see(read_bytes(file)))
    assert not faults({"gray": encoded.getvalue()}, read, tmp_path, memory=1_024 * MIB, seconds=60)


def test_a_picture_of_gibibytes_in_a_folder_or_an_archive_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with (tmp_path / "cat" / "0.jpg").open("wb") as file:
        file.truncate(4 << 30)
    images = open_image_folder(tmp_path, Fields())
    with pytest.raises(Damaged, match="more than the 1,073,741,824"):
        images.read(0)
    (tmp_path / "12").mkdir()
    member = zipfile.ZipInfo("678.jpg")
    with zipfile.ZipFile(tmp_path / "12" / "345.zip", "w") as archive:
        archive.writestr(member, b"abc")
        member.file_size = 4 << 30  # as the directory at its end then says
    assert _Archives(tmp_path).image("12345678") == "unreadable"
