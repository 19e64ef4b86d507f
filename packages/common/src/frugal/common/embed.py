"""Embeddings of images and captions, stored shard by shard: ``python -m frugal.common.embed``.

``OUT/index.json``
    which model and which options they are of, and of every shard its name, samples, digest, file
    and how many images and captions were embedded;
``OUT/00000.safetensors``, one per shard, rows in the order of its samples
    ``image`` (S, V, E), or ``image_pooled`` (S, V, D): V views of every image; ``image_valid`` (S,)
    bool, False where an image could not be read, whose rows are 0; ``text`` (T, E), or
    ``text_pooled`` (T, D): all captions; ``text_sample`` (T,) int64: the sample that each is of.
    Where no image, or no caption, of a shard can be read, its rows are not there. The header says
    what a file is of.

Every shard is embedded by one process, alone: what is stored does not depend on how many there are.
What is there already is kept, so that the same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from frugal.common.checkpoint.init_from import init_from
from frugal.common.cli import as_flags, overridden, read_options, run_politely
from frugal.common.data.contents import below_common_folder, shard_digests
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.loader import Loader
from frugal.common.data.patterns import find_files, is_stream
from frugal.common.data.samples import Fields
from frugal.common.data.sources import Source, index_missing, open_source
from frugal.common.data.stored_vectors import (
    HEADER,
    INDEX,
    POOLED,
    POOLED_TEXT,
    PROJECTED,
    PROJECTED_TEXT,
    TEXT_SAMPLE,
    VALID,
    VERSION,
)
from frugal.common.data.stores.index import count_altered
from frugal.common.data.stream import ReaderCache
from frugal.common.data.tokenizers import padded
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.distributed import barrier, gather_objects, leave_process_group
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import (
    TEXTS_AT_ONCE,
    Embedder,
    autocast,
    evaluating,
    product_dtype,
)
from frugal.common.evaluation.provenance import (
    config_digest,
    tower_digest,
    weights_digest,
)
from frugal.common.files import cannot_write, read_json_object, reason_of, write_json
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoder
from frugal.common.models.image_encoder import image_encoder
from frugal.common.programs import recipe_named
from frugal.common.randomness import sample_generator
from frugal.common.ranges import Count, CountOrZero, Seed, check_ranges
from frugal.common.recipe_json import to_json
from frugal.common.run import Run, join, open_run
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import bundle_of

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
Output = Literal["projected", "pooled", "both"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """In the place of --checkpoint: the model that a run is to start from.

    Its towers may be of several libraries. What nothing starts from, as projections, is random.
    """

    recipe: str | None = None
    """PROGRAM:NAME, such as cit:demo-align; or a recipe.json."""
    changes: tuple[str, ...] = ()
    """What the run is to do differently, such as model.text.name=FOLDER."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Embed the images and captions of a data set; under torchrun, on several processes."""

    checkpoint: Path | None = None
    """The model: whatever frugal.common.evaluate takes."""
    start: Start = field(default_factory=Start)
    model: str | None = None
    """Of a file of weights: open_clip's or timm's name of the model, or openai."""
    weights_key: str | None = None
    """Of a file that holds several sets of weights: the keys that lead to the one to take."""
    data: tuple[str, ...]
    """Shards, folders or lists, as data.train takes them."""
    out: Path
    """Folder to write; one that holds embeddings of the same model and data is completed."""
    images: bool = True
    """Embed images."""
    texts: bool = False
    """Embed captions, all that a sample has."""
    output: Output = "projected"
    """Projected, unit vectors in the space that images and captions share (of an image tower alone
    what it pools, scaled to length 1); pooled, what each tower hands to its projection, as it is;
    or both."""
    views: Count = 1
    """Views of every image: one is the crop that the model is evaluated with, several are random
    ones, drawn as --augmentation says."""
    augmentation: RandomResizedCrop = field(default_factory=RandomResizedCrop)
    """How several views are cut."""
    seed: Seed = 0
    """Of several views."""
    dtype: Literal["float16", "float32"] = "float16"
    """What is stored."""
    fields: Fields = field(default_factory=Fields)
    batch_size: Count = 256
    """Samples at a time."""
    workers: CountOrZero = 2
    """Loader processes, per process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the matrix products on CUDA; by default as the recipe trains, or bfloat16."""


