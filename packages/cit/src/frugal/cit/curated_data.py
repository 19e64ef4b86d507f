"""Data that the model chooses as it is trained: curate, hand out what was chosen, and again.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241, section 3.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from typing_extensions import override

from frugal.cit.curation import Chosen, Curation, Curator, gather_scores
from frugal.cit.curation_files import CurationFiles
from frugal.cit.features import TextFeatures
from frugal.cit.metadata import Metadata
from frugal.cit.pool import Pool, open_pool
from frugal.cit.report import sections_of
from frugal.cit.selection import Rule
from frugal.cit.texts import TextChoice
from frugal.common.checkpoint.manifest import digest_json
from frugal.common.contracts import Batch, Stream, TrainedModel
from frugal.common.data.config import PairData
from frugal.common.data.samples import RawSample
from frugal.common.data.stream import IndexedStream, OrderedSamples, RankSlice
from frugal.common.distributed import new_host_group
from frugal.common.engine.watchdog import COMPUTING_THREAD
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.ranges import Count, Range
from frugal.common.recipe import Recipe, model_of
from frugal.common.run import Run

_Cosine = Annotated[float, Range(least=-1, most=1, words="must be a cosine, between -1 and 1")]
_LeastShare = Annotated[
    float, Range(above=0, most=1, hint="leave it out to let the threshold alone decide")
]


@dataclass(frozen=True, kw_only=True)
class CuratedData(PairData):
    """Image-text pairs that the text tower picks from a pool while it is trained.

    Every ``period`` updates captions of the pool are scanned, without their images, and those near
    to a class of the metadata are kept until there are as many pairs as the next ``period`` updates
    need; these are trained on in drawn order. The pool is scanned in its global order, from where
    the last curation ended.
    """

    metadata: Metadata = field(default_factory=Metadata)
    period: Count = 100
    """Updates between two curations."""
    threshold: _Cosine = 0.55
    """A caption is kept if its cosine with the nearest class is greater. Features are those of the
    text tower before its projection."""
    min_ratio: _LeastShare | None = None
    """Least share kept of a unit: where fewer captions are above the threshold, this share of the
    nearest ones is kept in their place. Without it the threshold alone decides."""
    keep: Literal["set", "list"] = "set"
    """set: a pair comes once in a period; list: as often as it was met."""
    scan: Count = 2_048
    """Captions of a unit, about which the least share is decided (published: twice the batch of a
    GPU); the same on any number of processes."""
    tags: tuple[str, ...] = ()
    """Entries of fields.caption that are comma-separated tags: whenever they are read, their order
    and what stands between them are drawn anew."""
    max_scanned: Count | None = None
    """Captions that one curation may scan; without it ten times the pool."""
    when_short: Literal["stop", "best"] = "stop"
    """What to do where that is not enough. stop: end the run with the best similarity seen. best:
    warn, and fill up with the nearest of the captions that were not kept."""
    background: bool = False
    """Curate for the next period while this one is trained on, with the weights from its start.
    Published runs choose with the newest weights: it changes which pairs are chosen."""

    shared_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resampled_samples is not None:
            raise InputError(
                "data.resampled_samples is given, but a curation reads captions at any place of a "
                "pool, which a stream has not; copy the shards to a disk and leave it out"
            )
        self._check_tags()

    def _check_tags(self) -> None:
        unknown = next((name for name in self.tags if name not in self.fields.caption), None)
        if unknown is not None:
            raise InputError(
                f"data.tags names {unknown!r}, which is none of data.fields.caption "
                f"{self.fields.caption}; name it as it stands there"
            )
        if self.fields.weights:
            raise InputError(
                "data.fields.weights say how often each text of a sample is drawn, but CiT draws "
                "them alike before it compares them with the metadata; leave them out"
            )
        if self.tags and not self.fields.separate:
            raise InputError(
                "data.tags is given, but which field a caption comes from is known only with "
                "data.fields.separate; set it"
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose model reads no captions, and what all stored data refuse."""
        super().check(recipe)
        if self.tokenizer is None or recipe.model.inputs().captions is None:
            raise InputError(
                "curation asks the text tower which captions are near, but this recipe has none; "
                "choose a model with two towers and a tokenizer"
            )
        if self.stored_texts is not None:
            raise InputError(
                f"data.stored_texts is {self.stored_texts}, but curation asks the text tower which "
                "captions are near; leave it out, or train on all pairs with demo-align or a "
                "recipe of your own that takes PairData"
            )

    def also_read(self) -> dict[str, str]:
        """Digests of the classes whose captions are looked for, and of a list of samples."""
        classes = [[named.name, *named.prompts] for named in self.metadata.classes()]
        return super().also_read() | {"data.metadata": digest_json(classes)}

    @override
    def steps_alike(self, one: int, other: int) -> int:
        """Before the first period that is cut short in one of two runs, and not in the other.

        A checkpoint may hold what was chosen for the period behind its own, and in the background
        for the one behind that.
        """
        shorter = min(one, other)
        whole, rest = divmod(shorter, self.period)
        if not rest and not self.background:
            return shorter
        return max((whole - 1 - self.background) * self.period, 0)

    @property
    def text_names(self) -> tuple[str, ...]:
        """What the texts of a sample are called, where every field is a text of its own."""
        if not self.fields.separate:
            return ()
        return tuple(field.removeprefix("json.") for field in self.fields.caption)

    @property
    def tag_places(self) -> tuple[int, ...]:
        """Which texts of a sample are tags."""
        return tuple(self.fields.caption.index(name) for name in self.tags)

    @property
    def rule(self) -> Rule:
        """Which captions a curation chooses, and when it ends."""
        return Rule(
            threshold=self.threshold,
            min_ratio=self.min_ratio,
            keep=self.keep,
            max_scanned=self.max_scanned,
            when_short=self.when_short,
        )

    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: TrainedModel | None,
    ) -> Stream:
        """The micro-batches of this process from ``first_sample`` on; they ask the engine's model.

        Raises:
            InputError: if the pool cannot be read or is too small, or the metadata names no class.
        """
        if engine is None:
            raise InputError("curation asks the model that is trained, and here is none")
        pool = open_pool(
            self,
            recipe,
            run,
            needed=min(self.period, recipe.steps) * recipe.batch_size,
            scan=self.scan,
            tags=self.tag_places,
            engine=engine,
        )
        return CuratedStream(
            self, recipe, run, pool, engine=engine, first_sample=first_sample, state=state
        )

    def report(self, run_dir: Path) -> list[tuple[str, str]]:
        """Titles and HTML of what the report of a run tells about its data."""
        return sections_of(run_dir)


