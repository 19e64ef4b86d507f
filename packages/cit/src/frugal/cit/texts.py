"""Which text of a pair is read, and tags that come in another order every time.

Both follow the published code: titles, descriptions and tags of YFCC are texts of equal standing.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from frugal.common.randomness import stable_key

DELIMITERS = (" ", ",", ";", "/", "\n")
"""What may stand between two tags."""


def shuffle_tags(tags: str, generator: random.Random) -> str:
    """The tags of a comma-separated list in drawn order, with a drawn delimiter between them.

    Empty ones vanish; "" where there are none.
    """
    delimiter = generator.choice(DELIMITERS)
    parts = [tag for part in tags.split(",") if (tag := part.strip())]
    generator.shuffle(parts)
    return delimiter.join(parts)


def draw_text(
    texts: Sequence[str], generator: random.Random, *, tags: Collection[int] = ()
) -> tuple[int, str] | None:
    """One of the texts that are not empty, drawn uniformly: its place and what is read of it.

    Args:
        texts: of a sample; it lacks the empty ones.
        generator: of this one draw.
        tags: which of the texts are lists of tags that are shuffled, by their place.

    Returns:
        None where the sample has no usable text.
    """
    usable = [place for place, text in enumerate(texts) if text.strip()]
    if not usable:
        return None
    place = generator.choice(usable)
    if place not in tags:
        return place, texts[place]
    shuffled = shuffle_tags(texts[place], generator)
    return (place, shuffled) if shuffled else None


@dataclass(frozen=True)
class TextChoice:
    """Which text of a sample is read, as a function of seed and sample number."""

    seed: int
    tags: tuple[int, ...] = ()
    """Which of the texts are lists of tags that are shuffled, by their place."""

    def draw(self, texts: Sequence[str], number: int) -> tuple[int, str] | None:
        """As :func:`draw_text`, for sample ``number`` of the pool's endless order."""
        if len(texts) == 1 and not self.tags:
            return (0, texts[0]) if texts[0].strip() else None
        return draw_text(texts, self._generator("text", number), tags=self.tags)

    def again(self, texts: Sequence[str], place: int, number: int) -> str:
        """A text that was chosen, its tags shuffled anew for sample ``number`` of the run."""
        if place not in self.tags:
            return texts[place]
        return shuffle_tags(texts[place], self._generator("tags", number))

    def _generator(self, purpose: str, number: int) -> random.Random:
        return random.Random(stable_key(self.seed, purpose, number))
