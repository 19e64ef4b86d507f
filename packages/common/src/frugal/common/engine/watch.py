"""What a person sees of a run: progress bar, tensorboard, ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from frugal.common.run import Run

if TYPE_CHECKING:
    import numpy as np


class Watch:
    """Writes the same scalars everywhere, on the main process; silent on the others."""

    def __init__(self, run: Run, *, first_step: int, steps: int) -> None:
        self._main = run.is_main
        self._log = run.log
        if not self._main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run.dir / "metrics.jsonl"
        _drop_after(self._path, first_step)
        self._lines = self._path.open("a", buffering=1)
        # a resumed run draws over what it had drawn beyond its checkpoint
        self._board = SummaryWriter(str(run.dir / "tensorboard"), purge_step=first_step + 1)
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

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Log one line: to the file, to tensorboard and to the screen."""
        if not self._main:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3)} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, dict):
                for kind, count in value.items():
                    self._board.add_scalar(f"{name}/{kind}", count, step)
            elif value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()
        shown = {
            "loss": f"{values.get('loss', math.nan):.4f}",
            "samples/s": f"{values['samples_per_second']:.0f}",
            "wait": f"{values['data_wait']:.0%}",
            "lr": f"{values['learning_rate']:.2e}",
        }
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
        for name, value in values.items():
            self._board.add_scalar(f"evaluation/{name}", value, step)
        words = ", ".join(f"{name} {_number(name, value)}" for name, value in values.items())
        self._log.info("evaluation after step %d: %s", step, words)

    def text(self, name: str, words: str) -> None:
        """A text in tensorboard."""
        if self._main:
            self._board.add_text(name, words)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """A (3, H, W) uint8 picture in tensorboard."""
        if self._main:
            self._board.add_image(name, image, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._main:
            self._bar.close()
            self._lines.close()
            self._board.close()


def _number(name: str, value: float) -> str:
    """The number of an evaluation: a count, a loss, or a fraction."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.1%}"


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run will take again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # the line a crash cut in two
    path.write_text("".join(line + "\n" for line in kept))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
