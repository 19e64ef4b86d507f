"""Peak memory that a plan predicts for a step, against the peak of a process that takes it on CPU.

    python benchmarks/plan_against_measured.py

Thirteen recipes at reduced depth, over methods, ZeRO stages and activation checkpointing, each in
processes of its own. Measured is the resident memory of the fullest process, from before its model
was built to the fullest moment of its third step. Predicted is what ``frugal.common.plan`` says
for a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import measured, write

BUCKET = 5_000_000
"""Numbers; DeepSpeed's 500 million would be more than everything else."""


@dataclass(frozen=True)
class Setting:
    """One configuration."""

    recipe: str
    """PROGRAM:NAME."""
    stage: int | None = None
    """Of ZeRO; None for Accelerate."""
    processes: int = 1
    checkpoint: bool = False
    precision: str = "float32"
    accumulate: int = 1
    batch: int = 16
    """Of a process and micro-batch."""
    most_off: float = 0.10
    """Largest difference, as a share of what was measured."""

    @property
    def words(self) -> str:
        """For the table."""
        engine = "Accelerate" if self.stage is None else f"ZeRO-{self.stage}"
        return ", ".join(
            [
                self.recipe,
                f"{engine} x {self.processes}",
                *(["recomputed"] if self.checkpoint else []),
                *([self.precision] if self.precision != "float32" else []),
                *([f"{self.accumulate} micro-batches"] if self.accumulate > 1 else []),
            ]
        )


SETTINGS = (
    Setting("flip.train:base"),
    Setting("flip.train:base", checkpoint=True, batch=96),
    Setting("flip.train:base", processes=2),
    Setting("flip.train:base-tuning", stage=0, processes=2),
    Setting("flip.train:base", stage=1, processes=2, precision="bfloat16"),
    Setting("flip.train:base", stage=2, processes=2, accumulate=2),
    Setting("clipa.train:vit-b16-i50-t16-tuning-224", stage=2, processes=2, checkpoint=True),
    Setting("clipa.train:vit-b16-i50-t16", stage=3, processes=2, batch=48),
    Setting(
        "cluster_masking.train:vit-b16-cc12m-random",
        stage=3,
        processes=2,
        checkpoint=True,
        batch=48,
    ),
    Setting("milan.pretrain:vit-b16-pixels", stage=1, processes=2),
    Setting("milan.finetune:vit-b16", stage=2),
    Setting("cit.train:demo", stage=1, batch=1024),
    # oneDNN lays images out anew inside of convolutions, which no operator shows
    Setting("milan.segment:vit-b16", batch=2, most_off=0.2),
)


def main() -> None:
    """Measure every setting, print a table, and fail where a prediction is too far off."""
    options = read_options()
    if options.measure is not None:
        result = measure(SETTINGS[options.measure])
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stdout.write(json.dumps(result) + "\n")
        return
    rows: list[dict[str, Any]] = []
    chosen = options.only or range(len(SETTINGS))
    for number in chosen:
        setting = SETTINGS[number]
        row: dict[str, Any] = {"setting": setting.words, "predicted": predict(setting)}
        command = [sys.executable, __file__, f"--measure={number}"]
        if setting.processes > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone",
                            f"--nproc_per_node={setting.processes}"]  # fmt: skip
        row["measured"] = measured(command, _EXACT_MALLOC)["peak_mib"]
        row["off"] = row["predicted"] / row["measured"] - 1
        row["most_off"] = setting.most_off
        rows.append(row)
        print(
            f"| {row['setting']} | {row['measured']:.0f} | {row['predicted']:.0f} "
            f"| {row['off']:+.1%} |",
            flush=True,
        )
    write(options.out, {"settings": rows})
    far = [row["setting"] for row in rows if abs(row["off"]) > row["most_off"]]
    if far:
        sys.exit(f"predictions that are too far off: {'; '.join(far)}")


