"""What a person sees of a run; training goes on without what cannot be written."""

import json
import logging
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugal.common.engine.logger import MetricsLogger
from frugal.common.run import Run

VALUES: dict[str, Any] = {
    "loss": 1.0, "samples_per_second": 2.0, "data_wait": 0.1, "learning_rate": 1e-3,
    "eta_seconds": 3.0, "gap": float("nan"), "damaged": {"image": 2},
}  # fmt: skip


def logger_in(folder: Path) -> MetricsLogger:
    folder.mkdir(exist_ok=True)
    run = Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("test"))
    return MetricsLogger(run, first_step=0, steps=10)


def test_logs_that_cannot_be_written_are_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "tensorboard").write_text("no folder")
    logger = logger_in(tmp_path)
    for step in range(1, 4):
        logger.scalars(step, VALUES)
        logger.numbers(step, {"accuracy": 0.5})
        logger.picture("a", np.zeros((3, 4, 4), np.uint8), step)
    logger.close()
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([line for line in said if "metrics.jsonl is not written" in line]) == 1
    assert len([line for line in said if "tensorboard is not written" in line]) == 1


def test_tensorboard_whose_own_thread_fails_does_not_end_the_run(tmp_path: Path) -> None:
    """In a process whose files may not grow beyond some bytes, as on a full disk."""
    child = os.fork()
    if not child:
        said: list[str] = []
        traces: list[Any] = []
        threading.excepthook = traces.append
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("test").addHandler(handler)
        logger = logger_in(tmp_path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for step in range(1, 40):
            logger.scalars(step, VALUES)
            time.sleep(0.005)  # its thread writes
        logger.close()
        told = [sum(name in line for line in said) for name in ("metrics.jsonl is", "board is")]
        os._exit(7 if told == [1, 1] and not traces else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["gap"] is None