@dataclass(frozen=True)
class _Job:
    """A shard to embed."""

    number: int
    """Among all shards."""
    name: str
    samples: int
    digest: str
    stamp: str
    """Of the shard as it lies on the disk; empty where nobody looks."""
    source: Path
    path: Path
    """Where its embeddings go."""


class _Samples(Dataset[dict[str, Any]]):
    """Pixels and captions of samples by (shard, first, end); what is damaged is told, not left."""

    def __init__(
        self,
        source: Source,
        options: Options,
        *,
        size: tuple[int, int],
        crop: CenterCrop,
        firsts: Sequence[int],
    ) -> None:
        self._readers = ReaderCache(source.shards, options.fields)
        self._options = options
        self._size = size
        self._crop = crop
        self._firsts = firsts
        """Number of the first sample of every shard in the whole data set."""

    def __getitem__(self, item: tuple[int, int, int]) -> dict[str, Any]:
        """``pixels`` (b V, 3, H, W) of the b images that can be read, in order, and the rest."""
        shard, start, stop = item
        reader = self._readers.reader(shard)
        pixels: list[np.ndarray] = []
        valid = np.zeros(stop - start, np.bool_)
        captions: list[tuple[int, str]] = []
        damage = Counter[str]()
        for index in range(start, stop):
            try:
                if not self._options.images:
                    captions += [(index, text) for text in reader.captions(index) if text]
                    continue
                raw = reader.read(index)
                views = self._views(raw.image, self._firsts[shard] + index)
            except Damaged as damaged:
                damage[damaged.kind] += 1
                continue
            pixels += views
            valid[index - start] = True
            if self._options.texts:
                captions += [(index, text) for text in raw.captions if text]
        found: dict[str, Any] = {
            "item": item, "valid": valid, "captions": captions, "damage": dict(damage),
        }  # fmt: skip
        if pixels:
            found["pixels"] = torch.from_numpy(np.stack(pixels))
        return found

    def _views(self, image: bytes, number: int) -> list[np.ndarray]:
        if self._options.views == 1:
            return [self._crop.gray_levels(image, size=self._size)]
        return [
            self._options.augmentation.decode(
                image,
                size=self._size,
                generator=sample_generator(self._options.seed, f"view {view}", number),
            )
            for view in range(self._options.views)
        ]


