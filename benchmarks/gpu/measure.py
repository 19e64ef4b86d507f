"""What ``run.sh`` runs, part by part; results.json is whole after each of them.

Goals are of one H200, where the command fails if one is missed. Elsewhere they are shown beside
what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import write

ROOT = Path(__file__).parents[2]
LIMIT = 480.0
"""Seconds of all parts together."""
KEPT = 5.0
"""Seconds that are left for writing what was found."""


@dataclass(frozen=True)
class Part:
    """A command that writes what it finds."""

    name: str
    command: list[str]
    result: str
    """Name of the file, JSON or XML, in the folder of results; empty where the log is all."""
    seconds: float
    """It may take at most."""


@dataclass(frozen=True)
class Goal:
    """A number that a machine of this kind should reach."""

    words: str
    row: str
    """``part/row`` of a training step."""
    least: float
    of: str = ""
    """Another row, whose samples/s are the unit; without one it is samples/s, or a share."""
    field: str = "samples_per_second"


GOALS = (  # what is masked sees captions of real length, as dense-real does
    Goal(
        "FLIP L/16 50 %: share of the peak", "steps-vit-l16/flip-0.5", 0.45, field="share_of_peak"
    ),
    Goal(
        "FLIP L/16 75 % over dense", "steps-vit-l16/flip-0.75", 3.3, of="steps-vit-l16/dense-real"
    ),
    Goal(
        "FLIP L/16 50 % over open_clip",
        "steps-vit-l16/flip-0.5",
        1.3,
        of="steps-vit-l16/flip-0.5/open_clip",
    ),
    Goal(
        "FLIP L/16 50 %, both compiled",
        "compiled-vit-l16/flip-0.5",
        1.3,
        of="compiled-vit-l16/flip-0.5/open_clip",
    ),
    Goal("FLIP B/16 50 %, samples/s", "steps-vit-b16/flip-0.5", 7400),
    Goal("CLIPA B/16 I50 T16, samples/s", "steps-vit-b16/clipa-i50-t16", 15000),
    Goal("CLIPA L/16 I37 T8, samples/s", "steps-vit-l16/clipa-i37-t8", 6200),
)


def main() -> None:
    """Run every part, write results.json and results.txt, and fail where a part failed."""
    options = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    begun, limit = time.monotonic(), LIMIT * (8 if options.small else 1)
    report: dict[str, Any] = {"machine": machine(options.device), "small": options.small}
    report |= {"parts": {}, "goals": {}}
    for part in parts_of(options):
        left = limit - KEPT - (time.monotonic() - begun)
        report["parts"][part.name] = run(part, options, min(part.seconds, left))
        report["seconds"] = round(time.monotonic() - begun, 1)
        write(options.out / "results.json", report)
    report["goals"] = {goal.words: judged(goal, report["parts"]) for goal in GOALS}
    write(options.out / "results.json", report)
    text = table(report)
    (options.out / "results.txt").write_text(text)
    print(text, end="")
    failed = [name for name, part in report["parts"].items() if part["state"] == "failed"]
    is_judged = "H200" in report["machine"]["device"] and not options.small
    missed = [name for name, goal in report["goals"].items() if goal["met"] is False]
    if failed or (is_judged and missed):
        sys.exit(f"failed: {', '.join(failed) or 'none'}; goals missed: {', '.join(missed) or '-'}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU takes in minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu"))
    return parser.parse_args()


def machine(device: str) -> dict[str, Any]:
    """What the numbers are of."""
    import torch

    from frugal.common.engine.throughput import matmul_peak
    from frugal.common.models.attention import attention_kernel

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu --small shows whether everything runs")
    place = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "attention": attention_kernel(place),
        "peak_tflops": round(matmul_peak(place, dtype) / 1e12, 2),
    }


def parts_of(options: argparse.Namespace) -> Iterator[Part]:
    """Everything, the most telling first."""
    small, device = options.small, ["--device", options.device]
    step = "benchmarks/train_step.py"
    precision = ["--precision", "float32" if options.device == "cpu" else "bfloat16"]
    rows = {
        "vit-b16": "dense-real,flip-0.5,flip-0.75,clipa-i50-t16,cluster,milan",
        "vit-l16": "dense-full,dense-real,flip-0.5,flip-0.75,clipa-i37-t8",
    }
    sizes = ["--batch", "4", "--steps", "1"] if small else ["--steps", "10"]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if small:  # compilers take minutes on a CPU
        tests += ["-k", "not compiled"]
    yield Part("tests", [*tests, *TESTS, "--junitxml"], "tests.xml", 1800 if small else 150)
    for model, of_model in rows.items():
        model = "vit-s16" if small else model
        batch = [] if small else ["--batch", "1024" if model == "vit-b16" else "512"]
        words = ["--model", model, "--rows", of_model, *precision, *sizes, *batch, *device]
        name = f"steps-{model}"
        yield Part(name, [sys.executable, step, *words, "--out"], f"{name}.json", 85)
        if small:
            break
    words = ["--model", "vit-s16" if small else "vit-l16", "--rows", "flip-0.5", "--compile"]
    words += [*precision, *sizes, *([] if small else ["--batch", "512"]), *device]
    name = f"compiled-{words[1]}"
    yield Part(name, [sys.executable, step, *words, "--out"], f"{name}.json", 60)
    words = [] if small else ["--batch", "8192", "--world", "32"]  # its limit is of 32,768 at least
    command = [sys.executable, "benchmarks/loss.py", *words, *device, "--out"]
    yield Part("loss", command, "loss.json", 900 if small else 70)
    # in words, in plan.log: what to hold the peak memory of the rows of L/16 against
    words = ["flip:large", "--gpus", "1", "--gpu", "h200-141", "--batch-size", "512"]
    command = [sys.executable, "-m", "frugal.common.plan", *words]
    yield Part("plan", command, "", 30)


TESTS = (
    "tests/rehearsal/test_on_a_gpu.py", "tests/common/models/test_attention.py",
    "tests/milan/test_fast_path.py", "tests/common/engine/test_loop_host_reads.py",
    "tests/common/engine/test_deterministic.py",
)  # fmt: skip
"""Files with tests that want a GPU."""


def run(part: Part, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part; what it found, how long it took, and what became of it."""
    if seconds <= 0:
        return {"state": "failed", "why": "no time was left"}
    result = options.out / part.result if part.result else None
    if result is not None:
        result.unlink(missing_ok=True)
    environment = os.environ | {"FRUGAL_GPU_TESTS_ON": options.device}
    begun = time.monotonic()
    with (options.out / f"{part.name}.log").open("w") as log:
        command = [*part.command, *([str(result.resolve())] if result else [])]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, stdout=log,
                stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
            why = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"took more than {seconds:.0f} s"
    spent = round(time.monotonic() - begun, 1)
    found = read_result(result) if result is not None and result.exists() else {}
    if part.name == "tests" and not found.get("passed"):
        why = why or "no test ran"
    state = {"state": "failed", "why": why} if why else {"state": "done"}
    return {**state, "seconds": spent, "found": found}


