"""Images that lie in files of their own: class folders, and lists in CSV files."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frugal.common.data.class_folders import is_bare_number, is_wordnet_id, read_class_folders
from frugal.common.data.damage import Damaged
from frugal.common.data.image_walk import images_below, pass_over_files
from frugal.common.data.lists_beside import refuse_lists, refuse_texts_of_images
from frugal.common.data.passed_over import PassedOver, shortened
from frugal.common.data.samples import Fields, RawSample, StringTable
from frugal.common.errors import InputError
from frugal.common.files import reason_of


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
        """The path of an image, or the CSV file and row where the row has none."""
        file = self.files[index]
        return str(Path(self.base, file)) if file else f"{self.name}/{index}"

    def captions(self, index: int) -> list[str]:
        """The caption of an image, or none where a list has left it empty."""
        text = self.texts[index]
        return [text] if text else []

    def read(self, index: int) -> RawSample:
        """A sample.

        Raises:
            Damaged: if its image cannot be read.
        """
        file = self.files[index]
        if not file:
            raise Damaged("no image")
        try:
            image = Path(self.base, file).read_bytes()
        except OSError as error:
            raise Damaged("unreadable", reason_of(error)) from None
        return RawSample(
            image=image,
            captions=self.captions(index),
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
    captions = [fields.template.format(n) if has_words else "" for n in found.names.values()]
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


def tell_classes(shard: FileList, log: logging.Logger) -> None:
    """Say which classes a folder has: how many, the first and the last, and those without images.

    The order of the class numbers is seen by these two.
    """
    if not shard.class_folders:
        return
    first, last = (f"{shard.class_folders[n]} -> {shard.class_names[n]!r}" for n in (0, -1))
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


def open_csv(path: Path, fields: Fields) -> FileList:
    """The images that a CSV file with a header lists.

    Raises:
        InputError: if the file is no such list.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = file.readline()
            separator = fields.csv_separator or ("\t" if "\t" in header else ",")
            file.seek(0)
            rows = csv.DictReader(file, delimiter=separator)
            columns = rows.fieldnames or []
            for wanted in (fields.csv_image, fields.csv_caption):
                if wanted not in columns:
                    raise InputError(
                        f"{path} has no column {wanted!r} among {list(columns)}; set "
                        "data.fields.csv_image, csv_caption and csv_separator"
                    )
            pairs = [(row[fields.csv_image], row[fields.csv_caption]) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from None
    files = [file or "" for file, _ in pairs]
    base = path.parent
    if files and not (base / files[0]).exists() and Path(files[0]).exists():
        base = Path()
    return FileList(
        name=str(path),
        base=str(base),
        files=StringTable.of(files),
        texts=StringTable.of(caption or "" for _, caption in pairs),
        labels=None,
    )
