"""Fixtures that several tests share."""

import gc
import inspect
import logging
import os
import sys
import types
from pathlib import Path

import pytest

# Files run side by side: processes that each take all cores would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `import support`
sys.path.insert(0, str(Path(__file__).parent / "reference"))  # for `import reference_milan`

from forks import start_servers
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.writing import write
from support import ALONE, TINY_WITH_CLIPS_WORDS, train

_SLOW = {"Popen", "check_call", "check_output", "mp", "spawn", "subprocess", "train_recipe"}
"""What a test calls that launches a process or trains."""
_OTHERS = {"open_clip", "timm", "transformers", "clip_benchmark"}
"""Libraries whose import alone takes longer than most tests, and whose models are large."""


def pytest_configure(config: pytest.Config) -> None:
    """Have one process that forks, whatever the number of processes that test."""
    if not hasattr(config, "workerinput"):
        start_servers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test-fast`` leaves out, beside what its own test marks as slow.

    Tests that launch a process, train, or call other libraries: read from the code of the test,
    its fixtures, and the functions of tests/ that they call.
    """
    known: dict[object, bool] = {}
    for item in items:
        assert isinstance(item, pytest.Function)
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        parts = [item.function, *(each.func for defs in fixtures for each in defs)]
        if any(_is_slow(part, known) for part in parts):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Keep what is imported out of collections of garbage, and have fewer: a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20)


def pytest_sessionfinish() -> None:
    """Let the end of the process free it all: libraries remark on what is left."""
    gc.unfreeze()


def _is_slow(function: object, known: dict[object, bool]) -> bool:
    function = inspect.unwrap(function) if callable(function) else function
    code, names = getattr(function, "__code__", None), set[str]()
    if code is None or function in known:
        return known.get(function, False)
    known[function] = False  # where functions call each other
    left = [code]
    while left:
        part = left.pop()
        names.update(part.co_names)
        left += [const for const in part.co_consts if isinstance(const, types.CodeType)]
    called = [getattr(function, "__globals__", {}).get(name) for name in names]
    called = [inspect.unwrap(each) if callable(each) else each for each in called]
    here = [
        c for c in called if _TESTS in str(getattr(getattr(c, "__code__", None), "co_filename", ""))
    ]
    homes = {str(getattr(each, "__module__", "")).partition(".")[0] for each in called}
    libraries = homes | {name.partition(".")[0] for name in names}
    known[function] = bool(names & _SLOW or libraries & _OTHERS) or any(
        _is_slow(each, known) for each in here
    )
    return known[function]


_TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _log_of_a_fresh_process() -> None:
    """Undo what a command that an earlier test ran in this process has made of the log."""
    log = logging.getLogger("frugal")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scenes data set of 32-pixel pictures."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write(
        Settings(
            out=folder,
            image_size=32,
            train_samples=150,
            shard_size=40,
            zero_shot_samples=128,
            probe_samples=112,
            retrieval_samples=40,
            compositional_samples=10,
            processes=1,
        )
    )
    return folder


@pytest.fixture(scope="session")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the tiny FLIP in one process, with a moving average of the weights."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(ALONE, run, f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9")
    return run


@pytest.fixture(scope="session")
def alone_with_clips_words(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the vocabulary that other libraries know."""
    run = tmp_path_factory.mktemp("alone_clip") / "run"
    words = (f"--data.train={scenes / 'train'}", "--engine.ema-decay=0.9")
    train(ALONE, run, *words, small=TINY_WITH_CLIPS_WORDS)
    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real photos with captions, where this machine has them."""
    folder = Path(os.environ.get("FRUGAL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here; set FRUGAL_TEST_DATA to a folder that has it")
    return folder
