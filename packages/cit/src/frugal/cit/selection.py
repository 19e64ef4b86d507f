"""Which of the scanned captions a curation chooses: features of classes, the rule, the quota.

Source: Xu et al., "CiT: Curation in Training for Effective Vision-Language Data",
arXiv:2301.02241, section 3, and the published configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def class_features(
    classes: Sequence[Sequence[str]], embed: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """(C, D) float32 unit vectors: the direction of every class.

    Each prompt is embedded once, however many classes share it, and normalized; the prompts of a
    class are averaged, and the mean is normalized again.

    Args:
        classes: the prompts of every class.
        embed: from texts to vectors (len(texts), D), of any length.
    """
    distinct = list(dict.fromkeys(prompt for prompts in classes for prompt in prompts))
    place = {prompt: row for row, prompt in enumerate(distinct)}
    features = F.normalize(embed(distinct).float(), dim=-1)  # (prompts, D)
    means = torch.stack([features[[place[p] for p in prompts]].mean(0) for prompts in classes])
    return F.normalize(means, dim=-1)


def nearest_class(texts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of every text with its nearest class (B,) float32, and which one (B,) int64.

    Args:
        texts: (B, D), of any length.
        classes: (C, D) unit vectors.
    """
    found = (F.normalize(texts.float(), dim=-1) @ classes.T).max(dim=1)
    return found.values, found.indices


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which captions a curation chooses; the fields of the recipe's data of these names."""

    threshold: float
    """A caption is chosen if its cosine with the nearest class is greater."""
    min_ratio: float | None
    """Least share of a unit to be chosen, the nearest ones where too few are above."""
    keep: Literal["set", "list"]
    """Whether a caption is chosen once, or as often as it is met."""
    max_scanned: int | None
    """Captions after which a curation ends; without it some passes of the pool."""
    when_short: Literal["stop", "best"]
    """Whether a run ends where these do not suffice, or the nearest of the others fill up."""


@dataclass(frozen=True)
class Selection:
    """What was decided about some texts."""

    chosen: Tensor
    """(B,) bool."""
    fell_back: bool
    """Too few were above the threshold, and the nearest were taken in their place."""


def select(similarity: Tensor, *, threshold: float, min_ratio: float | None) -> Selection:
    """The texts above a threshold; where these are too few, the nearest ones and no others.

    Args:
        similarity: (B,) float32 of usable texts.
        threshold: a text must be nearer than this.
        min_ratio: least share to be chosen; of that share the whole number of texts, which may be
            none, is taken where fewer are above the threshold. None takes what is there.
    """
    count = len(similarity)
    chosen = similarity > threshold
    if min_ratio is None or not count or int(chosen.sum()) / count >= min_ratio:
        return Selection(chosen, fell_back=False)
    best = similarity.argsort(descending=True, stable=True)[: int(min_ratio * count)]
    return Selection(torch.zeros_like(chosen).index_fill(0, best, True), fell_back=True)


class Collection(Generic[Key]):
    """What was chosen so far, in order."""

    def __init__(self, *, keep: Literal["set", "list"]) -> None:
        """Start empty.

        Args:
            keep: set takes everything once, list as often as it comes.
        """
        self.keys: list[Key] = []
        self._seen: set[Key] | None = set() if keep == "set" else None

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, keys: Iterable[Key]) -> list[bool]:
        """Take keys in, in order; which of them were not there yet."""
        return [self._add(key) for key in keys]

    def _add(self, key: Key) -> bool:
        if self._seen is not None:
            if key in self._seen:
                return False
            self._seen.add(key)
        self.keys.append(key)
        return True
