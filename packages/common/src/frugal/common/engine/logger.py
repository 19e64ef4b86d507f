"""What a person sees of a run: progress bar, tensorboard, ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from frugal.common.contracts import Batch, Objective
from frugal.common.engine.digests import StepDigests, to_hex
from frugal.common.errors import InputError
from frugal.common.files import finite, parse_json, reason_of, write_file
from frugal.common.run import Run

_DRAWN = 8
"""Samples of a batch that a picture shows."""


def _quiet_writer_threads() -> None:
    """Have TensorBoard's thread not print a stack trace where it cannot write: we say it."""
    shown = threading.excepthook

    def show(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and issubclass(failed.exc_type, OSError)):
            shown(failed)

    threading.excepthook = show


class _Log:
    """A place for scalars and pictures. Training goes on without it where it cannot be written."""

    def __init__(self, path: Path, log: logging.Logger, open_log: Callable[[], Any]) -> None:
        self._path = path
        self._log = log
        self._log_file: Any = None
        self._do(open_log, keep=True)

    def write(self, write: Callable[[Any], Any]) -> None:
        """Call a function with what was opened."""
        if self._log_file is not None:
            self._do(lambda: write(self._log_file))

    def _do(self, action: Callable[[], Any], *, keep: bool = False) -> None:
        try:
            done = action()
            if keep:
                self._log_file = done
        except (OSError, ValueError, InputError) as error:  # ValueError: closed by its own thread
            self._log_file = None
            self._log.warning(
                "%s is not written any more (%s); training goes on without it",
                self._path,
                reason_of(error),
            )


METRICS = "metrics.jsonl"
"""In a run directory: the numbers of every log line."""


def last_line(folder: Path) -> dict[str, Any] | None:
    """The last whole line that a run logged."""
    path = folder / METRICS
    for text in reversed(path.read_bytes().split(b"\n") if path.is_file() else []):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            return line
    return None


