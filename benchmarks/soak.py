"""Train the demo on two processes for half an hour, and see whether anything grows.

    python benchmarks/soak.py --minutes 30

The demo, which never comes to its end here, saves, evaluates and draws pictures all the time. Every
few seconds resident memory, open files and threads of all its processes are read. The first fifth
of the time fills caches; the second is compared with the last. The exit code is 1 where memory of a
process that trains has grown by more than 2 %, where there are more open files, threads or
processes, or where a step takes more than 10 % longer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from measuring import write

from frugal.common.files import read_json_lines

ROOT = Path(__file__).parents[1]
PARTS = 5
OFTEN = (
    "--schedule.samples=1000000000", "--run.save-every=50", "--run.evaluate-every=100",
    "--run.picture-every=50", "--run.log-every=10",
)  # fmt: skip

WHAT = ("processes", "MiB", "private MiB", "files", "threads")
Sample = dict[str, float]
"""Sums over the processes of a kind, of each of ``WHAT``; MiB are resident, and private without
files that are mapped and memory that is shared."""


def main() -> int:
    """Train, measure, print a table; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two readings")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "scenes", help="drawn scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/soak"))
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(
            f"{options.data} is not there; draw it: python -m frugal.common.scenes --out "
            f"{options.data} --train-samples 40000 --image-size 40"
        )
    run = options.out.resolve() / "run"
    if run.exists():
        parser.error(f"{run} exists; remove it, or give another --out")
    run.parent.mkdir(parents=True, exist_ok=True)
    samples, seconds, said = soak(options, run)
    report = summary(samples, seconds, 60 * options.minutes)
    readings = [{"seconds": round(moment), **kinds} for moment, kinds in samples]
    write(options.out / "soak.json", {"parts": report, "faults": said, "readings": readings})
    print(table(report))
    faults = [*said, *growth(report)]
    print("\n".join(faults) or "nothing grows")
    return 1 if faults else 0


def soak(
    options: argparse.Namespace, run: Path
) -> tuple[list[tuple[float, dict[str, Sample]]], list[tuple[float, float]], list[str]]:
    """Train for a while.

    Returns:
        Readings with the second they were made in, by kind of process; seconds of a step with the
        second of the line of the log that tells it; and what was wrong.
    """
    data = [f"--evaluation.{n}.data={options.data}" for n in range(3)]
    command = [
        "bash", str(ROOT / "launch" / "deepspeed.sh"), "flip", "demo",
        f"--data.train={options.data / 'train'}", *data, f"--run.dir={run}", *OFTEN,
        f"--engine.deepspeed-config={ROOT / 'ds_configs' / 'zero1.json'}",
    ]  # fmt: skip
    environment = os.environ | {"PROCESSES": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with (run.parent / "soak.log").open("wb") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        samples, seconds, begun = [], [], 0.0
        num_lines = 0
        while launcher.poll() is None:
            lines = read_json_lines(run / "metrics.jsonl")[0]
            begun = begun or (time.monotonic() if lines else 0.0)
            if not begun:  # it is starting
                time.sleep(1.0)
                continue
            passed = time.monotonic() - begun
            seconds += [
                (passed, line["samples"] / line["step"] / line["samples_per_second"])
                for line in lines[num_lines:]
                if "samples_per_second" in line
            ]
            num_lines = len(lines)
            if passed > 60 * options.minutes:
                break
            samples.append((passed, reading(launcher.pid)))
            time.sleep(options.every)
        ended_early = launcher.poll() is not None
        children = [] if ended_early else psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=300)
    faults = [f"training ended by itself: see {log.name}"] if ended_early else []
    left = psutil.wait_procs(children, timeout=60)[1]
    faults += [f"{len(left)} processes were left running"] if left else []
    return samples, seconds, faults


def reading(launcher: int) -> dict[str, Sample]:
    """Memory, open files and threads now, by kind of process."""
    sums: dict[str, Sample] = defaultdict(lambda: defaultdict(float))
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error), process.oneshot():
                kind = _kind(process)
                memory = process.memory_info()
                sample = sums[kind]
                sample["processes"] += 1
                sample["MiB"] += memory.rss / 2**20
                sample["private MiB"] += (memory.rss - memory.shared) / 2**20
                sample["files"] += process.num_fds()
                sample["threads"] += process.num_threads()
    return sums


def _kind(process: psutil.Process) -> str:
    words = process.cmdline()
    parent = process.parent()
    if any("checkpoint.writer" in word for word in words):
        return "writing"
    if not any(word.startswith("--run.dir") for word in words) or "RANK" not in process.environ():
        return "launching"
    # a loader is a fork of the process that trains
    return "loading" if parent is not None and parent.cmdline() == words else "training"


def summary(
    samples: Sequence[tuple[float, Mapping[str, Sample]]],
    seconds: Sequence[tuple[float, float]],
    total: float,
) -> list[dict[str, float]]:
    """Medians of every fifth of the time."""
    parts = []
    for part in range(PARTS):

        def is_in(moment: float, part: int = part) -> bool:
            return part * total <= PARTS * moment < (part + 1) * total

        row = {}
        inside = [reading for moment, reading in samples if is_in(moment)]
        for kind in sorted({kind for reading in inside for kind in reading}):
            for what in WHAT:
                values = [reading[kind][what] for reading in inside if kind in reading]
                row[f"{kind} {what}"] = round(statistics.median(values), 1)
        steps = [sec for moment, sec in seconds if is_in(moment)]
        if steps:
            row["seconds of a step"] = round(statistics.median(steps), 4)
        parts.append(row)
    return parts


def growth(parts: Sequence[Mapping[str, float]]) -> list[str]:
    """What was more in the last part than in the second."""
    allowed = {"MiB": 1.02, "step": 1.1}
    return [
        f"{name}: {parts[1][name]} in the second fifth, {parts[-1][name]} in the last"
        for name in parts[1]
        if name in parts[-1]
        and not ("MiB" in name and "training" not in name)
        and parts[-1][name] > parts[1][name] * allowed.get(name.split()[-1], 1.0)
    ]


def table(parts: Sequence[Mapping[str, float]]) -> str:
    """Every number by fifth of the time, in Markdown."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    head = ["|  | " + " | ".join(f"part {n + 1}" for n in range(len(parts))) + " |"]
    rows = [f"| {n} | " + " | ".join(str(part.get(n, "")) for part in parts) + " |" for n in names]
    return "\n".join([*head, "|---" * (len(parts) + 1) + "|", *rows])


if __name__ == "__main__":
    sys.exit(main())
