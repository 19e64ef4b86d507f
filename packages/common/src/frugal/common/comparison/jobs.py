"""Everything that a comparison runs, where each of it lies, and by which command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from frugal.common.comparison.entries import Entry, Stage, filled, recipe_of
from frugal.common.comparison.options import LINES_OF_TRIAL, Options
from frugal.common.comparison.running import Job, every, run_words

FIRST = "first"
"""In the place of a budget: the runs of the first entry, which all budgets share."""
TRIAL = "trial"
"""In the place of a budget: short runs that tell what stages cost."""
_LINES = 40
"""Log lines of a run."""


@dataclass(frozen=True)
class Place:
    """Where the runs of one entry lie, of one budget and seed."""

    entry: Entry
    kind: str
    seed: int
    folder: Path

    @property
    def runs(self) -> tuple[Path, ...]:
        """Of the stages, and of the probe."""
        names = [stage.recipe_name for stage in self.entry.stages]
        names += ["probe"] if self.entry.probe is not None else []
        return tuple(self.folder / f"{n}-{name}" for n, name in enumerate(names, start=1))

    @property
    def stages(self) -> tuple[Path, ...]:
        """The runs that the budget pays for."""
        return self.runs[: len(self.entry.stages)]

    @property
    def last(self) -> Path:
        """The last of them, from which others may start."""
        return self.stages[-1]

    @property
    def measured(self) -> Path:
        """The run whose evaluations count."""
        return self.runs[-1]


@dataclass(frozen=True)
class Comparison:
    """Everything that is to be run."""

    options: Options
    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        """The one that the others are compared with."""
        return self.entries[0]

    def place(self, entry: Entry, kind: str, seed: int) -> Place:
        """Where runs lie; those of the first entry are of all budgets."""
        if kind == TRIAL:
            return Place(entry, kind, seed, self.options.out / "trial" / entry.slug)
        kind = FIRST if entry is self.first else kind
        folder = self.options.out / "runs" / entry.slug / kind / f"seed-{seed}"
        return Place(entry, kind, seed, folder)

    def places(self) -> Iterator[Place]:
        """Of everything that is trained, in an order that runs can have."""
        for seed in range(self.options.seeds):
            yield self.place(self.first, FIRST, seed)
            for kind in self.options.equal:
                for entry in self.entries[1:]:
                    if kind in entry.equal:
                        yield self.place(entry, kind, seed)

    def jobs(self, place: Place, samples: Sequence[int]) -> Iterator[Job]:
        """What runs for an entry, in order.

        Args:
            place: where its runs lie.
            samples: of each stage.
        """
        entry = place.entry
        yield from self._commands(place, "before", entry.before)
        batches = [recipe_of(stage).batch_size for stage in entry.stages]
        steps = sum(count // batch for count, batch in zip(samples, batches, strict=True))
        times = 1 if place.kind == TRIAL else self.options.evaluations
        starts = (None, *place.runs)
        for number, (count, batch) in enumerate(zip(samples, batches, strict=True)):
            gap = every(steps, times)
            yield self._stage(place, number, count, count // batch, gap, starts[number])
        if entry.probe is not None:
            batch = recipe_of(entry.probe).batch_size
            count = entry.probe.samples or batch
            if place.kind == TRIAL:
                count = min(count, self.options.trial_steps * batch)
            own = count // batch  # it is measured at its end alone
            yield self._stage(place, len(samples), count, own, own, place.last)
        yield from self._commands(place, "after", entry.after)

    def _commands(
        self, place: Place, when: str, commands: Sequence[Sequence[str]]
    ) -> Iterator[Job]:
        for number, (module, *words) in enumerate(commands, start=1):
            given = self._filled(place, words)
            folder = place.folder / f"{when}-{number}"
            yield Job(f"{self._name(place)}: {module}", module, tuple(given), folder)

    def _stage(
        self, place: Place, number: int, samples: int, steps: int, gap: int, start: Path | None
    ) -> Job:
        stage, run = place.entry.runs[number], place.runs[number]
        words = run_words(
            run=run,
            samples=samples,
            seed=place.seed,
            log_every=every(steps, LINES_OF_TRIAL if place.kind == TRIAL else _LINES),
            evaluate_every=gap,
            start=start,
        )
        given = (stage.recipe_name, *self._filled(place, stage.flags), *words)
        name = f"{self._name(place)}: {stage.recipe}"
        return Job(name, stage.module, given, run, self.options.launcher)

    def _filled(self, place: Place, words: Sequence[str]) -> list[str]:
        """Words with the runs of the same budget and seed in their places."""
        others = {e.name: self.place(e, place.kind, place.seed).last for e in self.entries}
        return filled(words, runs=others, run=place.last, here=place.folder)

    def _name(self, place: Place) -> str:
        return f"{place.entry.name} ({in_words(place.kind)}, seed {place.seed})"


def in_words(kind: str) -> str:
    """A budget in words."""
    words = {FIRST: "all budgets", TRIAL: "trial", "time": "equal time", "flops": "equal FLOPs"}
    return words[kind]


def stage_samples_of_trial(options: Options, stage: Stage) -> int:
    """How long a trial is."""
    return options.trial_steps * recipe_of(stage).batch_size
