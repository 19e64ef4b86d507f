"""What several tests need: a small scenes data set, a small model, and real launches of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors.torch import load_file
from torch import nn

from forks import TORCH, Forked, fork
from frugal.common.contracts import EvaluationTask
from frugal.common.data.stores.tfrecord import crc32c, mask_checksum
from frugal.common.models.bundle import ModelBundle
from frugal.common.ports import free_port
from frugal.common.recipe import Recipe
from frugal.common.weights.runs import bundle_of

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
QUICK = ROOT / "tests" / "quick"
"""The folder of a ``python`` and of launchers that start at once."""
FLIP = "frugal.flip.train"

TINY_WITH_CLIPS_WORDS = (
    "--model.image.width=32", "--model.image.depth=1", "--model.image.heads=2",
    "--model.image.mlp-width=64", "--model.image.image-size=32",
    "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--model.text.mlp-width=64", "--model.embed-dim=16",
    "--data.workers=0", "--engine.precision=float32", "--run.log-every=1",
    "--batch-size=24", "--schedule.samples=480", "--schedule.warmup-samples=48",
)  # fmt: skip
"""FLIP's demo, small enough for seconds: 20 steps of 24 samples in float32."""
TINY = (
    *TINY_WITH_CLIPS_WORDS, "--data.tokenizer=frugal.common.data.tokenizers.WordPiece",
    f"--data.tokenizer.vocab={ROOT / 'tests' / 'words.txt'}", "--model.text.vocabulary=192",
)  # fmt: skip
"""The same with few words: in the table of CLIP's would be 98 of 100 parameters."""


@dataclass(frozen=True)
class Launcher:
    """A way in which a training script is started."""

    name: str
    processes: int = 1
    deepspeed_stage: int | None = None
    launched_by: Literal["fork", "python", "torchrun", "deepspeed"] = "fork"
    """By a command as users type it; or by a fork per process, which costs no time."""

    def command(self, module: str, folder: Path) -> list[str]:
        """The words before the recipe, with the programs of a folder."""
        if self.launched_by == "deepspeed":
            return [
                str(folder / "deepspeed"), "--num_accelerators", str(self.processes),
                "--master_port", str(free_port()), "--module", module,
            ]  # fmt: skip
        if self.launched_by == "torchrun":
            return [
                str(folder / "torchrun"), "--master_port", str(free_port()),
                "--nproc_per_node", str(self.processes), "-m", module,
            ]  # fmt: skip
        return [str(folder / "python"), "-m", module]

    def environments(self) -> list[dict[str, str]]:
        """Of every process that is forked: what torchrun tells its processes."""
        if self.processes == 1:
            return [environment()]
        together = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(self.processes), "LOCAL_WORLD_SIZE": str(self.processes),
        }  # fmt: skip
        return [
            environment() | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(self.processes)
        ]

    def flags(self) -> list[str]:
        """The engine's flags."""
        if self.deepspeed_stage is None:
            return []
        file = ROOT / "ds_configs" / f"zero{self.deepspeed_stage}.json"
        return [f"--engine.deepspeed-config={file}"]


ALONE = Launcher("one process")
DDP = Launcher("two DDP processes", processes=2)


PYTHON = Launcher("one process under python", launched_by="python")
TORCHRUN = Launcher("two DDP processes under torchrun", processes=2, launched_by="torchrun")


def zero(stage: int, processes: int = 2) -> Launcher:
    """Processes at a ZeRO stage."""
    return Launcher(f"{processes} x ZeRO-{stage}", processes=processes, deepspeed_stage=stage)


def deepspeed(stage: int, processes: int = 2) -> Launcher:
    """Processes at a ZeRO stage under the deepspeed launcher, which hands on exit codes."""
    name = f"{processes} x ZeRO-{stage} under deepspeed"
    return Launcher(name, processes, deepspeed_stage=stage, launched_by="deepspeed")


def environment(*, quick: bool = False) -> dict[str, str]:
    """The environment of a launched run: nothing of a launcher around the tests."""
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    kept |= {"PATH": f"{BIN}:{kept['PATH']}", "DS_ACCELERATOR": "cpu"}
    if quick:
        kept |= {"PATH": f"{QUICK}:{kept['PATH']}", "TESTS_PYTHON": sys.executable}
    return kept


def train(
    launcher: Launcher,
    run: Path,
    *words: str,
    recipe: str = "demo",
    expect: int = 0,
    module: str = FLIP,
    small: Sequence[str] = TINY,
    cwd: Path = ROOT,
    quick: bool = True,
) -> str:
    """Train the tiny FLIP, or another method, to its end; all that it wrote to the terminal.

    Later words win over earlier ones. Launchers and what they start are quick, unless that start is
    what a test is about.
    """
    quick &= launcher.launched_by in ("deepspeed", "torchrun")
    process = start(
        launcher, run, *words, recipe=recipe, module=module, small=small, cwd=cwd, quick=quick
    )
    code = process.wait(timeout=600)
    output = log_of(run).read_text()
    assert code == expect, f"exit code {code}\n{output[-6000:]}"
    return output


