"""Where the time of a run went, and that it adds up."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from reported import REPORT, Page

from frugal.common.report.goodput import NAMES, time_spent
from support import ALONE, command, kill_at_step, metrics, start, train


@pytest.mark.usefixtures("alone")  # so that processes start at once
def test_the_seconds_of_a_killed_run_add_up_to_its_wall_time(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (
        f"--data.train={scenes / 'train'}", "--schedule.samples=960", "--run.save-every=8",
        "--evaluation.0.data", str(scenes),
    )  # fmt: skip
    began = time.time()
    process = start(ALONE, run, *words)
    kill_at_step(process, run, 14, signal.SIGKILL)
    killed_at = metrics(run)[-1]
    at_checkpoint = metrics(run)[8 * ((killed_at["step"] - 1) // 8) - 1]
    time.sleep(1.0)
    train(ALONE, run, *words)
    spent = time_spent(run)
    assert spent is not None and spent.keys() == NAMES.keys()
    assert all(seconds >= -0.01 for seconds in spent.values()), spent
    ended = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert ended["event"] == "ended"
    assert sum(spent.values()) == pytest.approx(ended["time"] - began, abs=2.0)
    assert spent["between"] >= 1.0
    seconds = [line["session_seconds"] for line in (at_checkpoint, killed_at)]
    worked = [line["steps"] + line["waiting"] for line in seconds]
    assert spent["again"] == pytest.approx(worked[1] - worked[0], abs=0.3)
    for what in ("steps", "checkpoint", "evaluation", "starting"):
        assert spent[what] > 0, what
    command(REPORT, run)
    text = Page((run / "report.html").read_text()).text
    assert "Where the time went" in text and "steps that were done again" in text


def test_a_run_without_a_history_has_the_report_that_it_had(alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / "history.jsonl").unlink()
    assert time_spent(run) is None
    command(REPORT, run)
    assert "Where the time went" not in (run / "report.html").read_text()


def test_every_second_is_told_once(tmp_path: Path) -> None:
    events = [
        {"event": "began", "time": 110.0, "since": 100.0, "step": 0, "seconds": 0.0, "before": {}},
        {"event": "rewind", "time": 130.0, "to": 4, "left_out": [8], "lost_seconds": 5.0},
        # killed, last seen at 160; of its 40 s of steps a checkpoint keeps 30
        {
            "event": "continued", "time": 212.0, "since": 200.0, "step": 8, "seconds": 30.0,
            "before": {
                "step": 12, "time": 160.0,
                "session_seconds": {
                    "starting": 10.0, "steps": 30.0, "waiting": 10.0, "checkpoint": 4.0,
                    "pictures": 3.0,
                },
            },
        },
        # killed before it logged a line: the one before it is not its own
        {
            "event": "continued", "time": 263.0, "since": 250.0, "step": 8, "seconds": 30.0,
            "before": {"step": 8, "time": 150.0, "session_seconds": {"steps": 1.0}},
        },
        {
            "event": "ended", "time": 300.0,
            "session_seconds": {"starting": 15.0, "steps": 20.0, "evaluation": 2.0},
        },
    ]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    spent = time_spent(tmp_path)
    assert spent is not None and sum(spent.values()) == 200.0
    assert spent == pytest.approx(
        {
            "steps": 30 * (1 - 15 / 40) + 20, "waiting": 10 * (1 - 15 / 40), "again": 15.0,
            "checkpoint": 4.0, "evaluation": 2.0, "starting": 10 + 12 + 15,
            "between": 40.0 + 38.0, "other": 6.0 + 13.0,
        }
    )  # fmt: skip


def test_what_was_lost_by_going_back_and_then_killed_is_told_once(tmp_path: Path) -> None:
    # the checkpoint of step 4 after 10 s; back to it after 20 s; killed after 35 s
    events = [
        {"event": "began", "time": 1.0, "since": 0.0, "step": 0, "seconds": 0.0, "before": {}},
        {
            "event": "rewind", "time": 22.0, "step": 8, "to": 4, "left_out": [8],
            "lost_seconds": 10.0,
        },
        {
            "event": "continued", "time": 41.0, "since": 40.0, "step": 4, "seconds": 10.0,
            "lost_seconds": 0.0,
            "before": {"step": 9, "time": 36.0, "session_seconds": {"starting": 1.0, "steps": 35}},
        },
    ]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    spent = time_spent(tmp_path)
    assert spent is not None
    assert (spent["steps"], spent["again"], spent["between"]) == (10.0, 25.0, 4.0)


def test_a_clock_that_was_set_back_takes_no_time_away(tmp_path: Path) -> None:
    events = [
        {"event": "began", "time": 101.0, "since": 100.0, "step": 0, "seconds": 0.0, "before": {}},
        {
            "event": "continued", "time": 51.0, "since": 50.0, "step": 4, "seconds": 10.0,
            "before": {"step": 4, "time": 111.0, "session_seconds": {"starting": 1, "steps": 10}},
        },
        {"event": "ended", "time": 30.0, "session_seconds": {"starting": 1.0, "steps": 9.0}},
    ]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    spent = time_spent(tmp_path)
    assert spent is not None and min(spent.values()) >= 0.0
    assert spent["steps"] >= 10.0
