"""Variables of launchers: believed where they are whole, and otherwise named in one sentence."""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forks import fork
from frugal.common import distributed
from frugal.common.cli import exit_politely
from frugal.common.distributed import (
    Ranks,
    forget_launchers,
    init_process_group,
    launcher_ranks,
    resolve_ranks,
)
from frugal.common.errors import InputError
from frugal.common.ports import free_port
from support import DDP, FLIP, ROOT, TINY, environment

LOG = logging.getLogger("test")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture
def announce() -> Iterator[Callable[[dict[str, str]], None]]:
    """Announces processes, and nothing else; afterwards the environment is what it was."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_")) or name.endswith("RANK"):
            del os.environ[name]
    os.environ.pop("WORLD_SIZE", None)
    yield os.environ.update
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, (0, 1, 0)),
        (WHOLE, (1, 2, 0)),
        (WHOLE | {"LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"RANK": "0"}, (0, 1, 0)),
        ({"LOCAL_RANK": "2"}, (0, 1, 0)),
        (SLURM, (0, 1, 0)),  # a batch script or an salloc shell: srun did not start it
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"} | {
            "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4, 1)),
        (OPEN_MPI, (0, 1, 0)),
        (OPEN_MPI | WHOLE, (1, 2, 0)),
    ],
)  # fmt: skip
def test_who_this_is(announce, variables, ranks) -> None:
    announce(variables)
    assert launcher_ranks() == Ranks(*ranks)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "abc"}, "RANK is 'abc'.*unset RANK"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "RANK=0, WORLD_SIZE=4.*unset RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE=4.*\(RANK, MASTER_ADDR, MASTER_PORT are not set\)"),
        (WHOLE | {"RANK": "2"}, "process 2 of 2"),
        ({"RANK": "3"}, "process 3 of 1.*RANK=3"),
        (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (WHOLE | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_NTASKS=4.*MASTER_ADDR.*env -u SLURM"),
    ],
)
def test_what_contradicts_itself_is_named_with_the_way_out(announce, variables, words) -> None:
    announce(variables)
    with pytest.raises(InputError, match=words):
        launcher_ranks()


@pytest.mark.parametrize("left", [OPEN_MPI, {"PMI_SIZE": "2", "PMI_RANK": "1"}, SLURM])
def test_what_is_left_over_is_told_and_not_believed_by_libraries(announce, left, caplog) -> None:
    announce(left | {"LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1"})
    assert resolve_ranks(LOG) == Ranks(0, 1, 0)
    for name, value in left.items():
        assert f"{name}={value}" in caplog.text
    assert "unset" in caplog.text
    assert "LOCAL_RANK" not in os.environ and "PMI_SIZE" not in os.environ
    assert "OMPI_COMM_WORLD_SIZE" not in os.environ


def test_one_process_meets_nobody_elsewhere(announce) -> None:
    announce(WHOLE | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "10.255.255.1"})
    assert resolve_ranks(LOG) == Ranks(0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_command_of_one_process_forgets_every_launcher(announce) -> None:
    announce(WHOLE | SLURM | OPEN_MPI)
    forget_launchers()
    assert resolve_ranks(LOG) == Ranks(0, 1, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named_with_the_place_and_waited_for_with_a_limit(
    announce, monkeypatch, caplog, rank
) -> None:
    port = free_port()
    announce(WHOLE | {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_PORT": str(port)})
    monkeypatch.setattr(distributed, "_VOICE", 0.3)
    with pytest.raises(InputError, match=rf"at 127\.0\.0\.1:{port}.*unset RANK") as refused:
        init_process_group(launcher_ranks(), "gloo", LOG, limit=1.0)
    who = r"2 of the 3 processes (1, 2)" if rank == 0 else "process 0, which keeps"
    assert who in str(refused.value)
    assert f"waiting for {who}" in caplog.text and f"127.0.0.1:{port}" in caplog.text


def test_a_place_that_another_program_keeps_is_refused(announce) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        port = other.getsockname()[1]
        announce(WHOLE | {"RANK": "0", "MASTER_PORT": str(port)})
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port}.*another program listens"):
            init_process_group(launcher_ranks(), "gloo", LOG, limit=5.0)


def test_a_run_and_an_evaluation_wait_as_long_as_they_are_told(
    alone: Path, scenes: Path, tmp_path: Path
) -> None:
    missed = [DDP.environments()[1]]
    for module, words in {
        FLIP: ("demo", *TINY, f"--data.train={scenes / 'train'}", f"--run.dir={tmp_path / 'run'}",
               "--run.rendezvous-minutes=0.02"),
        "frugal.common.evaluate": (f"--checkpoint={alone}", f"--data={scenes}", "--device=cpu",
                                   "--rendezvous-minutes=0.02"),
    }.items():  # fmt: skip
        log = tmp_path / "log"
        assert fork(module, words, log=log, cwd=ROOT, environments=missed).wait(timeout=60) == 2
        said = log.read_text()
        assert "waited for process 0, which keeps" in said and "for 1 seconds" in said
        log.unlink()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("frugal.flip.train", ("demo", "--data.train=x")),
        ("frugal.milan.pretrain", ("demo", "--data.train=x")),
        ("frugal.common.evaluate", ("--checkpoint=openai.pt", "--data=x")),
    ],
)
def test_a_command_says_it_in_one_sentence(module, words, tmp_path) -> None:
    log = tmp_path / "log"
    wrong = [environment() | {"RANK": "abc"}]
    assert fork(module, words, log=log, cwd=ROOT, environments=wrong).wait(timeout=120) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: ")


def test_ctrl_c_closed_pipes_and_full_disks_leave_no_trace(capsys) -> None:
    def raised(error):
        def command() -> int:
            raise error

        return command

    assert exit_politely(raised(KeyboardInterrupt())) == 128 + signal.SIGINT
    full = OSError(28, "No space left on device", "/data/x.json")
    assert exit_politely(raised(full)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: /data/x.json: No space left on device") and "\n" in said
    with pytest.raises(OSError, match="odd"):
        exit_politely(raised(OSError("odd")))


def test_a_reader_that_goes_away_is_no_mistake(tmp_path) -> None:
    script = (
        "import sys; from frugal.common.cli import run_politely\n"
        "run_politely(lambda: [print('x' * 99) for _ in range(99999)] and None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
