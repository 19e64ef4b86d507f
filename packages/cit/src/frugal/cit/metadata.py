"""The classes whose captions a curation looks for: of tasks, of WordNet or of text files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frugal.common.data.samples import caption_texts
from frugal.common.errors import InputError
from frugal.common.evaluation.task_labels import TASKS, task_labels
from frugal.common.files import read_lines

ALL, WORDNET, OF_TASK = "all", "wordnet", "task"
_PLAIN = ("{c}",)


@dataclass(frozen=True)
class TargetClass:
    """One direction in which captions are looked for."""

    name: str
    """For people."""
    prompts: tuple[str, ...]
    """Texts whose mean feature it is."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The classes near to which a caption is chosen."""

    sources: tuple[str, ...] = ("imagenet",)
    """Any number of: tasks (imagenet, food101, cifar10 and so on), "all" for the 26 of them,
    "wordnet" for the lemmas of its nouns, and text files with a class per line, whose names, if it
    has several, are separated by tabs."""
    templates: tuple[str, ...] = _PLAIN
    """Sentences around a name, {c} where it goes; "task" stands for those that a task is evaluated
    with."""
    flatten: bool = False
    """Make every name a class of its own, also where a class has several."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError(
                "data.metadata.sources is empty, so that no caption is wanted; name a task, such "
                "as imagenet, or a text file with one name per line"
            )
        if not self.templates:
            raise InputError(
                "data.metadata.templates is empty; give {c} for the name alone, or task"
            )
        for template in self.templates:
            if template != OF_TASK and "{c}" not in template:
                raise InputError(
                    f"data.metadata.templates has {template!r}, which has no place for the name; "
                    "write {c} where it goes"
                )

    def classes(self) -> list[TargetClass]:
        """Every class once, in the order of the sources.

        Raises:
            InputError: if a source is unknown, cannot be read, or names nothing.
        """
        sources = [s for source in self.sources for s in (TASKS if source == ALL else (source,))]
        found: dict[tuple[str, ...], TargetClass] = {}
        for source in sources:
            names, templates_of_task = _read(source)
            if not names:
                raise InputError(f"data.metadata.sources: {source} names no class; add some")
            if self.flatten:
                names = [(name,) for several in names for name in several]
            templates = self._templates(source, templates_of_task)
            for several in names:
                prompts = tuple(t.replace("{c}", name) for t in templates for name in several)
                found.setdefault(tuple(sorted(prompts)), TargetClass(several[0], prompts))
        return list(found.values())

    def _templates(self, source: str, of_task: Sequence[str]) -> list[str]:
        if OF_TASK in self.templates and not of_task:
            raise InputError(
                f"data.metadata.templates is task, but {source} is no task and has none of its "
                "own; write the templates, such as 'a photo of a {c}.'"
            )
        return [
            sentence
            for template in self.templates
            for sentence in (of_task if template == OF_TASK else [template])
        ]


def _read(source: str) -> tuple[list[tuple[str, ...]], Sequence[str]]:
    """The names of every class of a source, and the templates it is evaluated with."""
    if source == WORDNET:
        return [(name,) for name in wordnet_nouns()], ()
    path = Path(source)
    if path.is_file():
        return _read_file(path), ()
    if path.suffix or "/" in source:
        raise InputError(
            f"data.metadata.sources names the file {source}, which does not exist; check the path"
        )
    labels = task_labels(source)
    return list(labels.classes), labels.templates


def _read_file(path: Path) -> list[tuple[str, ...]]:
    split = (tuple(caption_texts(line.split("\t"))) for line in read_lines(path))
    return [names for names in split if names]


def wordnet_nouns() -> list[str]:
    """The lemmas of WordNet's nouns, spaces between their words, in alphabetical order.

    Raises:
        InputError: if WordNet is not installed.
    """
    import nltk
    from nltk.corpus import wordnet

    try:
        lemmas = set(wordnet.all_lemma_names(pos="n"))
    except LookupError:
        raise InputError(
            "data.metadata.sources names wordnet, which is in none of the folders "
            f"{', '.join(nltk.data.path)}; run `python -m nltk.downloader wordnet` once, or set "
            "NLTK_DATA to a folder that has corpora/wordnet"
        ) from None
    return sorted(lemma.replace("_", " ") for lemma in lemmas)
