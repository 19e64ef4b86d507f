"""Images that lie in files of their own: class folders, and lists in CSV files."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields, RawSample, StringTable
from frugal.common.errors import InputError
from frugal.common.files import read_json, reason_of, refuse_exhaustion


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
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        return RawSample(
            image=image,
            captions=self.captions(index),
            label=None if self.labels is None else int(self.labels[index]),
        )


def image_files(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """The images below a folder and its sub-folders, in the order of torchvision's ImageFolder."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [
            Path(parent, name)
            for name in sorted(names)
            if name.rpartition(".")[2].lower() in extensions
        ]
    return found


def class_folders(folder: Path) -> list[str]:
    """The names of the sub-folders, sorted; numbers (ImageNet-V2: 0 to 999) by their value."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    ]
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def named_folders(folder: Path) -> dict[str, str]:
    """What the classes are called, by class folder; class numbers count them in this order.

    ``classnames.json`` names folders, and folders that it does not name are left out; so do the
    mappings that ObjectNet comes with, which name the classes it shares with ImageNet-1k.
    ``classnames.txt`` has one line for every folder. Without any, folders are called as they are.

    Raises:
        InputError: if a file of names does not fit the folders.
    """
    folders = class_folders(folder)
    if chosen := _chosen_folders(folder):
        source, by_folder = chosen
        if missing := sorted(by_folder.keys() - set(folders)):
            raise InputError(
                f"{source} names the class folder {missing[0]!r}, which {folder} does not have; "
                "copy it, or correct the file"
            )
        return {name: by_folder[name] for name in folders if name in by_folder}
    listed = folder / "classnames.txt"
    if not listed.is_file():
        return {name: name.replace("_", " ") for name in folders}
    names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    if len(names) != len(folders):
        raise InputError(
            f"{listed} names {len(names)} classes but {folder} has {len(folders)} class folders; "
            "write one line per folder, in their sorted order"
        )
    return dict(zip(folders, names, strict=True))


_OBJECTNET = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")


def find_objectnet(folder: Path) -> Path | None:
    """Where the mappings of ObjectNet lie, if this is it or its images; None for other data."""
    places = (folder / "mappings", folder.parent / "mappings")
    return next((p for p in places if all((p / name).is_file() for name in _OBJECTNET)), None)


def _chosen_folders(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """Where it is said which class folders count, and what they are called."""
    named, mappings = folder / "classnames.json", find_objectnet(folder)
    if named.is_file():
        return named, _read_names(named)
    if mappings is None:
        return None
    labels, shared = (_read_names(mappings / name) for name in _OBJECTNET)
    return mappings, {name: label for name, label in labels.items() if label in shared}


def _read_names(path: Path) -> dict[str, str]:
    content = read_json(path)
    is_mapping = isinstance(content, dict) and content
    if not is_mapping or not all(isinstance(value, str) for value in content.values()):
        raise InputError(
            f"{path} does not map strings to strings; write the name of every class by its folder, "
            'such as {"n01440764": "tench"}'
        )
    return content


def open_image_folder(folder: Path, fields: Fields) -> FileList:
    """The images of a folder with one sub-folder per class, with captions from the template.

    Images of a folder without class folders have neither classes nor captions.
    """
    files: list[str] = []
    labels: list[int] = []
    names = named_folders(folder)
    for label, class_folder in enumerate(names):
        found = image_files(folder / class_folder, fields.image)
        files += [str(file.relative_to(folder)) for file in found]
        labels += [label] * len(found)
    if not files:
        files = [file.name for file in image_files(folder, fields.image)]
        return FileList(
            name=str(folder),
            base=str(folder),
            files=StringTable.of(files),
            texts=StringTable.of([""] * len(files)),
            labels=None,
        )
    captions = [fields.template.format(name) for name in names.values()]
    return FileList(
        name=str(folder),
        base=str(folder),
        files=StringTable.of(files),
        texts=StringTable.of(captions[label] for label in labels),
        labels=np.array(labels, np.int64),
        class_folders=tuple(names),
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