class _Towers:
    """A model that is asked for what is to be stored."""

    def __init__(
        self, bundle: ModelBundle, run: Run, options: Options, towers: Mapping[str, nn.Module]
    ) -> None:
        """Take a model, and those of its towers of which what they pool is to be stored."""
        self._embedder = Embedder.of(bundle, run)
        self._model: Any = bundle.model
        self._towers: Any = {name: each.to(run.device).eval() for name, each in towers.items()}
        self._projects = options.output != "pooled"
        self._device = torch.device(run.device)
        self._dtype = _DTYPES[options.dtype]
        self.cut = 0
        """Captions that had more tokens than the model sees; of equal ones at a time one."""

    @property
    def context_length(self) -> int:
        """Tokens of a caption that the model sees."""
        return self._embedder.context_length

    def images(self, pixels: Tensor, views: int) -> dict[str, Tensor]:
        """(b V, 3, H, W) pixels to (b, V, E) on the CPU, by the name that they are stored under."""
        if "image" in self._towers:
            found = self._pooled(pixels)
        else:
            found = {PROJECTED: self._embedder.images(pixels)}
        return {name: self._stored(each).unflatten(0, (-1, views)) for name, each in found.items()}

    def _pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the tower pools, and what becomes of it: the tower computes once for both."""
        pixels = self._embedder.normalized(pixels.to(self._device))
        with autocast(self._embedder.precision, self._device):
            pooled = self._towers["image"].forward_pooled(pixels).float()
            found = {POOLED: pooled}
            if self._projects:
                has_space = isinstance(self._model, DualEncoder)
                projected = self._model.project_image(pooled) if has_space else pooled
                found[PROJECTED] = F.normalize(projected.float(), dim=-1)
        return found

    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """(T, E) on the CPU, by the name that they are stored under."""
        if "text" in self._towers:
            found = self._pooled_texts(captions)
        else:
            found = {PROJECTED_TEXT: self._embedder.texts(captions)}
        self.cut += len(self._embedder.cut)
        self._embedder.cut.clear()  # of all captions of a large set it would hold too many
        return {name: self._stored(rows) for name, rows in found.items()}

    def _pooled_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        parts: list[Tensor] = []
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            some = captions[start : start + TEXTS_AT_ONCE]
            ids = [self._embedder.token_ids(text) for text in some]
            token_ids, lengths = padded(ids, self._embedder.tokenizer)
            with autocast(self._embedder.precision, self._device):
                pooled = self._towers["text"].forward_pooled(
                    token_ids.to(self._device), lengths.to(self._device)
                )
            parts.append(pooled.float())
        found = {POOLED_TEXT: torch.cat(parts)}
        if self._projects:
            with autocast(self._embedder.precision, self._device):
                projected = self._model.project_text(found[POOLED_TEXT])
            found[PROJECTED_TEXT] = F.normalize(projected.float(), dim=-1)
        return found

    def _stored(self, rows: Tensor) -> Tensor:
        """As they are stored; raises ``InputError`` where that holds no embedding."""
        stored = rows.to(self._dtype).cpu()
        usable = stored.isfinite().all(1) & (stored != 0).any(1)
        if not usable.all():
            raise InputError(
                f"{int((~usable).sum())} of {len(stored)} embeddings are not finite as "
                f"{str(self._dtype).removeprefix('torch.')}, or are zero; check the weights, or "
                "take --dtype float32"
            )
        return stored


def embed(options: Options) -> None:
    """Embed what is not stored yet, and write the index; every process of a group calls this.

    Raises:
        InputError: if model, data or folder cannot be used.
    """
    check_ranges(options)
    _check(options)
    run = open_run(options.out, options.device)
    bundle = _model_of(options, run)
    if options.texts and bundle.text is None:
        raise InputError(f"{bundle.source.path} holds a model that reads no captions; leave out "
                         "--texts")  # fmt: skip
    if options.precision is not None:
        bundle = replace(bundle, precision=options.precision)
    bundle.model.to(run.device)
    join(run)
    source = _open(options, run)
    pooling = _pooling_towers(options, bundle)
    about = _about(options, bundle, pooling, product_dtype(bundle.precision, run.device))
    jobs = _jobs(options, source)
    _begin(options.out, about, jobs, run)
    # the first process looks: a slower one would find what faster ones have stored by then
    stored = [_is_stored(job, about) for job in jobs] if run.is_main else None
    stored = gather_objects(stored)[0]
    missing = [job for job, is_there in zip(jobs, stored, strict=True) if not is_there]
    if run.is_main:
        run.log.info(
            "%d of %d shards are to be embedded, %s samples",
            len(missing), len(jobs), f"{sum(job.samples for job in missing):,}",
        )  # fmt: skip
    mine = missing[run.rank :: run.world_size]
    firsts = np.cumsum([0, *source.counts]).tolist()
    samples = _Samples(
        source, options, size=bundle.image.height_width, crop=bundle.transform, firsts=firsts
    )
    towers = _Towers(bundle, run, options, pooling)
    mistake, remarks = "", list[str]()
    try:
        with evaluating(bundle.model):
            _embed_shards(mine, samples, towers, options, about, run, remarks)
    except InputError as error:
        mistake = str(error)
    # of whichever process: the first one speaks for all, and the others would wait for it
    told = gather_objects((mistake, remarks, towers.cut))
    if mistakes := [each for each, _, _ in told if each]:
        raise InputError(mistakes[0])
    if run.is_main:
        for line in (line for _, lines, _ in told for line in lines):
            run.log.warning("%s", line)
        if cut := sum(count for _, _, count in told):
            run.log.warning(
                "%s captions have more than the %d tokens of the model and were cut",
                f"{cut:,}", towers.context_length,
            )  # fmt: skip
        _finish(options.out, about, jobs, run)
    barrier()
    leave_process_group()


def _check(options: Options) -> None:
    if not options.images and not options.texts:
        raise InputError("--no-images without --texts leaves nothing to embed; add --texts")
    if not options.images and options.views > 1:
        raise InputError("--views are of images; leave out --no-images")

    named = (options.checkpoint, options.start.recipe)
    if named.count(None) != 1:
        raise InputError(
            "give the model with --checkpoint, or with --start.recipe the run that is to start "
            f"from it; {'neither is' if None in named else 'both are'} there"
        )
    of_start = options.start.changes and options.start.recipe is None
    of_checkpoint = (options.model or options.weights_key) and options.checkpoint is None
    if of_start or of_checkpoint:
        words = ("--start.changes", "--start.recipe")
        if of_checkpoint:
            words = ("--model" if options.model else "--weights-key", "--checkpoint")
        raise InputError(f"{words[0]} goes with {words[1]}, which is not given; leave it out")
    if options.output != "pooled" and options.start.recipe is not None:
        raise InputError(
            "the projections of a run that is yet to begin are random; take --output pooled"
        )


def _model_of(options: Options, run: Run) -> ModelBundle:
    """The model that is named, or that a run is to start from."""
    if options.checkpoint is not None:
        return load_model(options.checkpoint, name=options.model, weights_key=options.weights_key)
    assert options.start.recipe is not None
    recipe, _ = recipe_named(options.start.recipe)
    changes = as_flags(options.start.changes, "--start.changes")
    called = f"python -m frugal.common.embed --start.recipe {options.start.recipe} --start.changes"
    recipe = overridden(recipe, changes, program=called)
    objective = recipe.objective.build(recipe)
    init_from(objective, recipe.run.start_from, interpolate=recipe.run.interpolate, log=run.log)
    bundle = bundle_of(objective.model, recipe)
    return replace(bundle, source=replace(bundle.source, path=Path(options.start.recipe)))


def _open(options: Options, run: Run) -> Source:
    """The shards of all entries, one after the other."""
    if stream := next((pattern for pattern in options.data if is_stream(pattern)), None):
        raise InputError(f"{stream} can only be read from its beginning on; copy its shards here")
    passed_over = PassedOver()
    files = [
        file
        for pattern in options.data
        for file in find_files(pattern, fields=options.fields, passed_over=passed_over)
    ]
    if twice := [file for file, count in Counter(files).items() if count > 1]:
        raise InputError(f"--data names {twice[0]} more than once; name every shard once")
    index_missing(files, run.log)
    source = open_source(" ".join(options.data), options.fields, files)
    if run.is_main:
        for line in passed_over.lines():
            run.log.warning("%s", line)
        source.tell(run.log)
    return source


def _pooling_towers(options: Options, bundle: ModelBundle) -> dict[str, nn.Module]:
    """What pools images and captions, of those of which that is to be stored.

    Raises:
        InputError: where no tower of this library does.
    """
    if options.output == "projected":
        return {}
    towers: dict[str, nn.Module] = {}
    model: Any = bundle.model
    is_dual = isinstance(model, DualEncoder)
    if options.images:
        towers["image"] = model.image if is_dual else image_encoder(bundle).build(needs_norm=False)
    if options.texts:
        if not is_dual:
            raise InputError(
                f"--output {options.output} needs a text tower that pools captions, which the "
                f"{type(model).__name__} of {bundle.source.path} does not have; take --output "
                "projected"
            )
        towers["text"] = model.text
    return towers


def _about(
    options: Options, bundle: ModelBundle, towers: Mapping[str, nn.Module], products: torch.dtype
) -> dict[str, Any]:
    """What embeddings depend on beside the samples."""
    told: dict[str, Any] = {
        "version": VERSION,
        "model": {"weights": weights_digest(bundle.model), "config": config_digest(bundle)},
        "tower": tower_digest(towers["image"], bundle.image) if "image" in towers else "",
        "dtype": options.dtype,
        "products": str(products).removeprefix("torch."),
        "images": options.images,
        "texts": options.texts,
        "fields": to_json(options.fields),
    }
    if options.images:
        told |= {"output": options.output, "views": options.views}
        cut = options.augmentation if options.views > 1 else bundle.transform
        told |= {"crop": to_json(cut), "seed": options.seed if options.views > 1 else None}
    if "text" in towers:
        told |= {"text_output": options.output, "text_tower": tower_digest(towers["text"])}
    return told


def _jobs(options: Options, source: Source) -> list[_Job]:
    names = below_common_folder([shard.name for shard in source.shards])
    digits = max(5, len(str(len(names))))
    parts = zip(names, source.shards, shard_digests(source), source.stamps, strict=True)
    return [
        _Job(
            number, name, shard.num_samples, digest, stamp,
            Path(shard.name), options.out / f"{number:0{digits}d}.safetensors",
        )
        for number, (name, shard, digest, stamp) in enumerate(parts)
    ]  # fmt: skip


def _begin(out: Path, about: dict[str, Any], jobs: Sequence[_Job], run: Run) -> None:
    """Refuse a folder that holds something else, then say what will be in it."""
    mistake = ""
    if run.is_main:
        try:
            _refuse_others(out, about, jobs)
            if not (out / INDEX).exists():
                out.mkdir(parents=True, exist_ok=True)
                write_json(out / INDEX, _index(about, jobs, []))
        except InputError as error:
            mistake = str(error)
        except OSError as error:
            mistake = str(cannot_write(out, error))
    if mistake := gather_objects(mistake)[0]:
        raise InputError(mistake)


def _refuse_others(out: Path, about: dict[str, Any], jobs: Sequence[_Job]) -> None:
    if not (out / INDEX).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} holds something else than embeddings; choose another --out")
        return
    found = read_json_object(out / INDEX)
    if not isinstance(found.get("about"), dict) or not isinstance(found.get("shards"), list):
        raise InputError(f"{out / INDEX} is not of embeddings; choose another --out")
    if found["about"].get("version") != VERSION:
        raise InputError(f"{out} holds embeddings that another version wrote; choose another --out")
    for name in sorted(about.keys() | found["about"].keys()):
        before, now = found["about"].get(name), about.get(name)
        if before != now:
            what = "another model" if name == "model" else f"{name} {before!r}, not {now!r}"
            raise InputError(f"{out} holds embeddings of {what}; choose another --out")
    shards = [tuple(map(each.get, ("name", "samples", "digest"))) for each in found["shards"]]
    if shards != [(job.name, job.samples, job.digest) for job in jobs]:
        raise InputError(
            f"{out} holds embeddings of other data ({len(shards)} shards; now there are "
            f"{len(jobs)}, or one was altered); choose another --out"
        )
    for job, before in zip(jobs, found["shards"], strict=True):
        if job.stamp == before.get("stamp") or not job.stamp:
            continue
        if altered := count_altered(job.source):  # touched or copied, perhaps with other bytes
            raise InputError(
                f"{out} holds embeddings of other data: {job.name} has {altered} altered samples; "
                "run `python -m frugal.common.shards index --rebuild` on it and choose another "
                "--out"
            )


def _index(
    about: dict[str, Any], jobs: Sequence[_Job], counts: Sequence[dict[str, int]]
) -> dict[str, Any]:
    """What ``index.json`` holds; without counts while embeddings are being made."""
    shards: list[dict[str, Any]] = [
        {
            "name": job.name,
            "samples": job.samples,
            "digest": job.digest,
            "stamp": job.stamp,
            "file": job.path.name,
        }
        for job in jobs
    ]
    for shard, found in zip(shards, counts, strict=False):
        shard |= found
    return {"complete": bool(counts), "about": about, "shards": shards}


def _header(job: _Job, about: dict[str, Any]) -> dict[str, str]:
    """What stands in the file of a shard: one entry, as several have no order."""
    told = {"about": about, "shard": [job.name, job.samples, job.digest]}
    return {HEADER: json.dumps(told, sort_keys=True)}


def _is_stored(job: _Job, about: dict[str, Any]) -> bool:
    """Whether the embeddings of a shard are there, whole."""
    try:
        with safe_open(job.path, framework="pt") as file:
            return file.metadata() == _header(job, about)
    except (OSError, SafetensorError):
        return False


def _embed_shards(
    jobs: Sequence[_Job],
    samples: _Samples,
    towers: _Towers,
    options: Options,
    about: dict[str, Any],
    run: Run,
    remarks: list[str],
) -> None:
    """Embed shards one after the other, each file written when it is whole.

    ``remarks`` takes up what is to be told of shards, a line each.
    """
    items = [
        (job.number, start, min(start + options.batch_size, job.samples))
        for job in jobs
        for start in range(0, max(job.samples, 1), options.batch_size)
    ]
    rows = iter(Loader(samples, sampler=items, workers=options.workers))
    bar = tqdm(
        total=sum(job.samples for job in jobs), unit="sample", unit_scale=True,
        desc=f"process {run.rank}" if run.world_size > 1 else None,
        disable=None if run.is_main else True,
    )  # fmt: skip
    with bar:
        for job in jobs:
            parts: list[dict[str, Tensor]] = []
            damage = Counter[str]()
            for found in _of_job(job, rows):
                parts.append(_embedded(found, towers, options))
                damage.update(found["damage"])
                bar.update(found["item"][2] - found["item"][1])
            _write(job, parts, about)
            if damage:
                told = ", ".join(f"{count} {kind}" for kind, count in sorted(damage.items()))
                remarks.append(f"{job.name}: {told}; these samples are marked")


def _of_job(job: _Job, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the loader gives of one shard."""
    while True:
        found = next(rows)
        assert found["item"][0] == job.number
        yield found
        if found["item"][2] >= job.samples:
            return


