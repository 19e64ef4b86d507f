"""What is odd about the data of an evaluation and its class names: told once, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from frugal.common.data.damage import PassedOver, shortened
from frugal.common.evaluation.prompts import ClassName, prompts


@dataclass
class Remarks:
    """What whoever reads the numbers of an evaluation should know of its data."""

    same_names: list[list[int]] = field(default_factory=list)
    """Groups of classes that no prompt tells apart: of each, only the first is ever answered."""
    without_images: list[int] = field(default_factory=list)
    """Classes that there is no image of, but which can be answered."""
    incomplete: str = ""
    """What is missing of the set that the class names belong to, in words."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    """What lies beside the images; it was told when they were opened."""

    def tell(self, name: str, labels: Sequence[str], log: logging.Logger) -> None:
        """Say it in the log, one line for each kind.

        Args:
            name: of the evaluation.
            labels: one name per class.
            log: of the run.
        """
        if self.same_names:
            named = [" = ".join(f"{labels[n]!r} ({n})" for n in group) for group in self.same_names]
            log.warning(
                "%s: classes of the same name, of which only the first can be answered: %s",
                name,
                shortened(named),
            )
        if self.without_images:
            named = [labels[number] for number in self.without_images]
            log.warning("%s: no image of %d classes: %s", name, len(named), shortened(named))
        if len(labels) == 1:
            log.warning("%s: there is one class only, so that every answer is right", name)
        if self.incomplete:
            log.warning("%s: the data has %s", name, self.incomplete)

    def numbers(self) -> dict[str, int]:
        """How many of each kind; nothing where there is none."""
        counts = {
            "same_names": sum(map(len, self.same_names)),
            "classes_without_images": len(self.without_images),
            "passed_over": sum(self.passed_over.counts.values()),
        }
        return {kind: count for kind, count in counts.items() if count}

    def facts(self, labels: Sequence[str]) -> dict[str, Any]:
        """The same by name, ready for JSON; nothing where there is none."""
        found = {
            "same_names": [[[n, labels[n]] for n in group] for group in self.same_names],
            "classes_without_images": [labels[number] for number in self.without_images],
            "incomplete": self.incomplete,
            "passed_over": self.passed_over.state(),
        }
        return {kind: value for kind, value in found.items() if value}


def same_names(
    names: Sequence[ClassName],
    templates: Sequence[str],
    token_ids: Callable[[str], Sequence[int]],
) -> list[list[int]]:
    """Groups of classes whose names, or whose prompts as the model sees them, are the same.

    Names are compared without regard to case, underscores and spaces; prompts by their tokens,
    which are cut at the text length.

    Args:
        names: of the classes.
        templates: prompts with ``{c}`` for the class.
        token_ids: what of a text the model sees.
    """
    alike = _groups(_plain(name) for name in names)
    # only classes that look alike in one template are looked at in all of them
    shortest = min(templates, key=len)
    looks = [tuple(tuple(token_ids(text)) for text in prompts(name, [shortest])) for name in names]
    for group in _groups(looks):
        seen = [tuple(tuple(token_ids(t)) for t in prompts(names[n], templates)) for n in group]
        alike += [[group[place] for place in part] for part in _groups(seen)]
    return sorted({tuple(group): group for group in alike}.values())


def _plain(name: ClassName) -> tuple[str, ...]:
    words = [name] if isinstance(name, str) else name
    return tuple(sorted(" ".join(word.replace("_", " ").casefold().split()) for word in words))


def _groups(keys: Iterable[Any]) -> list[list[int]]:
    """The places of equal keys, where there are several."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [group for group in places.values() if len(group) > 1]
