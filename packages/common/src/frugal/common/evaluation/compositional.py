"""Language composition: does an image lie nearer to its caption than to one that was made false?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import as_bytes
from frugal.common.data.loader import Loader
from frugal.common.data.stored_images import GROUP
from frugal.common.data.transforms import CenterCrop
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.retrieval import embed
from frugal.common.evaluation.sugarcrepe import CATEGORIES, KINDS, read_contrasts
from frugal.common.evaluation.task import ImageEvaluation, Inputs
from frugal.common.files import read_bytes, reason_of
from frugal.common.models.bundle import ModelBundle


@dataclass(frozen=True, kw_only=True)
class Compositional(ImageEvaluation):
    """Telling an image's caption from one that was made false by replacing, swapping or adding.

    Reads SugarCrepe's seven JSON files (arXiv:2306.14610) or a scenes folder.
    """

    name: str = "compositional"
    """First part of the name of every number."""
    images: Path | None = None
    """Folder of images (COCO's val2017 for SugarCrepe); by default images/ or val2017/ beside the
    JSON files, or their own folder."""

    _part = "compositional"
    _scores = ("mean", *KINDS, *CATEGORIES)

    @override
    def folder(self) -> Path | None:
        """Where the JSON files are: ``data``, or the part of a scenes folder meant for this.

        Raises:
            InputError: if data or images are given and missing.
        """
        if self.data is not None and self.images is not None and not self.images.is_dir():
            raise InputError(
                f"the images of the evaluation {self.name!r} are not there: {self.images} is no "
                "folder; check the path"
            )
        return super().folder()

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``swap_obj`` and so on: the share of items whose true caption is strictly nearer.

        Also ``replace``, ``swap``, ``add`` and ``mean``, the means over their categories and over
        all seven, ``items``, ``images`` and ``swap_obj_items`` and so on.

        Raises:
            InputError: if the data cannot be used.
        """
        run, ranks = given.run, given.ranks
        data = open_contrasts(self, given.folder, given.bundle)
        embedder = Embedder.of(given.bundle, run, self)
        ranks.same_data(data, self.name)
        with embedder.measuring(ranks):
            choices = choose(
                embedder, data, batch_size=self.batch_size, workers=self.workers, ranks=ranks
            )
        identity = identify(data, ranks, run.device)
        identity.remark(self.name, run.log)
        _remark(self, data, choices, given)
        if given.show is not None:
            given.show(self.name, _picture(data, choices))
        if given.keep is not None:
            given.keep(_results(self, data, choices, identity.facts()))
        return choices.numbers()


class Contrasts(Dataset[dict[str, Any]]):
    """SugarCrepe's items with their images; an image that several items share is there once."""

    def __init__(
        self,
        folder: Path,
        images: Path | None = None,
        *,
        size: tuple[int, int],
        crop: CenterCrop | None = None,
    ) -> None:
        """Read and check the files; no image is read yet.

        Args:
            folder: holds ``replace_obj.json`` and so on.
            images: the folder of images; by default the one beside the files.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and center crop if not given.

        Raises:
            InputError: if a file cannot be used, or an image is missing.
        """
        self._folder, items = read_contrasts(folder, images)
        self._size = size
        self._crop = crop or CenterCrop()
        self.files = list(dict.fromkeys(item.file for item in items))
        place = {file: number for number, file in enumerate(self.files)}
        self.items = sorted(items, key=lambda item: place[item.file])
        """Those of the first image, then those of the second, and so on."""
        self.image_of_item = [place[item.file] for item in self.items]
        self.captions: list[list[str]] = [[] for _ in self.files]
        """Of every image, the true and the false caption of one item after the other."""
        self._contents = torch.zeros(len(self.files), 4, dtype=torch.int64)
        for number, item in zip(self.image_of_item, self.items, strict=True):
            self.captions[number] += [item.caption, item.negative_caption]

    def __len__(self) -> int:
        """Images."""
        return len(self.files)

    def __getitem__(self, places: Sequence[int]) -> dict[str, Any]:
        """Images (b, 3, H, W) and their places (b,); or a mistake, which loaders pass on whole."""
        images, contents = [], []
        for place in places:
            path = self._folder / self.files[place]
            try:
                encoded = read_bytes(path)
                images.append(self._crop.gray_levels(encoded, size=self._size))
            except (OSError, Damaged) as error:
                return {"mistake": f"{path} cannot be evaluated ({error}); repair or replace it"}
            contents.append(_sha256(encoded))
        return {
            "images": torch.from_numpy(np.stack(images)),
            "places": torch.tensor(places),
            "contents": torch.from_numpy(np.stack(contents)),
        }

    def contents(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """(N, 8) int64: SHA-256 of every image, and of its items.

        Of the images of this process, zeros elsewhere; those not handed out yet are read.

        Raises:
            InputError: if an image cannot be read.
        """
        for rows in Ranks(rank, world_size).turns(len(self), GROUP):
            for place in range(rows.start, rows.stop):
                if not self._contents[place].any():
                    self._contents[place] = torch.from_numpy(_sha256(self._encoded(place)))
        said: list[list[tuple[str, str, str]]] = [[] for _ in self.files]
        for number, item in zip(self.image_of_item, self.items, strict=True):
            said[number].append((item.category, item.caption, item.negative_caption))
        items = np.stack([_sha256(repr(own).encode("utf-8", "surrogatepass")) for own in said])
        return torch.cat([self._contents, torch.from_numpy(items)], dim=1) * (
            self._contents.any(1, keepdim=True)
        )

    def listing(self) -> str:
        """SHA-256 of the items and of 64 of the images, for processes to compare."""
        found = hashlib.sha256(repr((self.files, self.items)).encode("utf-8", "surrogatepass"))
        for place in np.unique(np.linspace(0, len(self) - 1, GROUP).astype(int)).tolist():
            found.update(self._encoded(place))
        return found.hexdigest()

    def _encoded(self, place: int) -> bytes:
        path = self._folder / self.files[place]
        try:
            return read_bytes(path)
        except OSError as error:
            raise InputError(
                f"{path} cannot be evaluated ({reason_of(error)}); repair or replace it"
            ) from None

    def images(self, places: Sequence[int]) -> Tensor:
        """(b, 3, H, W): the images at some places, as the model takes them.

        Raises:
            InputError: if an image is damaged.
        """
        return _checked(self[places])["images"]

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the images: every image comes once, on one process.

        Yields:
            images (b, 3, H, W) uint8, or float32 gray levels where the crop resizes with a kernel
            of TensorFlow; places among the images (b,) int64.

        Raises:
            InputError: if an image is damaged.
        """
        parts = [
            range(start, min(start + batch_size, rows.stop))
            for rows in Ranks(rank, world_size).turns(len(self), GROUP)
            for start in range(rows.start, rows.stop, batch_size)
        ]
        for fields in Loader(self, sampler=parts, workers=workers):
            self._contents[fields["places"]] = fields["contents"]
            yield fields["images"], fields["places"]


def _sha256(content: bytes) -> np.ndarray:
    """(4,) int64."""
    return np.frombuffer(bytearray(hashlib.sha256(content).digest()), np.int64)


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    if "mistake" in fields:
        raise InputError(fields["mistake"])
    return fields


@dataclass(frozen=True)
class CaptionChoices:
    """What the model said about every item, complete on every process."""

    categories: list[str]
    """Of every item."""
    cosines: Tensor
    """(M, 2) float32: of every image with its true and with its false caption."""
    num_images: int

    @property
    def right(self) -> Tensor:
        """(M,) bool: the true caption is strictly nearer; a tie is wrong, as in SugarCrepe."""
        return self.cosines[:, 0] > self.cosines[:, 1]

    @property
    def num_ties(self) -> int:
        """Items whose captions the model does not tell apart."""
        return int((self.cosines[:, 0] == self.cosines[:, 1]).sum())

    def numbers(self) -> dict[str, float | int]:
        """Fractions of right items, and what they are fractions of.

        The means of kinds, and of all, are over categories and not over items, whose numbers
        differ tenfold. They are left out where one of their categories is.
        """
        counts: dict[str, int] = {name: 0 for name in CATEGORIES if name in self.categories}
        found = dict(counts)
        for category, is_right in zip(self.categories, self.right.tolist(), strict=True):
            counts[category] += 1
            found[category] += is_right
        shares: dict[str, float] = {name: found[name] / counts[name] for name in counts}
        wholes = {kind: [f"{kind}_{part}" for part in parts] for kind, parts in KINDS.items()}
        wholes["mean"] = list(CATEGORIES)
        means = {
            name: fmean(shares[own] for own in parts)
            for name, parts in wholes.items()
            if shares.keys() >= set(parts)
        }
        items = {f"{name}_items": count for name, count in counts.items()}
        return shares | means | items | {"items": len(self.cosines), "images": self.num_images}


def choose(
    embedder: Embedder,
    data: Contrasts,
    *,
    batch_size: int,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> CaptionChoices:
    """Compare every image with its captions, whatever the number of processes and the batch size.

    Args:
        embedder: its model in evaluation mode, without gradients (see ``evaluating``).
        data: the items.
        batch_size: images read at a time.
        workers: processes that decode images.
        ranks: the processes that share the work; this one alone by default.
    """
    embedded = embed(embedder, data, batch_size=batch_size, workers=workers, ranks=ranks)
    images = embedded.images[embedded.image_of_text].double()  # (2 M, E)
    # rounded from float64, so that equal embeddings tie (see embed.similarity)
    cosines = (images * embedded.texts.double()).sum(1).float()
    categories = [item.category for item in data.items]
    return CaptionChoices(categories, cosines.view(-1, 2).cpu(), len(embedded.images))


def open_contrasts(task: Compositional, folder: Path, bundle: ModelBundle) -> Contrasts:
    """Open the data of a task; captions are read, images are not yet.

    Raises:
        InputError: if the data cannot be used.
    """
    size = bundle.image.height_width
    return Contrasts(folder, task.images, size=size, crop=task.crop)


def _results(
    task: Compositional, data: Contrasts, choices: CaptionChoices, facts: dict[str, Any]
) -> SampleResults:
    """Item by item, whether the true caption was nearer."""
    right = choices.right.to(torch.uint8)
    category = torch.tensor([CATEGORIES.index(name) for name in choices.categories])
    image = torch.tensor(data.image_of_item)
    numbers = choices.numbers()
    tables, measures = {}, {}
    wholes = {kind: [f"{kind}_{part}" for part in parts] for kind, parts in KINDS.items()}
    wholes |= {"mean": list(CATEGORIES)} | {name: [name] for name in CATEGORIES}
    for name, parts in wholes.items():
        if name not in numbers:
            continue
        own = torch.isin(category, torch.tensor([CATEGORIES.index(part) for part in parts]))
        tables[f"{name}_right"], tables[f"{name}_category"] = right[own], category[own]
        tables[f"{name}_image"] = image[own]
        measures[task.number_name(name)] = Measure(
            "mean_of_groups", f"{name}_right", groups=f"{name}_category", image=f"{name}_image"
        )
    facts = {
        **facts,
        "images": len(data),
        "items": len(data.items),
    }
    return SampleResults(facts, len(data), tables, measures)


def _remark(task: Compositional, data: Contrasts, choices: CaptionChoices, given: Inputs) -> None:
    """Log what the numbers rest on."""
    run = given.run
    run.log.info("%s: %s items with %s images", task.name, f"{len(data.items):,}", f"{len(data):,}")
    if lacking := [name for name in CATEGORIES if name not in choices.categories]:
        run.log.warning(
            "%s: %s has no %s; the means that need them are left out",
            task.name,
            given.folder,
            ", ".join(f"{name}.json" for name in lacking),
        )
    if choices.num_ties:
        run.log.warning(
            "%s: the model does not tell the captions of %s of the %s items apart, which counts "
            "as wrong; captions longer than its text length may be equal up to there",
            task.name,
            f"{choices.num_ties:,}",
            f"{len(data.items):,}",
        )


def _picture(data: Contrasts, choices: CaptionChoices) -> Picture:
    """Some images with the caption that the model prefers."""
    places = example_places(len(data.items))
    right = choices.right[places].tolist()
    said = [
        data.items[place].caption if is_right else data.items[place].negative_caption
        for place, is_right in zip(places, right, strict=True)
    ]
    pictures = as_bytes(data.images([data.image_of_item[place] for place in places]).numpy())
    return draw_predictions(pictures, said, right, text_lines=5)
