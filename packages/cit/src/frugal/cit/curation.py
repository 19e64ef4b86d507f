"""One curation: scan a pool unit by unit until enough captions are near to a class of the metadata.

What is chosen is a function of the weights, the seed and the unit it starts at: units are scored
by the processes in turn, but counted in their order, and what was scored beyond the last one that
is needed is thrown away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from frugal.cit.features import TextFeatures
from frugal.cit.metadata import TargetClass
from frugal.cit.pool import NO_TEXT, UNREADABLE, Pool, UnitReader, UnitTexts
from frugal.cit.selection import Collection, Rule, class_features, nearest_class, select
from frugal.common.data.config import PairData
from frugal.common.data.damage import DamageCounter, DamageNote, warning
from frugal.common.distributed import Group, gather, place_in_world
from frugal.common.errors import InputError, NotFiniteError
from frugal.common.randomness import sample_generator
from frugal.common.run import Run

PASSES = 10
"""How often a pool is scanned for one curation at most, unless a recipe says it."""


@dataclass(frozen=True)
class Chosen:
    """Pairs of a pool, N of them, in the order in which they are trained on."""

    shards: np.ndarray
    """(N,) int64 numbers of shards."""
    indices: np.ndarray
    """(N,) int64 numbers of samples within them."""
    texts: np.ndarray
    """(N,) int16: which text of a sample."""
    similarity: np.ndarray
    """(N,) float32 cosine with the nearest class."""
    classes: np.ndarray
    """(N,) int32: which class that is."""

    def __len__(self) -> int:
        return len(self.shards)

    def rows(self, which: slice | np.ndarray | Tensor) -> Chosen:
        """Some of them, by an index or a mask."""
        return Chosen(**{name: value[which] for name, value in vars(self).items()})

    @classmethod
    def together(cls, parts: Sequence[Chosen]) -> Chosen:
        """One after the other."""
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        )


_COLUMNS = ("shards", "indices", "texts", "similarity", "classes")


@dataclass
class Facts:
    """How a curation went."""

    period: int
    first_unit: int
    next_unit: int
    """Where the next curation starts."""
    threshold: float
    scanned: int = 0
    """Captions, unusable ones included."""
    kept: int = 0
    """Of these; the last unit may have given more than was needed."""
    filled_up: int = 0
    """Chosen although they were not kept, because there were too few."""
    fallbacks: int = 0
    """Units in which too few captions were above the threshold."""
    without_text: int = 0
    unreadable: int = 0
    best: float = -1.0
    """Highest similarity."""

    @property
    def kept_ratio(self) -> float:
        """Share of the scanned captions that were kept."""
        return self.kept / self.scanned if self.scanned else 0.0


@dataclass(frozen=True)
class Example:
    """A caption that was looked at."""

    caption: str
    nearest: str
    """Class."""
    similarity: float
    chosen: bool


@dataclass(frozen=True)
class Curation:
    """The pairs of one period and how they were found."""

    chosen: Chosen
    facts: Facts
    examples: list[Example] = field(default_factory=list)
    """Some captions of the first unit, on the main process."""
    seconds: float = 0.0


Gather = Callable[[Tensor], Tensor]
"""From the scores (3, scan) of one unit to those of every process, (W, 3, scan), in rank order."""


def gather_scores(scores: Tensor, device: torch.device, group: Group = None) -> Tensor:
    """The scores of one unit of every process, in rank order, on all of them.

    Args:
        scores: (3, scan) int32.
        device: that the processes of the group exchange tensors on.
        group: by default the one that trains.

    Returns:
        (W, 3, scan) int32 on the CPU.
    """
    if place_in_world(group)[1] == 1:
        return scores[None]
    return gather(scores[None].to(device), group).cpu()


@dataclass(frozen=True)
class _Scored:
    """What all processes know of a unit."""

    unit: int
    similarity: Tensor
    """(scan,) float32."""
    classes: Tensor
    """(scan,) int32."""
    texts: Tensor
    """(scan,) int32."""

    @classmethod
    def unpack(cls, unit: int, scores: Tensor) -> _Scored:
        return cls(unit, scores[0].view(torch.float32), scores[1], scores[2])

    def pack(self) -> Tensor:
        """(3, scan) int32, one message."""
        return torch.stack([self.similarity.view(torch.int32), self.classes, self.texts])


class Curator:
    """Curates a pool, one curation after the other."""

    def __init__(
        self,
        data: PairData,
        rule: Rule,
        pool: Pool,
        classes: Sequence[TargetClass],
        run: Run,
        *,
        first_unit: int,
    ) -> None:
        """Begin to read captions.

        Args:
            data: where the pool lies and how it is read.
            rule: which captions are chosen.
            pool: what is scanned.
            classes: near to which captions are chosen.
            run: its processes share the work.
            first_unit: where the first curation starts.
        """
        self._data, self._rule = data, rule
        self._pool = pool
        self._classes = classes
        self._run = run
        self._log = run.log
        self._damage = DamageCounter(data.max_damaged, patience=min(256, pool.samples))
        self._told: set[str] = set()
        self._reader = UnitReader(
            pool, run, first=first_unit, workers=data.workers, limit=60 * data.timeout_minutes
        )

    def curate(
        self, period: int, first_unit: int, needed: int, *, features: TextFeatures, gather: Gather
    ) -> Curation:
        """Choose the pairs of a period; every process calls this and gets the same ones.

        Args:
            period: its number.
            first_unit: where to start; where the curation before it ended.
            needed: pairs.
            features: of texts, with the weights that choose.
            gather: shares the scores.

        Raises:
            InputError: if enough was scanned without finding as many, or texts cannot be used.
        """
        started = time.perf_counter()
        search = _Search(self._data, self._rule, self._pool, period, first_unit, needed)
        with features.asked():
            directions = class_features([c.prompts for c in self._classes], features.texts)
            while not search.is_over:
                self._round(search, features, directions, gather)
        chosen = search.finish(self._log)
        order = sample_generator(self._pool.choice.seed, "curated order", period).permutation(
            len(chosen)
        )
        return Curation(
            chosen.rows(order),
            search.facts,
            self._examples(search) if self._run.is_main else [],
            time.perf_counter() - started,
        )

    def _round(
        self, search: _Search, features: TextFeatures, classes: Tensor, gather: Gather
    ) -> None:
        """Score a unit on every process, and count those that are still needed."""
        before = search.facts.next_unit
        first = before - before % self._run.world_size
        mine = first + self._run.rank
        texts = None
        scores = torch.zeros(3, self._pool.scan, dtype=torch.int32)
        if mine >= before:  # else it was counted in the curation before this one
            texts = self._reader.take()
            self._tell_of(texts.damage_notes)
            scores = _score(mine, texts, features, classes).pack()
        for unit, part in enumerate(gather(scores), first):
            if unit >= before and not search.is_over:
                self._count_damage(search.add(_Scored.unpack(unit, part)))
        if texts is not None and mine >= search.facts.next_unit:
            self._reader.give_back(texts)

    def _tell_of(self, notes: Sequence[DamageNote]) -> None:
        """Warn of the first text of every kind that this process cannot read."""
        for note in notes:
            if note.kind not in self._told:
                self._told.add(note.kind)
                self._log.warning("while curating: %s", warning(note, self._data.train))

    def _count_damage(self, unreadable: int) -> None:
        self._damage.add({"text": unreadable} if unreadable else {}, self._pool.scan)
        if unreadable:
            self._log.warning("while curating: %s", self._damage.describe(()))
        self._damage.check()

    def _examples(self, search: _Search, count: int = 8) -> list[Example]:
        """Captions of the first unit, spread over all similarities, chosen and not."""
        unit = search.first
        assert unit is not None
        scored, kept = unit
        numbers = self._pool.numbers(scored.unit)
        found = []
        for is_chosen in (True, False):
            rows = ((kept == is_chosen) & (scored.texts >= 0)).nonzero().flatten()
            rows = rows[scored.similarity[rows].argsort(descending=True, stable=True)]
            places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
            for row in rows[places].tolist():
                drawn = self._pool.text(int(numbers[row]))
                assert drawn is not None
                nearest = self._classes[int(scored.classes[row])].name
                found.append(Example(drawn[1], nearest, float(scored.similarity[row]), is_chosen))
        return found


def _score(unit: int, texts: UnitTexts, features: TextFeatures, classes: Tensor) -> _Scored:
    """The nearest class of every usable text of a unit."""
    similarity = torch.full((len(texts.texts),), -2.0)
    nearest = torch.zeros(len(texts.texts), dtype=torch.int32)
    usable = (texts.texts >= 0).nonzero().flatten()
    if len(usable):
        vectors = features.tokens(texts.token_ids[usable], texts.lengths[usable])
        found, which = nearest_class(vectors, classes)
        similarity[usable], nearest[usable] = found.cpu(), which.cpu().int()
    return _Scored(unit, similarity, nearest, texts.texts.int())


class _Search:
    """What one curation has found so far; alike on every process."""

    def __init__(
        self,
        data: PairData,
        rule: Rule,
        pool: Pool,
        period: int,
        first_unit: int,
        needed: int,
    ) -> None:
        self._data, self._rule = data, rule
        self._pool = pool
        self._needed = needed
        self._max_scanned = rule.max_scanned or PASSES * pool.samples
        self._collection: Collection[int] = Collection(keep=rule.keep)
        self._parts: list[Chosen] = []
        self._rejected: list[Chosen] = []
        self.facts = Facts(period, first_unit, first_unit, rule.threshold)
        self.first: tuple[_Scored, Tensor] | None = None
        self._last_found = 0

    @property
    def _is_full(self) -> bool:
        return len(self._collection) >= self._needed

    @property
    def is_over(self) -> bool:
        """Whether enough was found, or too much scanned."""
        scanned = self.facts.scanned
        return (
            self._is_full
            or scanned >= self._max_scanned
            # the same weights will find no more in another pass
            or scanned - self._last_found >= self._pool.samples
        )

    def add(self, scored: _Scored) -> int:
        """Count one unit; the number of its texts that could not be read."""
        facts, usable = self.facts, scored.texts >= 0
        unreadable = int((scored.texts == UNREADABLE).sum())
        facts.next_unit = scored.unit + 1
        facts.scanned += len(scored.texts)
        facts.unreadable += unreadable
        facts.without_text += int((scored.texts == NO_TEXT).sum())
        kept = torch.zeros_like(usable)
        if usable.any():
            similarity = scored.similarity[usable]
            if not similarity.isfinite().all():
                raise NotFiniteError(
                    f"curation {facts.period} finds features of captions that are not finite, so "
                    "that none is near to a class; training has diverged, or float16 overflows"
                )
            facts.best = max(facts.best, float(similarity.max()))
            selection = select(
                similarity, threshold=self._rule.threshold, min_ratio=self._rule.min_ratio
            )
            facts.fallbacks += selection.fell_back
            kept[usable] = selection.chosen
        new = self._take(self._rows(scored, kept))
        facts.kept += new
        if new:
            self._last_found = facts.scanned
        if self._rule.when_short == "best":
            self._remember(self._rows(scored, usable & ~kept))
        if self.first is None:
            self.first = scored, kept
        return unreadable

    def _rows(self, scored: _Scored, mask: Tensor) -> Chosen:
        rows = mask.numpy()
        shards, indices = self._pool.order.locate(self._pool.numbers(scored.unit)[rows])
        return Chosen(
            shards,
            indices,
            scored.texts.numpy()[rows].astype(np.int16),
            scored.similarity.numpy()[rows],
            scored.classes.numpy()[rows],
        )

    def _take(self, pairs: Chosen) -> int:
        """Collect pairs, each once where the rule keeps a set; how many were new."""
        samples = self._pool.first_of_shard[pairs.shards] + pairs.indices
        keys = samples * (int(np.iinfo(np.int16).max) + 1) + pairs.texts
        taken = np.array(self._collection.add(keys.tolist()), np.bool_)
        self._parts.append(pairs.rows(taken))
        return int(taken.sum())

    def _remember(self, rejected: Chosen) -> None:
        """Hold the nearest of what was not kept, a bounded number of them."""
        self._rejected.append(rejected)
        if sum(map(len, self._rejected)) > 4 * self._needed:
            self._rejected = [_nearest(Chosen.together(self._rejected), 2 * self._needed)]

    def finish(self, log: logging.Logger) -> Chosen:
        """What was chosen, in the order in which it was found.

        Raises:
            InputError: if it is not enough.
        """
        if not self._is_full and self._rule.when_short == "best" and self._rejected:
            before = len(self._collection)
            nearest = Chosen.together(self._rejected)
            self._take(_nearest(nearest, len(nearest)))
            self.facts.filled_up = min(len(self._collection), self._needed) - before
            log.warning("%s; the nearest of the others fill up", self._shortage(before))
        if not self._is_full:
            raise InputError(self._mistake())
        return Chosen.together(self._parts).rows(slice(self._needed))

    def _shortage(self, found: int) -> str:
        facts = self.facts
        return (
            f"curation {facts.period} scanned {facts.scanned:,} captions and kept {found:,} of the "
            f"{self._needed:,} pairs it needs; the best similarity it saw is {facts.best:.4f} at "
            f"data.threshold = {facts.threshold:g}"
        )

    def _mistake(self) -> str:
        facts = self.facts
        if facts.without_text + facts.unreadable == facts.scanned:
            return (
                f"none of the {facts.scanned:,} samples that were scanned has a usable text in "
                f"data.fields.caption = {self._data.fields.caption} ({facts.unreadable:,} could "
                "not be read); name the fields in which the captions are"
            )
        return (
            f"{self._shortage(len(self._collection))}; lower it, set or raise data.min_ratio, "
            "shorten data.period, or let data.max_scanned allow more"
        )


def _nearest(pairs: Chosen, count: int) -> Chosen:
    order: Callable[..., np.ndarray] = np.argsort
    return pairs.rows(order(-pairs.similarity, kind="stable")[:count])
