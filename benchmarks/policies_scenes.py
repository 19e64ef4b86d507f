"""Small policies against the plain recipe, at equal samples and at equal time, on scenes.

    python benchmarks/policies_scenes.py

FLIP's demo without its unmasked tuning, three seeds: plain; with Muon; with the loss of caption
tokens; with PGS's choice of patches in the place of random ones. "Equal time" gives each policy as
many samples as it trains in the time of the plain recipe, by short trainings of both by turns, for
which the machine should be idle; --equal samples leaves it out.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path

from measuring import write
from small_runs import Outcome, scenes, speed, train_small

from frugal.common.comparison.outcomes import mean_and_spread, table
from frugal.common.comparison.running import lasting

MODULE = "frugal.flip.train"
POLICIES = {
    "plain": (),
    "Muon": ("--optimizer=frugal.common.optim.muon.Muon",),
    "token loss": ("--objective.token-loss=1",),
    "PGS": ("--reduction.image=frugal.cluster_masking.pgs.PgsMasking",),
}


def main() -> None:
    """Train everything, or what is missing of it, and print and keep the table."""
    options = read_options()
    data = scenes(options.out / "scenes", train_samples=20_000, image_size=40)
    found: dict[str, dict[str, list[Outcome]]] = {}
    ratios = dict.fromkeys(POLICIES, 1.0)
    for kind in options.equal.split(","):
        if kind == "time":
            ratios = {name: times_plain(options, data, name) for name in POLICIES}
        counts = {name: round(options.samples * ratio) for name, ratio in ratios.items()}
        found[kind] = {name: train_seeds(options, data, name, counts[name]) for name in POLICIES}
    rows = [
        [name, f"{ratios[name]:.2f}", *(in_words(outcomes[name]) for outcomes in found.values())]
        for name in POLICIES
    ]
    print(table(["policy", "samples/s", *(f"equal {kind}" for kind in found)], rows))
    numbers = {
        kind: {name: [asdict(one) for one in seeds] for name, seeds in outcomes.items()}
        for kind, outcomes in found.items()
    }
    about = {"samples": options.samples, "times_plain": ratios}
    write(options.out / "policies_scenes.json", about | numbers)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--equal", default="samples,time", help="samples, then time")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/policies_scenes"))
    return parser.parse_args()


def times_plain(options: argparse.Namespace, data: Path, name: str) -> float:
    """Samples/s of a policy over those of the plain recipe, the median of three pairs."""
    if name == "plain":
        return 1.0
    ratios = []
    for pair in range(3):
        found = [
            speed(MODULE, "demo", data, options.out / f"speed-{name}-{pair}-{one}", POLICIES[one])
            for one in (name, "plain")
        ]
        ratios.append(found[0] / found[1])
    return statistics.median(ratios)


def train_seeds(options: argparse.Namespace, data: Path, name: str, samples: int) -> list[Outcome]:
    """One policy with every seed."""
    outcomes = []
    for seed in range(options.seeds):
        run = options.out / f"{name}-{samples}-seed-{seed}"
        words = (*POLICIES[name], *lasting(samples), f"--run.seed={seed}")
        outcomes.append(train_small(MODULE, "demo", data, run, words))
        print(f"{run.name}: top-1 {outcomes[-1].top1:.1%}", flush=True)
    return outcomes


def in_words(outcomes: list[Outcome]) -> str:
    """Zero-shot accuracy over the seeds."""
    mean, spread = mean_and_spread([100 * outcome.top1 for outcome in outcomes])
    return f"{mean:.1f} ± {spread:.1f} %"


if __name__ == "__main__":
    main()
