"""Cluster masking against random masking, half of the patches each, at equal samples, on scenes.

    python benchmarks/cluster_masking_scenes.py

The method's demo recipes with several seeds: everything that their evaluations measure, as means
and standard deviations over the seeds, and which seeds agree on who is better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from small_runs import report_seeds, scenes, train_small

from frugal.cluster_masking.recipes import RECIPES
from frugal.common.comparison.running import lasting

MODULE = "frugal.cluster_masking.train"
SETTINGS = {"clusters": "demo", "random": "demo-random"}
Numbers = dict[str, float]


def main() -> None:
    """Train everything, or what is missing of it, and write table, JSON and page."""
    options = read_options()
    data = scenes(options.out / "scenes", train_samples=20_000, image_size=40)
    outcomes = {name: train_seeds(options, data, name) for name in SETTINGS}
    report(options, outcomes)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cluster_masking_scenes"))
    return parser.parse_args()


def train_seeds(options: argparse.Namespace, data: Path, name: str) -> list[Numbers]:
    """One way of masking with every seed."""
    outcomes = []
    recipe = SETTINGS[name]
    tasks = len(RECIPES[recipe]().evaluation)
    for seed in range(options.seeds):
        run = options.out / f"{name}-{options.samples}-seed-{seed}"
        words = [f"--evaluation.{task}.data={data}" for task in range(tasks)]
        words += [*lasting(options.samples), f"--run.seed={seed}"]
        trained = train_small(MODULE, recipe, data, run, words)
        outcomes.append(measured_numbers(run) | {"train_seconds": trained.train_seconds})
        print(f"{run.name}: top-1 {trained.top1:.1%} in {trained.train_seconds:.0f} s")
    return outcomes


def measured_numbers(run: Path) -> Numbers:
    """Every share that a run's evaluations gave, and the patches it masked."""
    numbers: Numbers = {}
    for file in sorted((run / "evaluation").glob("*.json")):
        content = json.loads(file.read_text())
        numbers |= {key: value for key, value in content.items() if isinstance(value, float)}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers["mask_ratio"] = sum(line["mask_ratio"] for line in lines) / len(lines)
    return numbers


def report(options: argparse.Namespace, outcomes: dict[str, list[Numbers]]) -> None:
    """Table, JSON and page."""
    report_seeds(
        options.out / "cluster_masking_scenes",
        outcomes,
        settings={"samples": options.samples},
        contests={"clusters higher": ("clusters", "random")},
        shown=("zero_shot_top1", "Zero-shot accuracy"),
        title="Clusters against random patches on scenes",
        summary=f"{options.samples:,} samples each. {(__doc__ or '').splitlines()[0]}",
    )


if __name__ == "__main__":
    main()
