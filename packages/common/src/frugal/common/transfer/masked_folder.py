"""Pictures with a class for every pixel, in the layout of ADE20K's scene parsing benchmark.

Pictures lie in ``images/<split>``, and for each a PNG file of the same name in
``annotations/<split>``: 0 is ignored, 1 the first class (Zhou et al., "Scene Parsing through
ADE20K Dataset", CVPR 2017).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.decoding import open_image
from frugal.common.data.samples import StringTable
from frugal.common.data.stores.image_walk import image_files
from frugal.common.errors import InputError
from frugal.common.files import read_bytes, read_lines, reason_of, refuse_exhaustion

_LOG = logging.getLogger("frugal")
IGNORED = 255
"""The label of pixels that count nowhere."""
PADDING = 254
"""The label of pixels beyond the picture, which count nowhere either."""
MOST_CLASSES = PADDING - 1
"""So that in a mask of bytes the number of a class is neither of the two."""
_SAMPLED = 64
_LAYOUT = (
    "images/{split} must hold pictures, and annotations/{split} a PNG mask of the same name for "
    "each, as in ADE20K's scene parsing data (scenes have them if drawn with "
    "--segmentation-samples)"
)


class MaskMismatch(Damaged):
    """A mask that is not one of its picture, or not of the model's classes."""

    def __init__(self, sentence: str) -> None:
        super().__init__("label", sentence)
        self.sentence = sentence


@dataclass(frozen=True)
class MaskedFolder:
    """The pictures of one split, each with its mask."""

    images: Path
    annotations: Path
    names: StringTable
    """Paths of the pictures below their folder, in order."""

    def __len__(self) -> int:
        return len(self.names)

    def image_path(self, index: int) -> Path:
        """Where a picture lies."""
        return self.images / self.names[index]

    def mask_path(self, index: int) -> Path:
        """Where its mask lies."""
        return (self.annotations / self.names[index]).with_suffix(".png")

    def listing(self) -> str:
        """SHA-256 of the names, and of 64 of the pictures and masks, for processes to compare."""
        found = hashlib.sha256(self.names.blob.tobytes())
        for index in self._sample():
            for path in (self.image_path(index), self.mask_path(index)):
                with contextlib.suppress(OSError):  # told when it is read
                    found.update(read_bytes(path))
        return found.hexdigest()

    def _sample(self) -> list[int]:
        """Up to 64 places, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)).tolist()

    def read(self, index: int, num_classes: int) -> tuple[Image.Image, np.ndarray]:
        """A picture that is not decoded yet, and the (H, W) uint8 classes of its pixels.

        Classes count from 0; :data:`IGNORED` stands where the mask has 0, or 255.

        Raises:
            Damaged: if one of the two cannot be read, or they do not fit together.
        """
        try:
            encoded = read_bytes(self.image_path(index))
            encoded_mask = read_bytes(self.mask_path(index))
        except OSError as error:
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        image, mask = open_image(encoded), _decode_mask(encoded_mask)
        if fault := self._fault(index, image, mask, num_classes):
            raise MaskMismatch(fault)
        return image, np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1).astype(np.uint8)

    def _fault(
        self, index: int, image: Image.Image, mask: np.ndarray, num_classes: int
    ) -> str | None:
        """What keeps a mask from being that of its picture, as a sentence."""
        path = self.mask_path(index)
        if mask.ndim != 2:
            return (
                f"{path} is a picture in colors; a mask holds the number of a class in every "
                "pixel, as those of ADE20K's scene parsing data do"
            )
        if mask.shape != (image.height, image.width):
            return (
                f"{path} is {mask.shape[0]} pixels high and {mask.shape[1]} wide, but its picture "
                f"{self.image_path(index)} is {image.height} high and {image.width} wide; give "
                "every picture a mask of its own size"
            )
        largest = int(mask.max(where=mask != IGNORED, initial=0))
        if largest > num_classes:
            return (
                f"{path} holds the number {largest}, but a mask for {num_classes} classes "
                f"(model.num_classes) holds 0, which is ignored, to {num_classes}; correct one of "
                "them"
            )
        return None

    def check(self, num_classes: int) -> None:
        """Refuse masks that are no masks of these pictures, as far as some of them tell.

        Raises:
            InputError: if one has another size than its picture, or a class that the model has
                not.
        """
        for index in self._sample():
            try:
                self.read(index, num_classes)
            except MaskMismatch as mismatch:
                raise InputError(mismatch.sentence) from None
            except Damaged:
                continue  # counted when it is read


def _decode_mask(encoded: bytes) -> np.ndarray:
    """The numbers in a PNG file, those of colors in a palette too; (H, W) if it is a mask."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            return np.asarray(image).astype(np.int64)
    except Exception as error:  # noqa: BLE001 - the format raises errors of many kinds
        raise Damaged("image", f"the mask: {reason_of(error)}") from None


def open_masked_folder(folder: Path, split: str, extensions: tuple[str, ...]) -> MaskedFolder:
    """The pictures of a split of a data set in ADE20K's layout, or of a scenes folder.

    Raises:
        InputError: if it is laid out in another way, or a mask is missing.
    """
    root = data_set_root(folder)
    images, annotations = root / "images" / split, root / "annotations" / split
    missing = next((path for path in (images, annotations) if not path.is_dir()), None)
    if missing is not None:
        raise InputError(
            f"{folder} is not laid out as ADE20K, there is no folder {missing}; "
            + _LAYOUT.format(split=split)
        )
    passed_over = PassedOver()
    names = [path.relative_to(images) for path in image_files(images, extensions, passed_over)]
    if not names:
        raise InputError(
            f"{images} holds no picture ({', '.join(extensions)}); " + _LAYOUT.format(split=split)
        )
    found = image_files(annotations, ("png",), passed_over)
    masks = {path.relative_to(annotations) for path in found}
    for line in passed_over.lines():
        _LOG.warning("%s: %s", folder, line)
    without = [name for name in names if name.with_suffix(".png") not in masks]
    if without:
        raise InputError(
            f"{len(without)} of the {len(names)} pictures in {images} have no mask: there is no "
            f"{annotations / without[0].with_suffix('.png')}; copy what is missing, or remove the "
            "pictures"
        )
    return MaskedFolder(images, annotations, StringTable.of(str(name) for name in names))


def data_set_root(folder: Path) -> Path:
    """Where ``images`` and ``annotations`` lie: the folder, or a part of a scenes folder."""
    inside = folder / "segmentation"
    return inside if inside.is_dir() and not (folder / "images").is_dir() else folder


def class_names(folder: Path, num_classes: int) -> list[str]:
    """What the classes of a data set are called; ``class 1`` and so on where it does not say.

    Scenes say it in ``classnames.txt``, ADE20K in ``objectInfo150.txt``.

    Raises:
        InputError: if there are more or fewer than the model tells apart.
    """
    root = data_set_root(folder)
    listed = [root / "classnames.txt", root / "objectInfo150.txt"]
    found = next((path for path in listed if path.is_file()), None)
    if found is None:
        return [f"class {number}" for number in range(1, num_classes + 1)]
    lines = read_lines(found)
    if found.name == "objectInfo150.txt":
        lines = [line.split("\t")[-1] for line in lines[1:]]
    if len(lines) != num_classes:
        raise InputError(
            f"{found} names {len(lines)} classes, but the model tells apart model.num_classes = "
            f"{num_classes}; make them equal"
        )
    if "" in lines:
        raise InputError(f"{found} has no name for class {lines.index('') + 1}; write one per line")
    return [line.strip() for line in lines]
