"""Data behind a URL is copied once, whole, and measured like any other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from evaluated import multi_label_tars, recipe, telling

from frugal.common.data.labeled import MultiLabeledImages
from frugal.common.errors import InputError
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.remote import _places, as_url, fetch
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and breaks off where it is told to."""

    asked: list[str]
    breaks: str = "nothing"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.endswith(type(self).breaks):
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@pytest.fixture
def served(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    """The URL of the scenes' folder, and what serves it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Own", (Handler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(scenes)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


@pytest.mark.slow
def test_numbers_are_those_of_the_folder_behind_the_url(
    served: tuple[str, type[Handler]], scenes: Path, run: Run, tmp_path: Path
) -> None:
    url, _ = served
    folder = fetch(f"{url}/zero_shot", ["test", "train"], cache=tmp_path)
    plan = recipe()
    model = telling(plan)
    for task in (ZeroShot(), LinearProbe(weight_decay=0.1, solver="sgd", epochs=1)):
        here, there = (
            type(task)(**{**vars(task), "data": place}).evaluate(bundle_of(model, plan), run)
            for place in (scenes / "zero_shot", folder)
        )
        there |= {name: value for name, value in here.items() if "held_out" in name}
        if isinstance(task, ZeroShot):
            assert here == there
        else:  # held_out.txt is not part of clip_benchmark's layout
            assert there["linear_probe_images"] == 128
    written = {path: path.stat().st_ino for path in folder.rglob("*")}
    assert fetch(f"{url}/zero_shot", ["test"], cache=tmp_path) == folder
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == written


def test_what_was_replaced_behind_the_url_comes_again_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = tmp_path / "served"
    multi_label_tars(served, np.eye(3, dtype=np.int64)[[0, 1, 2, 1]])
    handler = type("Own", (Handler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    folder = fetch(url, ["test"], cache=tmp_path / "cache")
    before = MultiLabeledImages(folder, size=(8, 8)).targets
    kept = (folder / "test" / "1.tar").stat().st_ino
    multi_label_tars(tmp_path / "new", np.eye(3, dtype=np.int64)[[2, 2, 2, 1]])
    new = tmp_path / "new" / "test" / "0.tar"
    os.utime(new, (2e9, 2e9))
    assert new.stat().st_size == (served / "test" / "0.tar").stat().st_size
    new.replace(served / "test" / "0.tar")
    (served / "dataset_type.txt").unlink()
    fetch(url, ["test"], cache=tmp_path / "cache")
    assert (folder / "test" / "1.tar").stat().st_ino == kept
    assert not (folder / "dataset_type.txt").exists()
    after = MultiLabeledImages(folder, size=(8, 8)).targets
    assert after.tolist()[:3] == [[False, False, True]] * 3 != before.tolist()[:3]
    server.shutdown()
    server.server_close()
    with caplog.at_level("WARNING", "frugal"):
        assert fetch(url, ["test"], cache=tmp_path / "cache") == folder
    told = {r for r in caplog.records if "is used as it was fetched" in r.getMessage()}
    assert len(told) == 1
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(url, ["test"], cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("part", "breaks", "message"),
    [
        ("nowhere", "nothing", r"nowhere/test/nshards\.txt cannot be fetched \(HTTP Error 404"),
        ("zero_shot", "1.tar", r"1\.tar broke off after 100 of 5000 bytes; try again"),
    ],
)
def test_what_does_not_arrive_whole_is_one_sentence(
    part: str, breaks: str, message: str, served: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    url, handler = served
    handler.breaks = breaks
    with pytest.raises(InputError, match=message) as caught:
        fetch(f"{url}/{part}", ["test"], cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("1.tar"))
    handler.breaks = "nothing"
    if part == "zero_shot":  # what was whole stays, and the rest comes now
        folder = fetch(f"{url}/{part}", ["test"], cache=tmp_path)
        assert len(list((folder / "test").glob("*.tar"))) == 4


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/x/classnames\.txt cannot be fetched"):
        fetch("http://127.0.0.1:9/x", ["test"], cache=tmp_path)


def test_a_url_survives_being_taken_for_a_path() -> None:
    url = "https://huggingface.co/datasets/clip-benchmark/wds_mnist/tree/main"
    assert as_url(Path(url)) == url
    assert as_url(Path("data/scenes")) is None and as_url(Path("/data")) is None
    words, shards = _places(url)
    assert words == "https://huggingface.co/datasets/clip-benchmark/wds_mnist/raw/main"
    assert shards == "https://huggingface.co/datasets/clip-benchmark/wds_mnist/resolve/main"
