"""Kill trainings at random, go on with them, and compare what they end in with undisturbed ones.

    python benchmarks/kill_campaign.py --kills 200

Every setting (a method under an engine) is trained once undisturbed. Then it is trained again and
again, and killed on the way with SIGKILL: one process of several, all of them, the launcher alone,
or a loader process; in the middle of steps, while a checkpoint is written, right before it is
renamed, while pairs are chosen, or during an evaluation. After every kill the same command goes on.
What a run ends in is compared with the undisturbed one: every saved tensor bit for bit, optimizer
moments included, and the ledger of steps, of which none may be missing or there twice.

A table and JSON go to ``--out``; the exit code is 1 where anything differs, was left running, or
ended with a stack trace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from frugal.common.files import read_json_lines
from frugal.common.ports import free_port

ROOT = Path(__file__).parents[1]
STEPS = 24
BATCH = 16
SMALL = (
    "--model.image.width=32", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--engine.precision=float32", "--engine.device=cpu",
    f"--batch-size={BATCH}", f"--schedule.samples={STEPS * BATCH}",
    "--schedule.warmup-samples=32", "--run.log-every=1", "--run.save-every=4", "--run.digests",
    "--data.workers=1",
)  # fmt: skip
WORDS_OF_TEXTS = (
    "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--model.text.mlp-width=64", "--model.embed-dim=16", "--run.evaluate-every=8",
)  # fmt: skip
MOMENTS = ("step", "writing", "renaming", "evaluation", "curation")
VICTIMS = ("process", "all", "launcher", "loader")
PATIENCE = 120.0
"""Seconds within which the rest of a killed run must have ended, and a moment must come."""


@dataclass(frozen=True)
class Setting:
    """A method under an engine."""

    method: str
    engine: str

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.method}, {self.engine}"

    @property
    def processes(self) -> int:
        """That train together."""
        return 1 if self.engine == "accelerate" else 2

    def command(self, data: Path, teacher: Path, run: Path) -> list[str]:
        """What a user would type."""
        module = f"frugal.{self.method}.{'pretrain' if self.method == 'milan' else 'train'}"
        python, words = sys.executable, [*SMALL, f"--data.train={data / 'train'}"]
        if self.method == "milan":
            words += ["--model.decoder.width=16", "--model.decoder.heads=2"]
            words += [f"--objective.teacher.source={teacher}"]
        else:
            words += [*WORDS_OF_TEXTS, f"--evaluation.0.data={data}"]
        if self.method == "cluster_masking":
            words += ["--reduction.image.threshold=0.5"]
        if self.method == "cit":
            classes = data / "zero_shot" / "classnames.txt"
            words += [f"--data.metadata.sources={classes}", "--data.period=4", "--data.scan=40"]
        if self.engine == "zero2":
            words += [f"--engine.deepspeed-config={ROOT / 'ds_configs' / 'zero2.json'}"]
        start = [python, "-m", module]
        if self.processes > 1:
            launch = [python, "-m", "torch.distributed.run", "--master_port", str(free_port())]
            start = [*launch, "--nproc_per_node", str(self.processes), "-m", module]
        return [*start, "demo", f"--run.dir={run}", *words]


@dataclass
class Tally:
    """What happened to the runs of a setting."""

    kills: Counter[str] = field(default_factory=Counter)
    """By moment and victim."""
    runs: int = 0
    faults: list[str] = field(default_factory=list)


class Attempt:
    """One start of a command, whose process tree can be killed in parts."""

    def __init__(self, command: Sequence[str], run: Path) -> None:
        self.run = run
        self.log = run.with_suffix(".log")
        self.begins_at = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> bool:
        """Remember every process below the launcher; whether the command still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.launcher.pid)
            self.seen |= {child.pid: child for child in top.children(recursive=True)}
        return self.launcher.poll() is None

    def trainers(self) -> list[psutil.Process]:
        """The processes that train, in no order."""
        found = [process for process in self.seen.values() if _is_trainer(process)]
        return found or [psutil.Process(self.launcher.pid)]

    def loaders(self) -> list[psutil.Process]:
        """Processes that trainers started."""
        trainers = self.trainers()
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for one in trainers for child in one.children() if _is_loader(child)]
        return []

    def kill(self, victim: str, generator: random.Random) -> None:
        """SIGKILL to a part of the tree."""
        self.look()
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if victim == "launcher":
                self.launcher.kill()
            elif victim == "process":
                generator.choice(self.trainers()).kill()
            elif victim == "loader":
                generator.choice(self.loaders()).kill()
            else:
                for process in [*self.seen.values(), psutil.Process(self.launcher.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()

    def left_running(self) -> list[int]:
        """Wait for all of the tree to end; what did not, which is ended then."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            is_running = self.look()
            alive = [pid for pid, process in self.seen.items() if _is_alive(process)]
            if not is_running and not alive:
                return []
            time.sleep(0.05)
        alive = [pid for pid, process in self.seen.items() if _is_alive(process)]
        self.kill("all", random.Random())
        return alive or [self.launcher.pid]

    def said(self) -> str:
        """What this attempt wrote."""
        return self.log.read_bytes()[self.begins_at :].decode(errors="replace")


def _is_trainer(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = " ".join(process.cmdline())
        is_below = "--run.dir" in words and "torch.distributed.run" not in words
        return is_below and not _is_loader(process)
    return False


def _is_loader(process: psutil.Process) -> bool:
    """A fork of a trainer has its command line."""
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        return parent is not None and parent.cmdline() == process.cmdline()
    return False


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(moment: str, attempt: Attempt, generator: random.Random) -> bool:
    """Until a moment has come in a run; False where it ended, or the moment did not come."""
    checkpoints, curation = attempt.run / "checkpoints", attempt.run / "curation"
    begun, chosen = _last_step(attempt.run), _count(curation)
    target = generator.randint(1, 6)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and attempt.look():
        step = _last_step(attempt.run)
        writing = list(checkpoints.glob(".*.writing*")) if checkpoints.exists() else []
        comes = {
            "step": step >= begun + target,
            "writing": bool(writing),
            "renaming": any((folder / "state.json").exists() for folder in writing),
            "evaluation": step > begun and step % 8 == 0,
            "curation": _count(curation) > chosen,
        }
        if comes[moment]:
            time.sleep(generator.uniform(0, {"evaluation": 0.3, "step": 0.1}.get(moment, 0.005)))
            return attempt.look()
        time.sleep(0.001)
    return False


def _count(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.exists() else 0


def _last_step(run: Path) -> int:
    lines, _ = read_json_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def moments_of(setting: Setting) -> list[str]:
    """What there is to interrupt."""
    absent = {"milan": {"evaluation", "curation"}}.get(setting.method, {"curation"})
    return [m for m in MOMENTS if m not in (set() if setting.method == "cit" else absent)]


def tensors(run: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the last checkpoint holds."""
    folder = run / "checkpoints" / f"step_{STEPS:09d}"
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - no mapping
                yield name, content.get_tensor(name)


def differences(undisturbed: Path, disturbed: Path) -> list[str]:
    """Where two runs do not agree, in words."""
    there, here = dict(tensors(undisturbed)), dict(tensors(disturbed))
    found = [] if there.keys() == here.keys() and there else ["other tensors were saved"]
    unequal = [name for name in there.keys() & here.keys() if not there[name].equal(here[name])]
    found += [f"{len(unequal)} tensors differ, {sorted(unequal)[0]} among them"] if unequal else []
    for name in ("metrics.jsonl", "digests.jsonl"):
        ledgers = [_ledger(run / name) for run in (undisturbed, disturbed)]
        if ledgers[0] != ledgers[1]:
            found.append(f"{name} differs")
    return found


_VOLATILE = ("time", "seconds", "per_second", "wait", "share_of_peak", "memory", "eta")


def _ledger(path: Path) -> list[dict]:
    """Every line without what clocks and memory say."""
    return [
        {key: v for key, v in line.items() if not any(word in key for word in _VOLATILE)}
        for line in read_json_lines(path)[0]
    ]


def campaign(setting: Setting, options: argparse.Namespace, data: Path, teacher: Path) -> Tally:
    """Train undisturbed, then with kills until there are enough of them."""
    folder = options.out / f"{setting.method}-{setting.engine}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    undisturbed, tally = folder / "undisturbed", Tally()
    first = Attempt(setting.command(data, teacher, undisturbed), undisturbed)
    if first.left_running() or first.launcher.returncode:
        sys.exit(f"{setting.name} does not train undisturbed:\n{first.said()[-3000:]}")
    generator = random.Random(f"{options.seed} {setting.name}")
    while tally.kills.total() < options.kills_each:
        run = folder / f"run{tally.runs}"
        _finish_with_kills(setting, options, data, teacher, run, generator, tally)
        tally.runs += 1
        found = differences(undisturbed, run)
        tally.faults += [f"{run}: {what}" for what in found]
        if not found:
            shutil.rmtree(run)
    return tally


def _finish_with_kills(
    setting: Setting,
    options: argparse.Namespace,
    data: Path,
    teacher: Path,
    run: Path,
    generator: random.Random,
    tally: Tally,
) -> None:
    """One run, killed as often as it gives occasion to, and finished."""
    while True:
        attempt = Attempt(setting.command(data, teacher, run), run)
        moment = generator.choice(moments_of(setting))
        victims = VICTIMS if setting.processes > 1 else ("process", "loader")
        victim = generator.choice(victims)
        is_due = tally.kills.total() < options.kills_each
        if is_due and wait_for(moment, attempt, generator):
            attempt.kill(victim, generator)
            tally.kills[f"{moment}: {victim}"] += 1
        if left := attempt.left_running():
            tally.faults.append(f"{run}: {len(left)} processes left after {moment}: {victim}")
        said = attempt.said()
        # torchrun tells of a process that failed by a stack trace of its own
        if re.search(r'File ".*/frugal/', said) and victim == "loader":
            tally.faults.append(f"{run}: a stack trace after {moment}: {victim}")
        if attempt.launcher.returncode == 0:
            return
        if not is_due:
            tally.faults.append(f"{run}: does not go on: {said[-500:]}")
            return


def prepare(options: argparse.Namespace) -> tuple[Path, Path]:
    """Scenes, and a teacher for MILAN."""
    from frugal.common.scenes.settings import Settings
    from frugal.common.scenes.writing import write as write_scenes

    data, teacher = options.out / "scenes", options.out / "teacher"
    if not data.exists():
        write_scenes(
            Settings(
                out=data, image_size=32, train_samples=400, shard_size=100,
                compositional_samples=20, zero_shot_samples=64, probe_samples=64,
                retrieval_samples=40,
            )
        )  # fmt: skip
    if not (teacher / "checkpoints").exists():
        attempt = Attempt(Setting("flip", "accelerate").command(data, teacher, teacher), teacher)
        if attempt.left_running() or attempt.launcher.returncode:
            sys.exit(f"the teacher does not train:\n{attempt.said()[-3000:]}")
    return data, teacher


METHODS = ("flip", "clipa", "cluster_masking", "milan", "cit")
ENGINES = ("accelerate", "ddp", "zero2")


def main() -> int:
    """Run the campaigns that were asked for; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all settings together")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/kill_campaign"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    settings = [Setting(method, engine) for method in options.methods for engine in options.engines]
    options.kills_each = -(-options.kills // len(settings))
    options.out.mkdir(parents=True, exist_ok=True)
    data, teacher = prepare(options)
    results: dict[str, dict[str, Any]] = {}
    for setting in settings:
        tally = campaign(setting, options, data, teacher)
        results[setting.name] = {"kills": tally.kills, "runs": tally.runs, "faults": tally.faults}
        print(f"{setting.name}: {tally.kills.total()} kills in {tally.runs} runs, "
              f"{len(tally.faults)} faults", flush=True)  # fmt: skip
        (options.out / "kill_campaign.json").write_text(json.dumps(results, indent=1) + "\n")
    faults = [fault for result in results.values() for fault in result["faults"]]
    (options.out / "kill_campaign.md").write_text(_table(results))
    print("\n".join(faults) or "no fault")
    return 1 if faults else 0


def _table(results: dict[str, dict]) -> str:
    """Kills by setting and by what was hit when."""
    kinds = sorted({kind for result in results.values() for kind in result["kills"]})
    lines = [
        f"| setting | runs | {' | '.join(kinds)} | faults |",
        "|---|" * 1 + "---|" * (len(kinds) + 2),
    ]
    for name, result in results.items():
        counts = " | ".join(str(result["kills"][kind]) for kind in kinds)
        lines.append(f"| {name} | {result['runs']} | {counts} | {len(result['faults'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