_EXACT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_PERTURB_": "165",
}
"""Have glibc give memory back as soon as it is freed, and write to all of it when it is taken: what
is resident is what is allocated then, as on a GPU."""


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    out = Path("runs/benchmarks/plan_against_measured.json")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0")
    parser.add_argument("--measure", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe_of(setting: Setting, folder: Path) -> Any:
    """The recipe at reduced depth and batch, with its DeepSpeed file in a folder."""
    from frugal.common.recipe import EngineOptions
    from frugal.common.transfer.segmenter import SegmenterConfig

    program, _, name = setting.recipe.partition(":")
    module = importlib.import_module(f"frugal.{program}")
    recipes = next(v for v in vars(module).values() if isinstance(v, dict) and name in v)
    recipe = recipes[name]()
    model = recipe.model
    small: dict[str, Any] = {"image": replace(model.image, depth=4)}
    if isinstance(model, SegmenterConfig):
        small |= {"taps": (1, 2, 3, 4), "width": 128, "num_classes": 20}
    if hasattr(model, "text"):
        small["text"] = replace(model.text, depth=2)
    config = None
    if setting.stage is not None:
        config = folder / "deepspeed.json"
        zero = {"stage": setting.stage, "reduce_bucket_size": BUCKET,
                "overlap_comm": setting.stage > 1}  # fmt: skip
        config.write_text(json.dumps({"zero_optimization": zero}))
    engine = EngineOptions(
        device="cpu",
        deepspeed_config=config,
        precision=setting.precision,  # type: ignore[arg-type]
        accumulate=setting.accumulate,
        checkpoint_activations=setting.checkpoint,
    )
    batch = setting.batch * setting.processes * setting.accumulate
    return replace(recipe, model=replace(model, **small), engine=engine, batch_size=batch)


def predict(setting: Setting) -> float:
    """MiB by the plan."""
    import torch

    from frugal.common.plan.fake_step import step_memory
    from frugal.common.plan.partition import Zero, peak_memory

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(setting, Path(folder))
        config = recipe.engine.deepspeed_config
        zero = None if config is None else Zero.read(config)
    step = step_memory(
        recipe,
        samples=setting.batch,
        world_size=setting.processes,
        dtype=getattr(torch, setting.precision),
        on_gpu=False,
    )
    memory = peak_memory(
        step,
        zero,
        world_size=setting.processes,
        moments=len(recipe.optimizer.moments),
        accumulate=setting.accumulate,
    )
    return memory.total / 2**20


def measure(setting: Setting) -> dict[str, Any]:
    """MiB that the fullest process grew by at the fullest moment of its last step."""
    import torch

    from frugal.common.distributed import gather_objects
    from frugal.common.engine.step import train_step
    from frugal.common.recipe import Recipe
    from frugal.common.run import make_logger, open_run
    from frugal.common.train import make_engine

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe: Recipe = recipe_of(setting, folder)
        make_logger(1)
        run = open_run(folder / "run", "cpu", threads=1)
        _warm_up(recipe, run)
        before = _status("VmRSS")
        engine = make_engine(recipe.objective.build(recipe), recipe, run)
        batches = [random_batch(recipe, setting.batch) for _ in range(setting.accumulate)]
        for step in range(3):
            if step == 2:
                Path("/proc/self/clear_refs").write_text("5")  # forget the fullest moment so far
            train_step(engine, recipe, step, batches)
        peak = _status("VmHWM") - before
        peak = max(gather_objects(peak))
        engine.close()
    return {"peak_mib": peak}


def _warm_up(recipe: Any, run: Any) -> None:
    """Take a step of a tiny recipe with the same engine: what libraries load is no tensor."""
    from frugal.common.engine.step import train_step
    from frugal.common.train import make_engine
    from frugal.flip.recipes import demo

    tiny = replace(
        demo(), engine=replace(recipe.engine, accumulate=1), batch_size=2 * run.world_size
    )
    engine = make_engine(tiny.objective.build(tiny), tiny, run)
    for step in range(2):
        train_step(engine, tiny, step, [random_batch(tiny, 2)])


def _status(name: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 2**10


def random_batch(recipe: Any, samples: int) -> Any:
    """Noise in the shapes of the data."""
    import torch

    from frugal.common.contracts import Batch

    inputs = recipe.model.inputs()
    fields: dict[str, Any] = {
        "images": torch.randint(0, 256, (samples, 3, *inputs.height_width), dtype=torch.uint8),
        "sample_numbers": torch.arange(samples),
        "valid": torch.ones(samples, dtype=torch.bool),
    }
    if inputs.captions is not None:
        length = inputs.captions.length
        fields["token_ids"] = torch.randint(1, 400, (samples, length))
        fields["text_lengths"] = torch.full((samples,), length)
    if type(recipe.data).__name__ == "SegmentationData":
        shape = (samples, *inputs.height_width)
        fields["labels"] = torch.randint(0, inputs.num_classes, shape, dtype=torch.uint8)
    elif inputs.num_classes is not None:
        fields["labels"] = torch.randint(0, inputs.num_classes, (samples,))
    return Batch(**fields)


if __name__ == "__main__":
    main()
