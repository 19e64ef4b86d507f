"""A checkpoint proves what it is: any change to any of its files is noticed and named."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frugal.common.checkpoint.manifest import digest_json
from frugal.common.checkpoint.store import CheckpointStore, open_checkpoint
from frugal.common.errors import InputError
from frugal.common.run import Run
from support import alter_state


def store_in(folder: Path) -> CheckpointStore:
    run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
    return CheckpointStore(run, keep=2)


def tensors(seed: int) -> dict[str, Tensor]:
    return {"weight/a": torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))}


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(tensors(step), {"step": step})


FILES = ("state.json", "manifest.json", "tensors-00000-of-00001.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    newer = save(store, 20)
    assert {file.name for file in newer.iterdir()} == set(FILES)
    whole = (newer / name).read_bytes()
    if damage == "missing":
        (newer / name).unlink()
    elif damage == "truncated":
        (newer / name).write_bytes(whole[:-1])
    for place in range(0, len(whole), 9) if damage == "flipped" else (None,):
        if place is not None:
            (newer / name).write_bytes(
                whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            )
        caplog.clear()
        newest = store.newest()
        assert newest is not None and newest.step == 10
        assert str(newer / name) in caplog.text and "taking" in caplog.text


def test_the_manifest_tells_what_a_run_is_made_of(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.about = {"data": {"train": [[["0.tar", 3, "ab"]]]}, "code": {"version": "1"}}
    folder = store.save(tensors(1), {"step": 1, "recipe": {"a": 1}})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["train"] == [[["0.tar", 3, "ab"]]]
    assert manifest["code"] == {"version": "1"}
    assert manifest["recipe"] == hashlib.sha256(b'{"a":1}').hexdigest()
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    assert manifest["files"].keys() == set(FILES) - {"manifest.json"}


def test_a_checkpoint_of_an_earlier_version_is_compared_with_its_own_checksums(
    tmp_path: Path,
) -> None:
    folder = save(store_in(tmp_path), 10)
    alter_state(folder)
    newest = store_in(tmp_path).newest()
    assert newest is not None and newest.step == 10
    content = bytearray((folder / FILES[2]).read_bytes())
    content[-3] ^= 1
    (folder / FILES[2]).write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        store_in(tmp_path).newest()


@pytest.mark.parametrize(
    "files",
    [
        None, 3, [], {}, {"state.json": None}, {"state.json": {}}, {"state.json": "a"},
        "without the state", "without the tensors", "with one elsewhere",
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_whose_own_digest_is_right_is_refused_where_it_tells_nothing(
    tmp_path: Path, files: object
) -> None:
    folder = save(store_in(tmp_path), 10)
    content = json.loads((folder / "manifest.json").read_text())
    del content["manifest"]
    entries = content["files"]
    if files == "without the state":
        files = {name: entries[name] for name in entries if name != "state.json"}
    elif files == "without the tensors":
        files = {"state.json": entries["state.json"]}
    elif files == "with one elsewhere":
        files = entries | {"../latest": {"bytes": 15, "sha256": "0"}}
    content["files"] = files
    if files is None:
        del content["files"]
    content["manifest"] = digest_json(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"manifest\.json was altered"):
        open_checkpoint(folder)


def test_a_checkpoint_without_weights_is_none(tmp_path: Path) -> None:
    folder = save(store_in(tmp_path), 10)
    alter_state(folder, files=[])
    with pytest.raises(InputError, match="it names no weights"):
        open_checkpoint(folder)