def _embedded(found: dict[str, Any], towers: _Towers, options: Options) -> dict[str, Tensor]:
    """The tensors of some samples; rows of images that could not be read are zero."""
    tensors: dict[str, Tensor] = {}
    if options.images:
        valid = torch.from_numpy(found["valid"])
        tensors[VALID] = valid
        if "pixels" in found:
            for name, rows in towers.images(found["pixels"], options.views).items():
                whole = rows.new_zeros(len(valid), *rows.shape[1:])
                whole[valid] = rows
                tensors[name] = whole
    if options.texts:
        places = [place for place, _ in found["captions"]]
        tensors[TEXT_SAMPLE] = torch.tensor(places, dtype=torch.int64)
        if places:
            tensors |= towers.texts([text for _, text in found["captions"]])
    return tensors


def _write(job: _Job, parts: Sequence[dict[str, Tensor]], about: dict[str, Any]) -> None:
    """Write the file of a shard; raises ``InputError`` if it cannot be written."""
    names = {name: each[name].shape[1:] for each in parts for name in each}
    dtypes = {name: each[name].dtype for each in parts for name in each}
    tensors = {}
    for name, shape in names.items():
        counted = TEXT_SAMPLE if name in (PROJECTED_TEXT, POOLED_TEXT) else VALID
        tensors[name] = torch.cat(
            [
                each[name] if name in each
                else torch.zeros(len(each[counted]), *shape, dtype=dtypes[name])
                for each in parts
            ]
        )  # fmt: skip
    aside = job.path.with_name(f".{job.path.name}.writing")
    try:
        save_file(tensors, aside, metadata=_header(job, about))
        aside.replace(job.path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(
            f"{job.path} cannot be written ({reason_of(error)}); make room, and give the same "
            "command again"
        ) from None


def _finish(out: Path, about: dict[str, Any], jobs: Sequence[_Job], run: Run) -> None:
    """Count what was stored, and write the whole index."""
    counts = []
    for job in jobs:
        with safe_open(job.path, framework="pt") as file:
            found = {}
            if VALID in file.keys():  # noqa: SIM118 - it is no mapping
                found["images"] = int(file.get_tensor(VALID).sum())
            if TEXT_SAMPLE in file.keys():  # noqa: SIM118
                found["texts"] = file.get_slice(TEXT_SAMPLE).get_shape()[0]
        counts.append(found)
    write_json(out / INDEX, _index(about, jobs, counts))
    total = Counter[str]()
    for found in counts:
        total.update(found)
    told = " and ".join(f"{count:,} {name}" for name, count in total.items())
    samples = sum(job.samples for job in jobs)
    run.log.info("%s of %s samples are in %s", told, f"{samples:,}", out)


def main() -> None:
    """The body of ``python -m frugal.common.embed``."""
    run_politely(lambda: embed(read_options(Options, "python -m frugal.common.embed")))


if __name__ == "__main__":
    main()