def read_result(file: Path) -> Any:
    """What a part wrote; of tests how many passed, and the names of those that did not."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    cases = list(ElementTree.parse(file).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def rows_of(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every row of training steps, as ``part/row``, and open_clip's as ``part/row/open_clip``."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        for row in part.get("found", {}).get("rows", ()):
            found[f"{name}/{row['row']}"] = row["ours"]
            if "open_clip" in row:
                found[f"{name}/{row['row']}/open_clip"] = row["open_clip"]
    return found


def judged(goal: Goal, parts: dict[str, Any]) -> dict[str, Any]:
    """A goal beside what was measured; ``met`` is None where nothing was."""
    rows = rows_of(parts)
    row = rows.get(goal.row, {})
    value = row.get(goal.field)
    if goal.of and value is not None:
        unit = rows.get(goal.of, {}).get("samples_per_second")
        value = value / unit if unit else None
    met = None if value is None else value >= goal.least
    return {"least": goal.least, "measured": value, "met": met}


def table(report: dict[str, Any]) -> str:
    """Everything on one page."""
    facts = report["machine"]
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines.append(f"{report['seconds']} s in all")
    for name, part in report["parts"].items():
        why = part.get("why", "")
        lines.append(f"{name:28}{part['state']:10}{part.get('seconds', 0):8.1f} s  {why}")
    tests = report["parts"]["tests"].get("found", {})
    if tests:
        lines.append(f"tests: {tests['passed']} passed, {tests['skipped']} skipped")
        lines += [f"  failed: {name}" for name in tests["failed"]]
    for name, row in rows_of(report["parts"]).items():
        share, memory = row.get("share_of_peak"), row.get("peak_mib")
        peak = "" if share is None else f"{share:8.1%} of the peak"
        peak += "" if memory is None else f"{memory:10.0f} MiB"
        lines.append(f"{name:44}{row['samples_per_second']:12.1f} samples/s{peak}")
    if found := report["parts"]["loss"].get("found"):
        pairs = found["local_batch"] * found["processes"]
        lines.append(
            f"loss of {pairs:,} pairs: {found['memory_ratio']:.3f} times open_clip's memory, "
            f"{found['time_ratio']:.2f} times its time"
        )
    for words, goal in report["goals"].items():
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.4g}"
        word = {True: "met", False: "missed", None: "-"}[goal["met"]]
        lines.append(f"{words:44}{measured:>14} of {goal['least']:<8g}{word}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
