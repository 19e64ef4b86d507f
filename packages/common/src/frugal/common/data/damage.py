"""What of somebody's data cannot be used: damaged samples, and what is passed over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from frugal.common.errors import InputError

Kind = Literal[
    "image", "checksum", "truncated", "unreadable", "no image", "no caption", "text", "label",
    "no label", "duplicate", "apart", "row",
]  # fmt: skip
"""What is wrong with a sample.

image: the picture cannot be decoded. checksum: the bytes are not those that were indexed.
truncated: the shard ends, or may end, in the middle of it. unreadable: the file cannot be read.
no image, no caption: the sample has none. text: a caption that is not UTF-8 or not JSON.
label: a class that is not a number, or none of the model's. no label: the sample has no class.
duplicate: two members of one name. apart: members of a streamed tar that belong to an earlier
sample. row: a row of a list that does not fit its header, has quotes that do not pair up, or a
caption that is not UTF-8.
"""


class DamageNote(NamedTuple):
    """One damaged or repaired sample, as a person finds and understands it."""

    kind: str
    key: str
    """Where it is: ``shard/key``, a path or a URL."""
    detail: str
    """What is wrong with it, such as an exit status or the words of the decoder."""
    source: int
    """Which entry of ``data.train`` it is of."""
    lost: int
    """Samples that were lost with it and have no slot in any batch: the rest of its shard."""


REPAIRED = "repaired"
"""In place of a kind: a sample that is used, though a part of it could not be read and another was
taken for it."""
_NAMED = 3
"""Things that are passed over for one reason and named; the others are counted."""
_OBJECT = re.compile(r"\s*<[^<>]* at 0x[0-9a-f]+>")


class Damaged(Exception):  # noqa: N818 - a state of the sample, not an error of the program
    """One sample cannot be used; the run goes on without it."""

    def __init__(self, kind: Kind, detail: str = "", *, lost: int = 0) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
        self.lost = lost
        """Samples that are lost with this one: the rest of a shard."""


def note_of(key: str, damaged: Damaged, *, source: int = 0) -> DamageNote:
    """What a batch tells of a damaged sample.

    Args:
        key: where it is.
        damaged: what is wrong with it.
        source: the entry of ``data.train`` that it is of.
    """
    # libraries put objects into their words: cannot identify image file <_io.BytesIO ... at 0x..>
    detail = _OBJECT.sub("", damaged.detail).strip()
    return DamageNote(damaged.kind, key, detail, source, damaged.lost)


@dataclass
class DamageCounter:
    """How many samples a run read and how many of them were damaged, by kind.

    ``read`` is always the samples trained on plus the damaged ones.
    """

    max_damaged: float
    """Largest fraction of damaged samples the run puts up with."""
    patience: int = 256
    """Samples to read before the fraction is judged."""
    read: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    """Samples that were lost with parts of shards and took no slot of a batch."""
    repaired: int = 0
    """Samples trained on of which a part could not be read and another was taken for it."""
    trained_of: dict[int, int] = field(default_factory=dict)
    """Samples trained on by entry of ``data.train``; empty where there is one."""
    damaged_of: dict[int, int] = field(default_factory=dict)
    """Damaged and lost samples by entry of ``data.train``."""
    notes: dict[tuple[str, int], DamageNote] = field(default_factory=dict)
    """The first sample of each kind and entry that was damaged, or repaired, since this process
    started."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_damaged <= 1:
            raise InputError(
                f"data.max_damaged is {self.max_damaged}, must lie between 0 and 1; it is the "
                "fraction of damaged samples at which the run stops"
            )

    @property
    def damaged(self) -> int:
        """Damaged samples of every kind."""
        return sum(self.kinds.values())

    def add(
        self,
        damage: Mapping[str, int],
        samples: int,
        *,
        notes: Iterable[DamageNote] = (),
        sources: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Count one batch of ``samples`` samples, the damaged ones included.

        Args:
            damage: damaged samples by kind.
            samples: all of them.
            notes: what is known of the damaged ones, and of those that were repaired.
            sources: valid samples by entry of ``data.train``.
        """
        self.read += samples
        _add(self.kinds, damage)
        _add(self.trained_of, sources)
        for note in notes:
            self.notes.setdefault((note.kind, note.source), note)
            if note.kind == REPAIRED:
                self.repaired += 1
                continue
            self.lost += note.lost
            _add(self.damaged_of, {note.source: 1 + note.lost})

    def add_counter(self, other: DamageCounter) -> list[DamageNote]:
        """Count what another process counted; what it was the first to meet is returned."""
        self.read += other.read
        self.lost += other.lost
        self.repaired += other.repaired
        _add(self.kinds, other.kinds)
        _add(self.trained_of, other.trained_of)
        _add(self.damaged_of, other.damaged_of)
        new = [note for place, note in other.notes.items() if place not in self.notes]
        self.notes = other.notes | self.notes
        return new

    def shares(self) -> dict[int, float]:
        """Fraction of the samples trained on by entry of ``data.train``; {} where there is one."""
        total = sum(self.trained_of.values())
        entries = sorted(self.trained_of.keys() | self.damaged_of.keys())
        return {n: self.trained_of.get(n, 0) / total for n in entries} if total else {}

    @property
    def is_too_much(self) -> bool:
        """Whether at least ``patience`` samples were read and too many of them were damaged.

        Samples that were lost with parts of shards count as read and damaged.
        """
        return self.read + self.lost >= self.patience and self.was_too_much

    @property
    def was_too_much(self) -> bool:
        """Of a run that has ended: whatever it read, whether too many samples were damaged."""
        read, damaged = self.read + self.lost, self.damaged + self.lost
        return damaged > self.max_damaged * read

    def sentence(self, remedy: str = "") -> str:
        """Why a run with too much damage stops; ``remedy`` follows how to raise the limit."""
        lost = f" and {self.lost} more were lost with parts of shards" if self.lost else ""
        return (
            f"{self.damaged} of the {self.read} samples read so far are damaged ({self.listing()})"
            f"{lost}, more than data.max_damaged = {self.max_damaged} allows; look at the shards "
            "with `python -m frugal.common.shards check` (shards that were replaced need a new "
            "index), or raise the limit with --data.max-damaged" + remedy
        )

    def check(self) -> None:
        """Stop the run if too much was damaged.

        Raises:
            InputError: if it :attr:`is_too_much`.
        """
        if self.is_too_much:
            raise InputError(self.sentence())

    def listing(self) -> str:
        """Damaged samples by kind, in words."""
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))

    def describe(self, sources: Sequence[str]) -> str:
        """One line of what is damaged so far, of which entry of ``data.train``.

        Args:
            sources: the entries of ``data.train``.
        """
        share = (self.damaged + self.lost) / max(self.read + self.lost, 1)
        line = f"{self.damaged} of {self.read} samples damaged so far ({self.listing()})"
        if self.lost:
            line += f", and {self.lost} lost with parts of shards"
        line += f": {share:.2%}"
        if self.repaired:
            line += f"; {self.repaired} repaired"
        if len(sources) > 1:
            parts = [
                f"{sources[n]}: {self.damaged_of.get(n, 0)} damaged, "
                f"{fraction:.1%} of what is trained on"
                for n, fraction in self.shares().items()
                if n < len(sources)
            ]
            line += f" ({'; '.join(parts)})" if parts else ""
        return line

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON)."""
        found: dict[str, Any] = {"read": self.read, "kinds": dict(self.kinds)}
        if self.lost:
            found["lost"] = self.lost
        if self.repaired:
            found["repaired"] = self.repaired
        for name, counts in (("trained_of", self.trained_of), ("damaged_of", self.damaged_of)):
            if counts:
                found[name] = {str(entry): count for entry, count in sorted(counts.items())}
        return found

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue counting where :meth:`state` was taken; an empty state starts at zero."""
        self.read = int(state.get("read", 0))
        self.lost = int(state.get("lost", 0))
        self.repaired = int(state.get("repaired", 0))
        self.kinds = {str(kind): int(count) for kind, count in state.get("kinds", {}).items()}
        self.trained_of = {int(n): int(count) for n, count in state.get("trained_of", {}).items()}
        self.damaged_of = {int(n): int(count) for n, count in state.get("damaged_of", {}).items()}

    def clear(self) -> None:
        """Start at zero."""
        self.load_state({})
        self.notes = {}


def warning(note: DamageNote, sources: Sequence[str]) -> str:
    """What a person is told of the first damage of a kind, or of the first repair."""
    detail = f": {note.detail}" if note.detail else ""
    lost = f", with it about {note.lost} more samples of its shard" if note.lost else ""
    where = f" (of {sources[note.source]})" if len(sources) > 1 else ""
    if note.kind == REPAIRED:
        return (
            f"repaired sample {note.key}{where}: its caption is of another field than the first"
            f"{detail}; others like it are too: the counts are in the log"
        )
    return (
        f"damaged sample {note.key}{where}: {note.kind}{detail}{lost}; it is left out, and so is "
        "what follows like it: the counts are in the log"
    )


def _add(counts: dict[Any, int], more: Mapping[Any, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


@dataclass
class PassedOver:
    """Files, rows and members that are no samples: how many, why, and the first few by name."""

    counts: dict[str, int] = field(default_factory=dict)
    """By reason, in the order in which reasons came up."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, *, count: int = 1) -> None:
        """Count something that was left out.

        Args:
            reason: in words that follow "passed over: ", such as ``no image format: .pdf``.
            name: what was left out, as its owner would find it.
            count: how many things that name stands for.
        """
        self.counts[reason] = self.counts.get(reason, 0) + count
        named = self.examples.setdefault(reason, [])
        if len(named) < _NAMED:
            named.append(name)

    def update(self, other: PassedOver) -> None:
        """Count what another part left out too."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            named = self.examples.setdefault(reason, [])
            named += other.examples[reason][: _NAMED - len(named)]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self, verb: str = "passed over: ") -> list[str]:
        """One line for each reason: ``12 passed over: <reason> (such as a, b, c)``.

        ``verb`` stands between the count and the reason.
        """
        return [
            f"{count:,} {verb}{reason} ({_first(self.examples[reason], count)})"
            for reason, count in self.counts.items()
        ]

    def state(self) -> dict[str, int]:
        """Counts by reason, for results and reports (JSON)."""
        return dict(self.counts)


def shortened(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _first(names: Iterable[str], count: int) -> str:
    named = list(names)
    listed = ", ".join(named)
    return listed if count <= len(named) else f"such as {listed}"
