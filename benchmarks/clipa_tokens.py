"""The inverse scaling law on scenes: accuracy against compute and time with fewer tokens.

    python benchmarks/clipa_tokens.py

The model of CLIPA's demo is trained on 64, about 32 and 16 of its image tokens by every image
strategy and on 16, 8 and 4 text tokens by every text strategy (of those that need no tagger or
counts, unless they are there), then shortly at full length. The first row is full length all the
way. Run it on an otherwise idle machine; a finished training is not repeated.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from measuring import write
from small_runs import Outcome, scenes, speed, train_small, write_page

from frugal.common.comparison.outcomes import table
from frugal.common.comparison.running import lasting
from frugal.common.report.plots import Curve

MODULE = "frugal.clipa.train"
STEPS = ("--batch-size=64",)
"""Smaller than the demo's: so few samples need more steps. Rates fall with its square root."""
FIRST = (*STEPS, "--optimizer.learning-rate=1e-3")
SECOND = (*STEPS, "--optimizer.learning-rate=5e-4")
WHOLE = (*FIRST, "--model.image.image-size=64", "--model.text.length=24")


@dataclass(frozen=True)
class Setting:
    """What the first stage sees."""

    name: str
    words: tuple[str, ...]
    """Of its command line, after :data:`WHOLE`."""

    @property
    def folder(self) -> str:
        """First part of the names of its run directories."""
        return self.name.replace(": ", "-").replace(" ", "-")


def image_strategies() -> list[Setting]:
    """Fewer image tokens, whole captions."""
    path = "--reduction.image=frugal"
    random, grid, block = (
        f"{path}.common.reduction.random_masking.RandomMasking",
        f"{path}.clipa.grid_masking.GridMasking",
        f"{path}.clipa.block_masking.BlockMasking",
    )
    return [
        Setting("image: resize to 36", ("--model.image.image-size=48",)),
        Setting("image: resize to 16", ("--model.image.image-size=32",)),
        Setting("image: random 32", (random, "--reduction.image.mask-ratio=0.5")),
        Setting("image: random 16", (random, "--reduction.image.mask-ratio=0.75")),
        Setting("image: grid 16", (grid,)),
        Setting("image: block 36", (block, "--reduction.image.mask-ratio=0.5")),
        Setting("image: block 16", (block, "--reduction.image.mask-ratio=0.75")),
    ]


def text_strategies(options: argparse.Namespace) -> list[Setting]:
    """Fewer text tokens beside images of 16."""
    kinds: dict[str, tuple[str, ...]] = {
        "truncate": ("--reduction.text=frugal.common.reduction.text.Truncate",),
        "random": ("--reduction.text=frugal.clipa.text_masking.RandomTextMasking",),
        "block": ("--reduction.text=frugal.clipa.text_masking.BlockTextMasking",),
    }
    if options.syntax:
        kinds["syntax"] = ("--reduction.text=frugal.clipa.syntax_masking.SyntaxMasking",)
    if options.counts:
        kinds["frequency"] = (
            "--reduction.text=frugal.clipa.frequency_masking.FrequencyMasking",
            f"--reduction.text.counts={options.counts}",
        )
    small = "--model.image.image-size=32"
    return [
        Setting(f"text: {kind} {length}", (small, *words, f"--model.text.length={length}"))
        for kind, words in kinds.items()
        for length in (16, 8, 4)
    ]


def main() -> None:
    """Train everything, or what is missing of it, and write table, JSON and page."""
    options = read_options()
    data = scenes(options.out / "scenes", train_samples=40_000, image_size=80)
    samples = lasting(options.samples)
    run = options.out / f"full-{options.samples}-{options.tuning}"
    total = options.samples + options.tuning
    full = train_small(MODULE, "demo", data, run, (*WHOLE, *lasting(total)))
    stages = {}
    for setting in [*image_strategies(), *text_strategies(options)]:
        folder = options.out / f"{setting.folder}-{options.samples}"
        first = train_small(MODULE, "demo", data, folder, (*WHOLE, *setting.words, *samples))
        tuning = (*SECOND, *lasting(options.tuning), f"--run.start-from={folder}")
        whole = options.out / f"{setting.folder}-{options.samples}-tuning-{options.tuning}"
        second = train_small(MODULE, "demo-tuning", data, whole, tuning)
        stages[setting] = (first, second)
        print(f"{setting.name}: {first.top1:.1%}, tuned {second.top1:.1%}", flush=True)
    report(options, rows(options, data, full, stages))


def rows(
    options: argparse.Namespace,
    data: Path,
    full: Outcome,
    stages: dict[Setting, tuple[Outcome, Outcome]],
) -> dict[str, tuple[Outcome, Outcome]]:
    """The first stage and both stages of every setting, all timed one right after the other."""

    def timed(name: str, words: tuple[str, ...]) -> float:
        run = options.out / f"{name}-speed"
        shutil.rmtree(run, ignore_errors=True)
        return speed(MODULE, "demo", data, run, (*WHOLE, *words))

    whole = timed("full", ())
    at_full_length = at_speed(full, whole)
    found = {"full length": (at_full_length, at_full_length)}
    for setting, (first, second) in stages.items():
        first = at_speed(first, timed(setting.folder, setting.words))
        found[setting.name] = (first, add(first, at_speed(second, whole)))
    return found


def at_speed(outcome: Outcome, samples_per_second: float) -> Outcome:
    """The same training, had it run at this speed throughout."""
    return replace(outcome, train_seconds=outcome.samples / samples_per_second)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=60_000, help="of the first stage")
    parser.add_argument("--tuning", type=int, default=15_000, help="samples of the second stage")
    parser.add_argument("--syntax", action="store_true", help="NLTK's tagger is there")
    parser.add_argument("--counts", type=Path, help="word counts of the scenes' captions")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/clipa_tokens"))
    return parser.parse_args()


def add(first: Outcome, second: Outcome) -> Outcome:
    """Both stages: what they took together, and what the second reached."""
    return Outcome(
        samples=first.samples + second.samples,
        train_seconds=first.train_seconds + second.train_seconds,
        flops=first.flops + second.flops,
        top1=second.top1,
        top1_held_out=second.top1_held_out,
    )


def report(options: argparse.Namespace, rows: dict[str, tuple[Outcome, Outcome]]) -> None:
    """Table, JSON and page."""
    full = rows["full length"][1]
    lines = [
        [
            name, f"{first.samples / first.train_seconds:.0f}",
            f"{both.flops / full.flops:.2f}", f"{both.train_seconds / full.train_seconds:.2f}",
            f"{first.top1:.1%}", f"{both.top1:.1%}", f"{both.top1_held_out:.1%}",
        ]
        for name, (first, both) in rows.items()
    ]  # fmt: skip
    header = ["first stage", "samples/s", "compute", "time", "top-1", "tuned", "held out"]
    text = table(header, lines)
    print(text)
    content = {name: [asdict(part) for part in parts] for name, parts in rows.items()}
    write(options.out / "clipa_tokens.json", content)
    charts = {
        f"Zero-shot accuracy after tuning, by {kind}": (
            f"{kind}, full length = 1",
            [
                Curve(name, ((value(both) / value(full), both.top1),))
                for name, (_, both) in rows.items()
            ],
        )
        for kind, value in (
            ("compute", lambda part: part.flops),
            ("time", lambda part: part.train_seconds),
        )
    }
    write_page(
        options.out / "clipa_tokens.html",
        title="CLIPA's trade-off on scenes",
        summary=(__doc__ or "").splitlines()[0],
        text=text,
        charts=charts,
    )


if __name__ == "__main__":
    main()
