"""Images that lie in files of their own, and those of class folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frugal.common.data.damage import Damaged, PassedOver, shortened
from frugal.common.data.samples import Fields, RawSample, StringTable, caption_text, printable
from frugal.common.data.stores.class_folders import (
    is_bare_number,
    is_wordnet_id,
    read_class_folders,
)
from frugal.common.data.stores.image_walk import (
    images_below,
    pass_over_files,
    refuse_lists,
    refuse_texts_of_images,
)
from frugal.common.errors import InputError
from frugal.common.files import read_bytes, reason_of, refuse_exhaustion


@dataclass(frozen=True)
class FileList:
    """Image files with a caption each, perhaps with labels: one shard, and its own reader."""

    name: str
    """The folder or the CSV file."""
    base: str
    """Folder that the files' paths are relative to."""
    files: StringTable
    texts: StringTable
    """One caption each; empty for none."""
    labels: np.ndarray | None
    """(n,) int64."""
    class_folders: tuple[str, ...] = ()
    """In the order of the class numbers."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, in the same order."""
    has_given_names: bool = False
    """A file says what classes are called; else they are called as their folders."""
    empty_folders: tuple[str, ...] = ()
    """Folders without images beside them, which are no classes."""
    lines: np.ndarray | None = None
    """(n,) int64: where the row of each file begins in a list, counted from 1."""
    damaged: Mapping[int, str] = field(default_factory=dict)
    """What is wrong with rows of a list, by their place."""
    counted: str = ""
    """How many rows and lines a list has."""
    remarks: tuple[str, ...] = ()
    """What the owner should know, one line each."""
    passed_over: PassedOver = field(default_factory=PassedOver)
    """What lies there too and is no sample."""

    @property
    def classes_without_images(self) -> tuple[str, ...]:
        """Class folders that hold no image."""
        has_image = set() if self.labels is None else set(np.unique(self.labels).tolist())
        return tuple(n for place, n in enumerate(self.class_folders) if place not in has_image)

    @property
    def num_samples(self) -> int:
        """Files, unreadable ones included."""
        return len(self.files)

    def open(self, fields: Fields) -> FileList:
        """Itself: there is nothing to open."""
        return self

    def close(self) -> None:
        """Nothing to give back."""

    def key(self, index: int) -> str:
        """The path of an image, or the list and the line where a row has none."""
        file = self.files[index]
        if file and index not in self.damaged:
            return str(Path(self.base, file))
        return f"{self.name}:{index if self.lines is None else self.lines[index]}"

    def warnings(self) -> list[str]:
        """What was damaged, guessed or passed over, one line each."""
        return [f"{self.name}: {line}" for line in (*self.remarks, *self.passed_over.lines())]

    def captions(self, index: int) -> list[str]:
        """The caption of an image, or none where a list has left it empty; raises `Damaged`."""
        if index in self.damaged:
            raise Damaged("row", self.damaged[index])
        text = self.texts[index]
        return [text] if text else []

    def read(self, index: int) -> RawSample:
        """A sample.

        Raises:
            Damaged: if its row or its image cannot be read.
        """
        captions = self.captions(index)
        file = self.files[index]
        if not file:
            raise Damaged("no image")
        try:
            image = read_bytes(Path(self.base, file))
        except (OSError, ValueError) as error:  # the latter for a NUL in its name
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        return RawSample(
            image=image,
            captions=captions,
            label=None if self.labels is None else int(self.labels[index]),
        )


def open_image_folder(folder: Path, fields: Fields) -> FileList:
    """The images of a folder with one sub-folder per class, with captions from the template.

    Images of a folder without class folders have neither classes nor captions. Folders that are
    called by numbers or WordNet ids, and were given no names, make no captions.

    Raises:
        InputError: if names do not fit the folders, or what is beside the images is data too.
    """
    passed_over = PassedOver()
    found = read_class_folders(folder, fields.image, passed_over)
    if not any(found.images.values()):
        texts: list[str] = []
        passed_over = PassedOver()
        files = images_below(folder, [""], fields.image, passed_over, texts)[""]
        refuse_lists(folder, texts)
        return FileList(
            name=str(folder),
            base=str(folder),
            files=StringTable.of(files),
            texts=StringTable.of([""] * len(files)),
            labels=None,
            passed_over=passed_over,
        )
    refuse_lists(folder, found.texts)
    files = [file for name in found.names for file in found.images[name]]
    if fields.caption:
        refuse_texts_of_images(folder, found.texts, files)
    pass_over_files(folder, fields.image, passed_over)
    has_words = found.has_given_names or not any(map(_is_no_word, found.names))
    captions = [
        caption_text(fields.template.replace("{}", name)) if has_words else ""
        for name in found.names.values()
    ]
    counts = [len(found.images[name]) for name in found.names]
    labels = np.repeat(np.arange(len(counts)), counts)
    return FileList(
        name=str(folder),
        base=str(folder),
        files=StringTable.of(files),
        texts=StringTable.of(captions[label] for label in labels),
        labels=labels,
        class_folders=tuple(found.names),
        class_names=tuple(found.names.values()),
        has_given_names=found.has_given_names,
        empty_folders=found.empty,
        passed_over=passed_over,
    )


def _is_no_word(name: str) -> bool:
    return is_bare_number(name) or is_wordnet_id(name)


Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


def tell_classes(shard: FileList, log: Log) -> None:
    """Say which classes a folder has: how many, the first and the last, and those without images.

    The order of the class numbers is seen by these two.
    """
    if not shard.class_folders:
        return
    first, last = (
        f"{printable(shard.class_folders[n])} -> {shard.class_names[n]!r}" for n in (0, -1)
    )
    log.info("%s: %d classes, %s to %s", shard.name, len(shard.class_folders), first, last)
    if without := shard.classes_without_images:
        log.warning("%s: no image of %s", shard.name, shortened(without))


def refuse_without_words(shard: FileList) -> None:
    """Refuse class folders as a source of captions if their names are no words.

    Raises:
        InputError: if they are numbers or WordNet ids and were given no names.
    """
    odd = next((name for name in shard.class_folders if _is_no_word(name)), None)
    if odd is not None and not shard.has_given_names:
        raise InputError(
            f"the class folders of {shard.name} are called by numbers or ids such as {odd!r}, of "
            "which no caption can be made; write the name of each class by its folder in "
            f'{Path(shard.name, "classnames.json")}, such as {{"{odd}": "..."}}'
        )
