"""Everything one process of a run trains with: its parts, what it has counted, what it saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frugal.common.checkpoint.background import BackgroundSaves
from frugal.common.checkpoint.commit import step_of
from frugal.common.checkpoint.store import Checkpoint, CheckpointStore
from frugal.common.contracts import Batch, Stream
from frugal.common.data.damage import DamageCounter, warning
from frugal.common.distributed import gather_objects
from frugal.common.engine.digests import weight_digests
from frugal.common.engine.divergence import (
    left_out_steps,
)
from frugal.common.engine.engine import Engine
from frugal.common.engine.evaluator import Evaluator
from frugal.common.engine.logger import DigestLog, MetricsLogger
from frugal.common.engine.metrics import StepMetrics
from frugal.common.engine.saving import WeightAverage, collect, layout
from frugal.common.engine.throughput import Meter
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError
from frugal.common.history import note, read_history
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import to_json
from frugal.common.run import Run, process_began


@dataclass(kw_only=True)
class Training:
    """Everything one process needs to train; built once by ``frugal.common.train``."""

    recipe: Recipe
    run: Run
    engine: Engine
    stream: Stream
    store: CheckpointStore
    logger: MetricsLogger
    average: WeightAverage | None
    evaluator: Evaluator
    first_step: int
    watchdog: Watchdog
    reopen: Callable[[Checkpoint], Stream] | None = None
    """The stream from a checkpoint on, for a run that goes back to one."""
    left_out: set[int] = field(init=False)
    """Steps, counted from 1, whose samples are read and not trained on."""
    seconds: float = 0.0
    """Spent on steps before this process started."""
    lost_seconds: float = 0.0
    """Of all those spent, on steps that were done again after the run went back."""
    skipped_steps: int = 0
    skipped_in_row: int = 0
    damage: DamageCounter = field(init=False)
    """Samples read and damaged in the whole run, over all processes."""
    local_damage: DamageCounter = field(init=False)
    """What this process has counted since it last told the others."""
    is_off_target: bool = False
    """Whether the image reduction had something to say at the last log step."""
    pending: list[StepMetrics] = field(default_factory=list)
    """Steps whose numbers are still on the device."""
    meter: Meter = field(init=False)
    saves: BackgroundSaves = field(init=False)
    done: int = field(init=False)
    """Steps of the run."""
    _saved: int | None = None
    """The step whose checkpoint was asked for last."""
    starting: float = field(init=False)
    """Seconds from the start of this process to its first step."""
    digest_log: DigestLog | None = field(init=False)
    _logged_damage: tuple[int, int] = field(init=False)
    """Samples lost and repaired when the log last told of them."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run.device)
        options = self.recipe.run
        self.saves = BackgroundSaves(
            self.store,
            max_failures=options.max_failed_saves,
            stall_minutes=options.stall_minutes,
        )
        self.done = self.first_step
        self.starting = max(time.time() - process_began(), 0.0)
        self.left_out = left_out_steps(gather_objects(read_history(self.run.dir))[0])
        limit = self.recipe.data.max_damaged
        # a small data set is judged after one epoch
        patience = min(DamageCounter.patience, self.stream.epoch_samples)
        self.damage = DamageCounter(limit, patience=patience)
        self.local_damage = DamageCounter(limit)
        self._logged_damage = self._lost_and_repaired()
        self.digest_log = None
        if self.recipe.run.digests:
            self.digest_log = DigestLog(
                self.run, engine=self.engine.name, first_step=self.first_step
            )

    def _lost_and_repaired(self) -> tuple[int, int]:
        return self.damage.damaged + self.damage.lost, self.damage.repaired

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of what steps report, over the processes."""
        # virtual processes have told each other, and rounded once, in the order of their ranks
        return self.engine.mean(values) if self.recipe.engine.virtual_processes is None else values

    @property
    def source_names(self) -> tuple[str, ...]:
        """The entries of ``data.train``."""
        return self.recipe.data.source_names

    def count_damage(self, micro_batches: list[Batch]) -> None:
        """Count the samples of a step, and those of them that are damaged, on this process."""
        for batch in micro_batches:
            notes, sources = batch.damage_notes, batch.sources
            self.local_damage.add(batch.damage, len(batch), notes=notes, sources=sources)

    def share_damage(self) -> None:
        """Bring ``damage`` up to date on every process, and tell of what is new in kind."""
        counted = replace(self.local_damage)
        self.local_damage.clear()
        for part in gather_objects(counted):
            for new in self.damage.add_counter(part):
                self.run.log.warning("%s", warning(new, self.source_names))

    def log_damage(self, step: int) -> None:
        """Log how much is damaged, wherever that has grown, and what is repaired by powers of ten.

        ``damage`` must be up to date.
        """
        (lost_before, before), (lost, repaired) = self._logged_damage, self._lost_and_repaired()
        if lost > lost_before:
            self.run.log.warning("step %d: %s", step, self.damage.describe(self.source_names))
        elif repaired and (not before or len(str(repaired)) > len(str(before))):
            self.run.log.warning("step %d: %s samples repaired so far", step, f"{repaired:,}")
        else:
            return
        self._logged_damage = lost, repaired

    def spent(self) -> dict[str, float]:
        """What this process has spent its seconds on so far."""
        return {
            name: round(seconds, 3)
            for name, seconds in {"starting": self.starting, **self.meter.spent()}.items()
        }

    def note_end(self) -> None:
        """Note that this process ends, and what it spent its time on."""
        if not self.run.is_main:
            return
        try:
            note(self.run.dir, "ended", step=self.done, session_seconds=self.spent())
        except InputError as error:
            self.run.log.warning("%s", error)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state` was taken; an empty one leaves everything at zero."""
        self.seconds = state.get("seconds", 0.0)
        self.lost_seconds = state.get("lost_seconds", 0.0)
        self.skipped_steps = state.get("skipped_steps", 0)
        self.skipped_in_row = state.get("skipped_in_row", 0)
        self.damage.load_state(state.get("damage", {}))
        self._logged_damage = self._lost_and_repaired()

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "step": step,
            "samples": step * self.recipe.batch_size,
            "updates": self.engine.updates,
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self.skipped_in_row,
            "damage": self.damage.state(),
            "stream": gather_objects(self.stream.state()),
            "loss_scale": self.engine.scale_state(),
            "seconds": self.seconds + self.meter.seconds,
            "lost_seconds": self.lost_seconds,
            "engine": self.engine.name,
            "world_size": self.run.world_size,
            "recipe": to_json(self.recipe),
        }

    def is_unsure_after(self, step: int) -> bool:
        """Whether a run that may go back has not seen a finite gradient in its last step."""
        may_go_back = self.recipe.run.on_divergence == "rewind"
        return may_go_back and (self.skipped_in_row > 0 or step in self.left_out)

    def prepare_saves(self) -> None:
        """Take the memory that checkpoints are copied into; every process calls this."""
        self.saves.prepare(layout(self.engine, self.average))

    def save(self, step: int, *, is_last: bool) -> None:
        """Have a checkpoint written; every process calls this, and trains on.

        ``is_last``: no other follows, and this waits until it is written.
        """
        with self.meter.paused("checkpoint"):
            self.share_damage()
            state = self.state(step)
            copy = partial(self._copy, step)
            self.saves.save(layout(self.engine, self.average), copy, state, is_last=is_last)
            self._saved = step
            kept = self.store.whole()[-self.recipe.run.keep :]
            if self.digest_log is not None and len(kept) == self.recipe.run.keep:
                self.digest_log.forget_parts_before(step_of(kept[0].name))

    def has_saved(self, step: int) -> bool:
        """Whether a step's checkpoint is there; asked of a run of one process."""
        return self._saved == step and self.saves.settle() and self.store.holds(step)

    def _copy(self, step: int, into: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint, and note the digests of its weights before anybody writes them."""
        collect(self.engine, self.average, into)
        if self.digest_log is None:
            return
        names = [f"weight/{name}" for name, _ in self.engine.trainable()]
        digests = sum(gather_objects(weight_digests(into, names)))
        assert isinstance(digests, np.ndarray)
        self.digest_log.write_weights(step, digests)