@dataclass(frozen=True)
class _PeriodOrder:
    """Where the samples of one period are found; an :class:`~frugal.common.data.order.Order`."""

    chosen: Chosen
    first_sample: int
    """Number of the first of them since the start of the run."""
    choice: TextChoice

    @property
    def samples(self) -> int:
        """Of the period."""
        return len(self.chosen)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,) of the run: their shards (n,) and indices within them (n,)."""
        rows = numbers - self.first_sample
        return self.chosen.shards[rows], self.chosen.indices[rows]

    def choose(self, raw: RawSample, number: int) -> RawSample:
        """A sample with the one text that was chosen."""
        place = int(self.chosen.texts[number - self.first_sample])
        if place >= len(raw.captions):
            return replace(raw, captions=[])  # the store has changed: damaged, it has no caption
        return replace(raw, captions=[self.choice.again(raw.captions, place, number)])


@dataclass(frozen=True)
class _Kept:
    """A curation and the checksum of its file, on the main process."""

    curation: Curation
    checksum: int

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        facts = self.curation.facts
        return {
            "period": facts.period, "next_unit": facts.next_unit, "checksum": self.checksum
        }  # fmt: skip


class CuratedStream:
    """Micro-batches of one process, of pairs that the model chooses as it learns."""

    def __init__(
        self,
        data: CuratedData,
        recipe: Recipe,
        run: Run,
        pool: Pool,
        *,
        engine: TrainedModel,
        first_sample: int,
        state: dict[str, Any],
    ) -> None:
        """Continue where a state was taken, or begin.

        Args:
            data: the rule.
            recipe: sizes, seed and length of the run.
            run: this process.
            pool: what there is to choose from.
            engine: holds the model.
            first_sample: a multiple of the batch size.
            state: of :meth:`state` on any number of processes, or {} at the beginning.
        """
        self.epoch_samples = pool.samples
        self.contents = pool.contents
        self._data, self._recipe, self._run, self._pool = data, recipe, run, pool
        self._first_sample = first_sample
        classes = data.metadata.classes()
        self._files = CurationFiles(run.dir, pool, classes, data.text_names)
        self._current: _Kept | None = None
        self._ahead: Callable[[], _Kept] | None = None
        self._next_unit = 0
        self._seconds = 0.0
        """That training waited for curations since it last asked for scalars."""
        self._restore(state)
        # with files of its own: in the background it reads beside what is trained on
        scanned = replace(pool, readers=pool.readers.copy())
        curator = Curator(data, data.rule, scanned, classes, run, first_unit=self._next_unit)
        self._chooser = _Chooser(curator, pool, recipe, run, engine, background=data.background)

    def _restore(self, state: dict[str, Any]) -> None:
        period = self._period_of(self._first_sample)
        for kept in (state, state.get("ahead")):
            if not kept:
                continue
            self._next_unit = kept["next_unit"]
            if kept["period"] < period:
                continue  # all of it was trained on
            curation = self._files.read(kept["period"], kept["checksum"])
            found = _Kept(curation, kept["checksum"])
            if kept["period"] == period:
                self._current = found
            else:
                self._ahead = lambda found=found: found  # type: ignore[misc]

    @property
    def _period_samples(self) -> int:
        return self._data.period * self._recipe.batch_size

    def _period_of(self, sample: int) -> int:
        return sample // self._period_samples

    def _pairs_needed(self, period: int) -> int:
        """Pairs of a period; the last one is cut short by the end of the run."""
        steps_left = self._recipe.steps - period * self._data.period
        return max(min(self._data.period, steps_left), 0) * self._recipe.batch_size

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._periods()
        finally:
            # nothing is to go on computing behind a reader who has stopped, as a run that goes
            # back, or a command at whose end Python cannot end a thread that computes
            self._chooser.wait()

    def _periods(self) -> Iterator[Batch]:
        sample = self._first_sample
        while sample < self._recipe.steps * self._recipe.batch_size:
            period = self._period_of(sample)
            needed = self._pairs_needed(period)
            start = period * self._period_samples
            if self._current is None or self._current.curation.facts.period != period:
                started = time.perf_counter()
                self._current = self._choose(period, needed)
                self._seconds += time.perf_counter() - started
            if sample == start and self._data.background:
                self._choose_ahead(period + 1)
            yield from self._batches(self._current.curation.chosen, sample, start)
            sample = start + needed

    def _choose(self, period: int, needed: int) -> _Kept:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead(), None
            return ahead
        return self._keep(self._chooser.now(period, self._next_unit, needed))

    def _choose_ahead(self, period: int) -> None:
        """Start on the next period, if there is one."""
        if not (needed := self._pairs_needed(period)):
            return
        found = self._chooser.in_background(period, self._next_unit, needed)
        kept: list[_Kept] = []

        def ahead() -> _Kept:
            if not kept:
                kept.append(self._keep(found.result()))
            return kept[0]

        self._ahead = ahead

    def _keep(self, curation: Curation) -> _Kept:
        """Write the file of a curation and say how it went."""
        facts = curation.facts
        self._next_unit = facts.next_unit
        self._run.log.info(
            "curation %d: kept %s of %s captions (%.1f %%) for %s pairs, %.0f captions/s%s",
            facts.period,
            f"{facts.kept:,}",
            f"{facts.scanned:,}",
            100 * facts.kept_ratio,
            f"{len(curation.chosen):,}",
            facts.scanned / curation.seconds,
            f"; {facts.without_text:,} without text" if facts.without_text else "",
        )
        return _Kept(curation, self._files.write(curation) if self._run.is_main else 0)

    def _batches(self, chosen: Chosen, sample: int, start: int) -> Iterator[Batch]:
        """The micro-batches of a period, which began at a sample, from a later one on."""
        micro_batch = self._recipe.batch_size // self._recipe.engine.accumulate
        order = _PeriodOrder(chosen, start, self._pool.choice)
        pairs = OrderedSamples(
            self._pool.readers, order, self._pool.transform, choose=order.choose,
            vectors=self._pool.vectors,
        )  # fmt: skip
        stream = IndexedStream(
            pairs,
            RankSlice.of(self._recipe, self._run, first_sample=sample),
            epoch_samples=self.epoch_samples,
            workers=self._data.workers,
            pin_memory=self._run.device.type == "cuda",
            micro_batches=(start + len(chosen) - sample) // micro_batch,
            limit=60 * self._data.timeout_minutes,
        )
        return iter(stream)

    def state(self) -> dict[str, Any]:
        """Which curations are there, and where the next one starts (JSON).

        Waits for the one that is under way: its weights will be gone when the run goes on.
        """
        state: dict[str, Any] = self._current.state() if self._current is not None else {}
        if self._ahead is not None:
            state["ahead"] = self._ahead().state()
        return state

    def scalars(self) -> dict[str, float]:
        """How the curation went whose pairs are trained on."""
        if self._current is None:
            return {}
        curation = self._current.curation
        facts = curation.facts
        found = {
            "kept_ratio": facts.kept_ratio,
            "curation_threshold": facts.threshold,
            "curation_best": facts.best,
            "curation_fallbacks": float(facts.fallbacks),
            "scanned_pairs": float(facts.scanned),
        }
        if curation.seconds:
            found["captions_per_second"] = facts.scanned / curation.seconds
        if self._seconds:
            found["seconds/curation"], self._seconds = self._seconds, 0.0
        return found


_LEAVING = 60.0
"""Seconds that a reader who stops waits for a curation in the background."""


class _Chooser:
    """Curates with the model as it is, at once or in the background."""

    def __init__(
        self,
        curator: Curator,
        pool: Pool,
        recipe: Recipe,
        run: Run,
        engine: TrainedModel,
        *,
        background: bool,
    ) -> None:
        self._curator, self._pool, self._recipe = curator, pool, recipe
        self._run, self._engine = run, engine
        self._copy: torch.nn.Module | None = None
        self._thread: threading.Thread | None = None
        """Chooses in the background, or did so last."""
        # the one that trains is not to be used by two threads at a time
        self._group = new_host_group() if background else None

    def _features(self, tower: torch.nn.Module) -> TextFeatures:
        return TextFeatures(
            tower,
            self._pool.transform.tokenizer,
            length=self._pool.transform.text_length,
            device=self._run.device,
            dtype=self._engine.dtype,
        )

    def now(self, period: int, first_unit: int, needed: int) -> Curation:
        """Choose before anything else happens."""
        features = self._features(self._engine.objective.model.get_submodule("text"))
        gather = partial(gather_scores, device=self._run.device)
        with self._engine.whole_weights():
            return self._curator.curate(
                period, first_unit, needed, features=features, gather=gather
            )

    def in_background(self, period: int, first_unit: int, needed: int) -> Future[Curation]:
        """Choose with the weights as they are now, while these go on being trained."""
        features = self._features(self._copied())
        device = self._run.device if self._group is None else torch.device("cpu")
        gather = partial(gather_scores, device=device, group=self._group)
        on_device = self._cuda_stream()
        found: Future[Curation] = Future()

        def work() -> None:
            try:
                with on_device():
                    curation = self._curator.curate(
                        period, first_unit, needed, features=features, gather=gather
                    )
                found.set_result(curation)
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                found.set_exception(error)

        # a daemon: a run that fails is not to wait for what nobody needs any more
        name = f"{COMPUTING_THREAD} curation {period}"
        self._thread = threading.Thread(target=work, daemon=True, name=name)
        self._thread.start()
        return found

    def wait(self) -> None:
        """Wait, but not for ever, until nothing is chosen in the background."""
        if self._thread is not None:
            self._thread.join(timeout=_LEAVING)

    def _copied(self) -> torch.nn.Module:
        """The text tower beside the one that is trained, with equal weights."""
        if self._copy is None:
            model = model_of(DualEncoderConfig, self._recipe.model).build()
            self._copy = model.text.to(self._run.device)
        with self._engine.whole_weights(), torch.no_grad():
            live = self._engine.objective.model.get_submodule("text")
            for copies, trained in (
                (self._copy.named_parameters(), dict(live.named_parameters())),
                (self._copy.named_buffers(), dict(live.named_buffers())),
            ):
                for name, tensor in copies:
                    tensor.copy_(trained[name])
        return self._copy

    def _cuda_stream(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """Around work in another thread: on CUDA a stream that starts when the copy is there."""
        if self._run.device.type != "cuda":
            return contextlib.nullcontext
        stream = torch.cuda.Stream(self._run.device)
        stream.wait_stream(torch.cuda.current_stream(self._run.device))
        return lambda: torch.cuda.stream(stream)  # makes its device the current one too