class MetricsLogger:
    """Writes the same scalars everywhere, on the main process; silent on the others."""

    def __init__(self, run: Run, *, first_step: int, steps: int) -> None:
        self._main = run.is_main
        self._log = run.log
        if not self._main:
            return
        from torch.utils.tensorboard import SummaryWriter

        path, folder = run.dir / METRICS, run.dir / "tensorboard"

        def open_lines(step: int = first_step) -> Any:
            _keep_steps(path, 0, step, run.log)
            return path.open("a", buffering=1)

        self._open_lines = lambda step: _Log(path, run.log, lambda: open_lines(step))
        _quiet_writer_threads()
        self._lines = _Log(path, run.log, open_lines)
        # a resumed run draws over what it had drawn beyond its checkpoint
        self._open_board = lambda step: _Log(
            folder, run.log, lambda: SummaryWriter(str(folder), purge_step=step + 1)
        )
        self._board = self._open_board(first_step)
        self._steps = steps
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            disable=not sys.stderr.isatty(),
            unit="step",
            dynamic_ncols=True,
        )

    def advance(self) -> None:
        """One step is done."""
        if self._main:
            self._bar.update()

    def rewind(self, step: int) -> None:
        """Drop the lines and curves of later steps, which come once more."""
        if self._main:
            for log in (self._lines, self._board):
                log.write(lambda opened: opened.close())
            self._lines, self._board = self._open_lines(step), self._open_board(step)
            self._bar.n = step

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Log one line: to the file, to tensorboard and to the screen."""
        if not self._main:
            return
        line = finite({"step": step, "time": round(time.time(), 3)} | values)
        self._lines.write(lambda lines: lines.write(json.dumps(line) + "\n"))
        self._board.write(lambda board: _draw_scalars(board, step, values))
        shown = {
            "loss": f"{values.get('loss', math.nan):.4f}",
            "samples/s": f"{values['samples_per_second']:.0f}",
            "wait": f"{values['data_wait']:.0%}",
            "lr": f"{values['learning_rate']:.2e}",
        }
        if damaged := sum(values.get("damaged", {}).values()) + values.get("lost_samples", 0):
            shown["damaged"] = f"{damaged:,}"
        if self._bar.disable:
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            remaining = values["eta_seconds"]
            self._log.info(
                "step %d of %d: %s, %s left", step, self._steps, words, _clock(remaining)
            )
        else:
            self._bar.set_postfix(shown)

    def numbers(self, step: int, values: dict[str, Any]) -> None:
        """The numbers of an evaluation, in tensorboard and in the log."""
        if not self._main:
            return
        drawn = {f"evaluation/{name}": value for name, value in values.items()}
        self._board.write(lambda board: _draw_scalars(board, step, drawn))
        words = ", ".join(f"{name} {_number(name, value)}" for name, value in values.items())
        self._log.info("evaluation after step %d: %s", step, words)

    def text(self, name: str, words: str) -> None:
        """A text in tensorboard."""
        if self._main:
            self._board.write(lambda board: board.add_text(name, words))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """A (3, H, W) uint8 picture in tensorboard."""
        if self._main:
            self._board.write(lambda board: board.add_image(name, image, step))

    def draw_batch(self, objective: Objective, batch: Batch, step: int) -> None:
        """Pictures of the first samples of a batch with their masks, where the objective has any.

        Every process calls this: what draws may need weights that all of them hold a part of.
        """
        few = batch.rows(0, _DRAWN)
        pictures = {"batch": objective.draw(few), "reduction": objective.draw_reduction(few)}
        for name, image in pictures.items():
            if image is not None:
                self.picture(name, image, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._main:
            self._bar.close()
            self._lines.write(lambda lines: lines.close())
            self._board.write(lambda board: board.close())


DIGESTS = "digests.jsonl"
"""In a run directory: a line with two digests for every step."""
DETAILED_DIGESTS = "digests_of_parts.jsonl"
"""The same by parameter and by sample, as far back as the oldest checkpoint that is kept."""


class DigestLog:
    """Writes the digests of every step, on the main process. Training goes on where it cannot."""

    def __init__(self, run: Run, *, engine: str, first_step: int) -> None:
        self._folder = run.dir
        self._log = run.log
        self._head = {"processes": run.world_size, "engine": engine}
        self._writes = run.is_main
        self._do(lambda: self._keep(0, first_step))

    def write(self, steps: Iterable[StepDigests]) -> None:
        """Note some steps."""
        steps = list(steps)
        self._append(
            DIGESTS,
            [
                {"step": s.step, "gradient": s.gradient, "samples": s.batch, **self._head}
                for s in steps
            ],
        )
        parts = [
            {"step": s.step, "parameters": to_hex(s.parameters), "samples": to_hex(s.samples)}
            for s in steps
        ]
        self._append(DETAILED_DIGESTS, parts)

    def write_weights(self, step: int, digests: np.ndarray) -> None:
        """Note the weights (P,) uint64 that a checkpoint holds."""
        self._append(DETAILED_DIGESTS, [{"step": step, "weights": to_hex(digests)}])

    def forget_parts_before(self, step: int) -> None:
        """Drop the parts of steps that no checkpoint leads to any more."""
        self._do(lambda: _keep_steps(self._folder / DETAILED_DIGESTS, step, math.inf, self._log))

    def rewind(self, step: int) -> None:
        """Drop what was noted of later steps."""
        self._do(lambda: self._keep(0, step))

    def _keep(self, first: float, last: float) -> None:
        for name in (DIGESTS, DETAILED_DIGESTS):
            _keep_steps(self._folder / name, first, last, self._log)

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        def append() -> None:
            with (self._folder / name).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

        self._do(append)

    def _do(self, action: Callable[[], None]) -> None:
        if not self._writes:
            return
        try:
            action()
        except (OSError, InputError) as error:
            self._writes = False
            self._log.warning(
                "the digests of steps are not written any more (%s); training goes on without them",
                reason_of(error),
            )


def _draw_scalars(board: Any, step: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            for kind, count in value.items():
                board.add_scalar(f"{name}/{kind}", count, step)
        elif value is not None:
            board.add_scalar(name, value, step)
    board.flush()


def _number(name: str, value: float) -> str:
    """The number of an evaluation: a count, a loss, or a fraction."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.1%}"


def _keep_steps(path: Path, first: float, last: float, log: logging.Logger) -> None:
    """Remove the lines of steps that are not between two, such as those to be taken again."""
    if not path.is_file():
        return
    kept, unreadable = [], 0
    content = path.read_bytes()
    for line in content.split(b"\n"):
        try:
            if first <= parse_json(line)["step"] <= last:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip())
    if unreadable:  # such as the line that a crash cut in two
        log.warning("%s: %d lines are no JSON of a step and are left out", path, unreadable)
    if (left := b"".join(kept)) != content:
        write_file(path, left)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
