"""The report as people see it: in a browser, without a network."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import chromium`

from chromium import Chromium, find

from support import command

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium here; install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_the_report_shows_every_picture_and_asks_for_nothing(
    alone: Path, scenes: Path, browser: Chromium, tmp_path: Path
) -> None:
    run = shutil.copytree(alone, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    for task in recipe["evaluation"]:  # so that the page shows what the model says of pictures
        task["data"] = str(scenes)
    (run / "recipe.json").write_text(json.dumps(recipe))
    command("frugal.common.evaluate", "--checkpoint", run, "--workers", 0, "--device", "cpu")
    command("frugal.common.report", run)
    page = run / "report.html"
    found = browser.visit(page)
    assert found.errors == []
    assert found.requests == [page.as_uri()]
    kinds = [picture["kind"] for picture in found.pictures]
    assert kinds.count("svg") >= 2 and kinds.count("img") >= 2
    for picture in found.pictures:
        assert picture["seen"] and picture["drawn"] and picture["pixels"] != 0, picture
    assert found.title == "Report of run" and "Zero-shot, top 1" in found.text


BROKEN = """<!DOCTYPE html><title>broken</title><body>
<img src="data:image/png;base64,AAAA"><img src="http://example.com/a.png"><svg></svg>
<img style="display: none" src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs=">
<script>console.error("complaint"); undefined_function();</script>
"""


def test_a_broken_page_would_be_noticed(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(BROKEN)
    found = browser.visit(page)
    assert "http://example.com/a.png" in found.requests
    said = " ".join(found.errors)
    assert "complaint" in said and "Uncaught" in said and "ERR_" in said
    corrupt, remote, empty, hidden = found.pictures
    assert corrupt["pixels"] == 0 and remote["pixels"] == 0
    assert not empty["drawn"]
    assert hidden["pixels"] == 1 and not hidden["seen"]