def start(
    launcher: Launcher,
    run: Path,
    *words: str,
    recipe: str = "demo",
    module: str = FLIP,
    small: Sequence[str] = TINY,
    cwd: Path = ROOT,
    quick: bool = False,
) -> subprocess.Popen[bytes] | Forked:
    """Start training, in a process group of its own."""
    words = (recipe, *small, *launcher.flags(), f"--run.dir={run}", *words)
    log = log_of(run)
    log.unlink(missing_ok=True)
    if launcher.launched_by == "fork":
        return fork(module, words, log=log, cwd=cwd, environments=launcher.environments())
    return subprocess.Popen(
        [*launcher.command(module, QUICK if quick else BIN), *words],
        cwd=cwd,
        env=environment(quick=quick),
        start_new_session=True,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def command(
    module: str, *words: object, cwd: Path = ROOT, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """What ``python -m`` does with a module and words; without the wait for its imports."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        given = [str(word) for word in words]
        # what torchrun starts, too
        environments = [environment(quick=True) | {"PYTHON_EXEC": str(QUICK / "python")}]
        process = fork(module, given, log=out, errors=errors, cwd=cwd, environments=environments)
        code = process.wait(timeout=600)
        done = subprocess.CompletedProcess(given, code, out.read_text(), errors.read_text())
    assert code == expect, f"exit code {code}\n{done.stdout}{done.stderr[-6000:]}"
    return done


def run_code(code: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What ``python -c`` does with code; in a process that has imported torch, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors, script = (Path(folder, name) for name in ("out", "errors", "code.py"))
        script.write_text(code)
        given = [str(word) for word in words]
        process = fork(
            str(script), given, log=out, errors=errors, cwd=ROOT,
            environments=[environment() | variables], address=TORCH,
        )  # fmt: skip
        returncode = process.wait(timeout=600)
        return subprocess.CompletedProcess(given, returncode, out.read_text(), errors.read_text())


def cpu_seconds_of(*words: str) -> tuple[float, str]:
    """What a fresh Python takes of a core, whatever else the machine does, and what it says."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    said = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before, said.stdout


def start_ranks(script: str, world_size: int, folder: Path, *words: object) -> Forked:
    """Start a script once per process of a group; its words are its rank, a folder and others."""
    given = ["{rank}", str(folder), *map(str, words)]
    environments = [environment() | {"OMP_NUM_THREADS": "1"}] * world_size
    return fork(script, given, log=folder / "log", cwd=ROOT, environments=environments)


def log_of(run: Path) -> Path:
    """Where a run that tests start writes what it says."""
    return run.parent / f"{run.name}.log"


def wait_for_step(process: subprocess.Popen[bytes] | Forked, run: Path, step: int) -> None:
    """Return once a step is logged."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in metrics(run)):
        assert process.poll() is None, log_of(run).read_text()[-6000:]
        assert time.monotonic() < deadline, "the step was never reached"
        time.sleep(0.005)


def kill_at_step(
    process: subprocess.Popen[bytes] | Forked, run: Path, step: int, number: int
) -> None:
    """Send a signal to a run, all of its processes, once a step is logged; wait for its end."""
    wait_for_step(process, run, step)
    if isinstance(process, Forked):
        process.send_signal(number)
        process.wait(timeout=120)
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    process.wait(timeout=120)  # first: psutil would take its exit code away
    psutil.wait_procs(tree[1:], timeout=120)


def metrics(run: Path) -> list[dict]:
    """The whole lines of ``metrics.jsonl``."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]


def losses(run: Path) -> dict[int, float]:
    """The loss of every logged step."""
    return {line["step"]: line["loss"] for line in metrics(run)}


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def rewrite_shard(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Copy a tar with what ``change`` makes of a member's name and content; None leaves it out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            content = change(member.name, file.read())
            if content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))


def tfrecord(features: dict[str, bytes]) -> bytes:
    """A tf.train.Example of byte strings in the framing of TFRecord."""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size >= 128:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    entries = b"".join(
        field(1, field(1, name.encode()) + field(2, field(1, field(1, value))))
        for name, value in features.items()
    )
    data = field(1, entries)
    header = struct.pack("<Q", len(data))
    parts = [(part, struct.pack("<I", mask_checksum(crc32c(part)))) for part in (header, data)]
    return b"".join(piece for pair in parts for piece in pair)


def alter_state(checkpoint: Path, **changes: object) -> None:
    """Change what a checkpoint says; it has no manifest then, as those of earlier versions."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text()) | changes
    state.pop("manifest")
    (checkpoint / "manifest.json").unlink()
    path.write_text(json.dumps(state))


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, by ``kind/name``."""
    tensors: dict[str, torch.Tensor] = {}
    for file in newest(run).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def largest_difference(
    left: dict[str, torch.Tensor],
    right: dict[str, torch.Tensor],
    kinds: Sequence[str] = ("weight",),
) -> float:
    """Over the tensors of the given kinds, which both must have."""
    assert left.keys() == right.keys()
    names = [name for name in left if name.split("/")[0] in kinds]
    assert names
    return max((left[name] - right[name]).abs().max().item() for name in names)


def described(recipe: Recipe) -> ModelBundle:
    """The model of a recipe where nothing but its description is asked for."""
    return bundle_of(nn.Module(), recipe)


def described_with_tasks(recipe: Recipe) -> tuple[ModelBundle, tuple[EvaluationTask, ...]]:
    """The same, with what its run is measured on."""
    return described(recipe), recipe.evaluation
