"""Class names and prompt templates to one embedding per class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import TEXTS_AT_ONCE, Embedder
from frugal.common.evaluation.suites import listed
from frugal.common.evaluation.task_labels import task_labels

ClassName = str | Sequence[str]
"""One name, or several of equal standing."""


def imagenet_class_names() -> list[str]:
    """ImageNet-1k's 1,000 class names in the order of the sorted WordNet ids (OpenAI's list)."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def named_templates(name: str) -> list[str]:
    """The templates called ``imagenet_7``, ``_9`` or ``_80``, ``name``, or those of a task.

    Returns:
        Prompts with ``{c}`` for the class.

    Raises:
        InputError: if there are none of this name.
    """
    if name == "name":
        return ["{c}"]
    if name in listed():
        return list(task_labels(name).templates)
    if name not in ("imagenet_7", "imagenet_9", "imagenet_80"):
        raise InputError(
            f"there are no prompt templates called {name!r}; choose imagenet_7, imagenet_9, "
            f"imagenet_80, name, or a task: {', '.join(listed())}"
        )
    from open_clip.zero_shot_metadata import (
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
    )

    long = name == "imagenet_80"
    templates = OPENAI_IMAGENET_TEMPLATES if long else SIMPLE_IMAGENET_TEMPLATES
    more = ["A photo of a {c}", "{c}"] if name == "imagenet_9" else []
    return [template("{c}") for template in templates] + more


def prompts(name: ClassName, templates: Sequence[str]) -> list[str]:
    """Every name of a class in every template.

    Raises:
        InputError: if the class has no name, or a template has no place for it.
    """
    names = [name] if isinstance(name, str) else list(name)
    if not names or not all(word.strip() for word in names):
        raise InputError(f"a class has an empty name ({name!r}); give every class a name")
    if not templates:
        raise InputError("there are no prompt templates; give at least one, such as '{c}'")
    for template in templates:
        if "{c}" not in template:
            raise InputError(
                f"the prompt template {template!r} has no {{c}}, where the class name goes; "
                "write for example 'a photo of a {c}.'"
            )
    return [template.replace("{c}", word) for word in names for template in templates]


def class_embeddings(
    embedder: Embedder,
    class_names: Sequence[ClassName],
    templates: Sequence[str],
    *,
    ranks: Ranks,
) -> Tensor:
    """(C, E) float32: the direction of each class, the same on every process.

    Each prompt is embedded and normalized, the prompts of a class are averaged over names and
    templates, and the mean is normalized again (FLIP spec, section 8). Classes of the same name
    (ImageNet has two pairs) get the same embedding to the last bit.

    Raises:
        InputError: if a class has no name, a template has no place for it, or the prompts of a
            class cancel each other out.
    """
    texts = [tuple(prompts(name, templates)) for name in class_names]
    if ranks.rank == 0:
        _warn_of_cut_names(embedder, class_names, templates)
    distinct = list(dict.fromkeys(texts))

    def means(rows: slice) -> Tensor:
        group = distinct[rows]
        features = embedder.texts([text for class_texts in group for text in class_texts])
        parts = features.split([len(class_texts) for class_texts in group])
        mean = torch.stack([part.mean(0) for part in parts])  # (classes of the group, E)
        return mean / (mean.norm(dim=1, keepdim=True) + 1e-8)

    longest = max(len(class_texts) for class_texts in distinct)
    table = ranks.table(
        len(distinct),
        embedder.width,
        chunk=max(1, TEXTS_AT_ONCE // longest),
        device=embedder.device,
        fill=means,
    )
    without = (table.norm(dim=1) < 0.5).nonzero()[:, 0].tolist()  # unit vectors, but for these
    if without:
        name = class_names[texts.index(distinct[without[0]])]
        raise InputError(
            f"the prompts of the class {name!r} have embeddings that cancel each other out, so "
            "that the class has no direction; choose other --zero-shot.templates"
        )
    place = {class_texts: row for row, class_texts in enumerate(distinct)}
    return table[torch.tensor([place[class_texts] for class_texts in texts], device=table.device)]


def _warn_of_cut_names(
    embedder: Embedder, class_names: Sequence[ClassName], templates: Sequence[str]
) -> None:
    """Say in how many prompts the text length leaves no room for the name of the class."""
    tokenizer, length = embedder.tokenizer, embedder.context_length
    if embedder.shorten is not None or tokenizer.encode(""):
        return  # what stays is chosen by a reduction, or by another library that makes whole rows
    room = length - len(tokenizer.assemble([], length))
    before = [len(tokenizer.encode(template.partition("{c}")[0])) for template in templates]
    words = [[name] if isinstance(name, str) else name for name in class_names]
    names = [len(tokenizer.encode(word)) for own in words for word in own]
    gone = sum(start >= room for start in before)
    cut = sum(start < room < start + name for start in before for name in names)
    if gone or cut:
        _warn(
            f"a text length of {length} tokens is too short for the prompts: the name of the class "
            f"is cut off in {gone} of {len(before)} templates, and in part in {cut:,} of "
            f"{len(before) * len(names):,} prompts; choose shorter templates, or a model of longer "
            "texts"
        )


@lru_cache(maxsize=64)
def _warn(sentence: str) -> None:
    """Log a warning that was not logged before."""
    logging.getLogger("frugal").warning(sentence)
