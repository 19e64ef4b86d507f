"""Linear probes of MILAN, of MAE towards pixels and of the frozen teacher, on scenes.

    python benchmarks/milan_scenes.py

For every seed the demo of FLIP is trained, which is MILAN's teacher; then two encoders of one shape
see the same images equally often without a caption, one towards the teacher's features (MILAN) and
one towards pixels (MAE); then a linear layer is trained on each of the three, frozen. Means and
standard deviations over the seeds, and which seeds agree on who is better.

The teacher has seen captions of these images and has as many blocks of the same width, so that it
is the bar, and MAE what can be had without any caption.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from small_runs import finish, report_seeds, scenes, train_small

from frugal.common.comparison.running import lasting

PRETRAIN, PROBE = "frugal.milan.pretrain", "frugal.milan.linear_probe"
MODELS = ("MILAN", "MAE", "teacher")
Numbers = dict[str, float]


def main() -> None:
    """Train everything, or what is missing of it, and write table, JSON and page."""
    options = read_options()
    data = scenes(options.out / "scenes", train_samples=options.images, image_size=40)
    outcomes: dict[str, list[Numbers]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        for name, numbers in one_seed(options, data, seed).items():
            outcomes[name].append(numbers)
            print(f"seed {seed}, {name}: top-1 {numbers['accuracy_top1']:.1%}", flush=True)
    report(options, outcomes)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="different ones to train on")
    parser.add_argument("--epochs", type=int, default=20, help="of MILAN and of MAE")
    parser.add_argument("--teacher-samples", type=int, default=280_000, help="that FLIP trains on")
    parser.add_argument("--probe-samples", type=int, default=65_280, help="that a probe trains on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/milan_scenes"))
    return parser.parse_args()


def one_seed(options: argparse.Namespace, data: Path, seed: int) -> dict[str, Numbers]:
    """What a probe finds in MILAN, MAE and their teacher, all of this seed."""
    samples = options.epochs * options.images
    length = f"{options.images}-{options.teacher_samples}"
    teacher = options.out / f"teacher-{length}-seed-{seed}"
    words = [*lasting(options.teacher_samples), f"--run.seed={seed}"]
    words += [f"--evaluation.{task}.data={data}" for task in (1, 2)]
    train_small("frugal.flip.train", "demo", data, teacher, words)

    encoders = {
        "MILAN": ("demo", [f"--objective.teacher.source={teacher}"]),
        "MAE": ("demo-pixels", []),
    }
    runs = {"teacher": teacher}
    for name, (recipe, given) in encoders.items():
        runs[name] = options.out / f"{name}-{options.epochs}-of-{length}-seed-{seed}"
        words = [f"--data.train={data / 'train'}", *lasting(samples), f"--run.seed={seed}", *given]
        finish(PRETRAIN, recipe, runs[name], words)
    return {name: probe(options, data, runs[name], seed) for name in MODELS}


def probe(options: argparse.Namespace, data: Path, run: Path, seed: int) -> Numbers:
    """Train a linear layer on the frozen encoder of a run."""
    folder = run.with_name(f"probe-{options.probe_samples}-of-{run.name}")
    words = [
        f"--data.train={data / 'zero_shot' / 'train'}", f"--evaluation.0.data={data}",
        f"--run.start-from={run}", *lasting(options.probe_samples), f"--run.seed={seed}",
        "--run.evaluate-every=100000", "--run.save-every=100000",
    ]  # fmt: skip
    recipe = "demo-clip" if run.name.startswith("teacher") else "demo"
    finish(PROBE, recipe, folder, words)
    found = json.loads((folder / "evaluation" / "accuracy.json").read_text())
    return {name: found[name] for name in ("accuracy_top1", "accuracy_top5", "accuracy_loss")}


def report(options: argparse.Namespace, outcomes: dict[str, list[Numbers]]) -> None:
    """Table, JSON and page."""
    report_seeds(
        options.out / "milan_scenes",
        outcomes,
        settings={name: value for name, value in vars(options).items() if name != "out"},
        contests={"MILAN above MAE": ("MILAN", "MAE"), "MILAN above teacher": ("MILAN", "teacher")},
        shown=("accuracy_top1", "Accuracy of a linear probe"),
        title="MILAN, MAE and the teacher on scenes",
        summary=f"{options.epochs} epochs of {options.images:,} images each. "
        f"{(__doc__ or '').splitlines()[0]}",
    )


if __name__ == "__main__":
    main()
