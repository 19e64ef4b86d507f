"""Samples that cannot be used: what is wrong with them, and how many a run puts up with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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


class Damaged(Exception):  # noqa: N818 - a state of the sample, not an error of the program
    """One sample cannot be used; the run goes on without it."""

    def __init__(self, kind: Kind, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


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

    def add(self, damage: Mapping[str, int], samples: int) -> None:
        """Count one batch of ``samples`` samples, the damaged ones included."""
        self.read += samples
        for kind, count in damage.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def check(self) -> None:
        """Stop the run if too much was damaged.

        Raises:
            InputError: if at least ``patience`` samples were read and more than ``max_damaged``
                of them were damaged.
        """
        if self.read < self.patience or self.damaged <= self.max_damaged * self.read:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        raise InputError(
            f"{self.damaged} of the {self.read} samples read so far are damaged ({kinds}), more "
            f"than data.max_damaged = {self.max_damaged} allows; look at the shards with `python "
            "-m frugal.common.shards check` (shards that were replaced need a new index), or "
            "raise the limit"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON)."""
        return {"read": self.read, "kinds": dict(self.kinds)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue counting where :meth:`state` was taken; an empty state starts at zero."""
        self.read = int(state.get("read", 0))
        self.kinds = {str(kind): int(count) for kind, count in state.get("kinds", {}).items()}
