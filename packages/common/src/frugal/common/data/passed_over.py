"""What is left out of somebody's data, counted and told by reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_NAMED = 3


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
