"""A library of models is one new file: nothing else knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_library
from run_directories import small, write_run

from frugal.common.errors import InputError
from frugal.common.evaluate import evaluate
from frugal.common.evaluation.cli import Options
from frugal.common.export import Options as Export
from frugal.common.export import export
from frugal.common.import_weights import Options as Import
from frugal.common.import_weights import import_weights
from frugal.common.models.named import clip_encoder
from frugal.common.weights import libraries
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.load import load_model


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "LIBRARIES", (*libraries.LIBRARIES, toy_library.LIBRARY))


@pytest.fixture
def toy(clip_run: Path, tmp_path: Path) -> Path:
    """A folder of the toy library."""
    assert export(Export(checkpoint=clip_run, to="toy", out=tmp_path / "toy")) < 1e-6
    return tmp_path / "toy"


def test_a_model_leaves_for_a_new_library_and_comes_back(toy: Path, clip_run: Path) -> None:
    trained, bundle = load_model(clip_run), load_model(toy)
    assert bundle.source.library == "toy"
    assert bundle.transform == toy_library.LIBRARY.load(toy, None, None).transform
    state = bundle.model.state_dict()
    assert all(state[name].equal(t) for name, t in trained.model.state_dict().items())
    tower = read_encoder(toy)
    assert tower.state["norm.bias"].equal(state["image.norm.bias"])


def test_its_card_says_how_to_load_it_and_what_it_does_otherwise(toy: Path) -> None:
    card = (toy / "README.md").read_text()
    assert "library_name: toy" in card and 'toy.load("toy")' in card
    assert "comes as near as toy has it, `CenterCrop(order=resize_first, interpolation=bil" in card


def test_its_models_are_measured_and_imported(toy: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "numbers"
    evaluate(
        Options(checkpoint=toy, data=scenes, tasks=("retrieval",), out=out, workers=0, device="cpu")
    )
    numbers = json.loads((out / "retrieval.json").read_text())
    assert numbers["retrieval_measured"]["library"] == "toy"
    import_weights(Import(source=toy, out=tmp_path / "run"))
    assert load_model(tmp_path / "run").source.library == "toy"


def test_what_it_cannot_express_is_refused_and_it_is_a_way_out_for_others(
    tmp_path: Path,
) -> None:
    for pooling, to, instead in (
        ("mean_all", "toy", "frugal"),
        ("mean", "huggingface", "frugal or open_clip or toy"),
    ):
        run = write_run(tmp_path / pooling, small(clip_encoder("B/16"), image={"pooling": pooling}))
        with pytest.raises(InputError, match=f"--to {instead} instead"):
            export(Export(checkpoint=run, to=to, out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_name_is_for_files_of_it_too(toy: Path) -> None:
    with pytest.raises(InputError, match="is a folder, which does; leave it out"):
        load_model(toy, name="toy")
