"""Accuracy of 0, 50 and 75 % masking at equal samples and at equal time, on scenes.

    python benchmarks/flip_tradeoff.py

Every setting is FLIP's demo recipe without its unmasked tuning, three seeds. "Equal time" gives
each mask ratio as many samples as it trains in the time that the whole images took, by the speeds
of the runs at equal samples (the fastest seed of each ratio). Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import write
from small_runs import Outcome, scenes, train_small, write_page

from frugal.common.comparison.outcomes import mean_and_spread, table
from frugal.common.comparison.running import lasting
from frugal.common.report.plots import Curve

RATIOS = (0.0, 0.5, 0.75)
SampleResults = dict[float, list[Outcome]]


def main() -> None:
    """Train everything, or what is missing of it, and write table, JSON and page."""
    options = read_options()
    data = scenes(options.out / "scenes", train_samples=20_000, image_size=40)
    equal_samples = {
        ratio: train_seeds(options, data, ratio, options.samples, "samples") for ratio in RATIOS
    }
    whole = fastest(equal_samples[0.0])
    equal_time: SampleResults = {0.0: equal_samples[0.0]}
    for ratio in RATIOS[1:]:
        samples = round(options.samples * fastest(equal_samples[ratio]) / whole)
        equal_time[ratio] = train_seeds(options, data, ratio, samples, "time")
    report(options, {"equal samples": equal_samples, "equal time": equal_time})


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000, help="of every run, and of 0 %%")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/flip_tradeoff"))
    return parser.parse_args()


def train_seeds(
    options: argparse.Namespace, data: Path, ratio: float, samples: int, kind: str
) -> list[Outcome]:
    """One mask ratio with every seed."""
    outcomes = []
    for seed in range(options.seeds):
        run = options.out / f"{kind}-{samples}-mask-{ratio:g}-seed-{seed}"
        words = (
            f"--reduction.image.mask-ratio={ratio}", *lasting(samples),
            f"--run.seed={seed}",
        )  # fmt: skip
        outcomes.append(train_small("frugal.flip.train", "demo", data, run, words))
        print(f"{run.name}: top-1 {outcomes[-1].top1:.1%} in {outcomes[-1].train_seconds:.0f} s")
    return outcomes


def fastest(outcomes: list[Outcome]) -> float:
    """Samples/s of the fastest seed: the others were disturbed."""
    return max(outcome.samples / outcome.train_seconds for outcome in outcomes)


def report(options: argparse.Namespace, outcomes: dict[str, SampleResults]) -> None:
    """Table, JSON and page."""
    rows = []
    for kind, by_ratio in outcomes.items():
        for ratio, seeds in by_ratio.items():
            mean, spread = mean_and_spread([outcome.top1 for outcome in seeds])
            unseen, unseen_spread = mean_and_spread([outcome.top1_held_out for outcome in seeds])
            rows.append(
                [
                    f"{kind}, {ratio:.0%} masked", f"{seeds[0].samples:,}",
                    f"{fastest(seeds):.0f}", f"{seeds[0].flops:.2e}",
                    f"{mean:.1%} ± {spread:.1%}", f"{unseen:.1%} ± {unseen_spread:.1%}",
                ]
            )  # fmt: skip
    header = ["setting", "samples", "samples/s", "FLOP", "top-1", "held out"]
    text = table(header, rows)
    print(text)
    charts: dict[str, Any] = {}
    for kind, by_ratio in outcomes.items():
        curves = [
            Curve(name, tuple((100 * ratio, value(seeds)) for ratio, seeds in by_ratio.items()))
            for name, value in (
                ("top-1", lambda seeds: mean_and_spread([o.top1 for o in seeds])[0]),
                ("held out", lambda seeds: mean_and_spread([o.top1_held_out for o in seeds])[0]),
            )
        ]
        charts[f"Zero-shot accuracy at {kind}"] = ("% of the patches masked", curves)
    content = {
        kind: {
            f"{ratio:g}": [asdict(outcome) for outcome in seeds] for ratio, seeds in part.items()
        }
        for kind, part in outcomes.items()
    }
    write(options.out / "flip_tradeoff.json", content)
    write_page(
        options.out / "flip_tradeoff.html",
        title="FLIP's trade-off on scenes",
        summary=f"Means over {options.seeds} seeds; {(__doc__ or '').splitlines()[0]}",
        text=text,
        charts=charts,
    )


if __name__ == "__main__":
    main()
