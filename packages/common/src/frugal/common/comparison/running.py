"""Runs of a comparison: each by its own entry script, in a folder of its own, once."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from frugal.common.errors import RunStopped
from frugal.common.files import read_json_object, read_text, write_json

_LAST_LINES = 12
"""Of a run that failed, which are told."""
WARMUP = 20
"""One of so many samples of a run is warm-up."""


@dataclass(frozen=True)
class Job:
    """A command that is to end well once; what it says goes to a file beside its folder."""

    name: str
    """For people."""
    module: str
    words: tuple[str, ...]
    folder: Path
    """That it writes to."""
    launcher: tuple[str, ...] = (sys.executable, "-m")
    """What starts a module."""

    @property
    def note(self) -> Path:
        """The file that says that it has ended well."""
        return self.folder.with_name(f"{self.folder.name}.done.json")

    @property
    def command(self) -> list[str]:
        """All words."""
        return [*self.launcher, self.module, *self.words]

    @property
    def is_done(self) -> bool:
        """Whether it has ended well before."""
        return self.note.is_file()


def lasting(samples: int) -> tuple[str, str]:
    """The words for a run of this length, a twentieth of it warm-up."""
    return f"--schedule.samples={samples}", f"--schedule.warmup-samples={samples // WARMUP}"


def finish(job: Job) -> float:
    """Run a job to its end, or find that it has ended well before; its seconds on the clock.

    What an earlier process left of a training is continued by its entry script.

    Raises:
        RunStopped: if it fails, with its last lines.
    """
    if job.is_done:
        return float(read_json_object(job.note)["seconds"])
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    said = job.folder.with_name(f"{job.folder.name}.log")
    begun = time.monotonic()
    with said.open("wb") as log:
        code = subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = "\n".join(read_text(said).rstrip().split("\n")[-_LAST_LINES:])
        raise RunStopped(
            f"{job.name} ended with exit code {code} ({said}); the same command goes on from there "
            f"once the reason is gone; its last lines:\n{lines}",
            exit_code=1,
        )
    seconds = time.monotonic() - begun
    write_json(job.note, {"command": job.command, "seconds": seconds})
    return seconds


def every(steps: int, times: int) -> int:
    """Steps between two of so many moments of a run, the last of which is its end."""
    return max(-(-steps // times), 1)


def run_words(
    *, run: Path, samples: int, seed: int, log_every: int, evaluate_every: int, start: Path | None
) -> tuple[str, ...]:
    """The flags that a comparison sets for each run.

    A checkpoint comes with every evaluation, for what was measured on the way stays then.
    """
    words = [f"--run.dir={run}", *lasting(samples), f"--run.seed={seed}"]
    words += [f"--run.log-every={log_every}", f"--run.evaluate-every={evaluate_every}"]
    words += [f"--run.save-every={evaluate_every}", "--run.keep=1"]
    return (*words, f"--run.start-from={start}") if start is not None else tuple(words)
