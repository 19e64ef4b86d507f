"""Pairs/s of a curation against a loader that decodes every image; memory by the size of the pool.

    python benchmarks/cit_curation.py

Scenes are enlarged to the shorter side of LAION's photos and packed into shards. Then a curation
reads, tokenizes, embeds and compares all captions of these shards with the demo's text tower, and
the loader of ordinary training reads, decodes, crops and tokenizes all pairs of them; in turns,
each in one process on one core. Memory is that of a curation of a small pool and of one of ten
times as many pairs, each in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from measuring import measured, memory_in_mib, place, write
from PIL import Image
from small_runs import scenes

from frugal.common.data.writing import NewSample, new_folder, write_tars

LEAST_RATIO = 20.0
MOST_GROWTH = 1.1
"""Peak memory on ten times the pairs."""
SIZE = 224
"""Side of the crops that the loader makes, in pixels."""


def main() -> None:
    """Measure, or do what a measuring process is told to."""
    options = read_options()
    if options.measure == "curate":
        print(json.dumps(curate(options.pool, options.device)))
        return
    if options.measure == "decode":
        print(json.dumps(decode(options.pool)))
        return
    photos = enlarged(options.out.parent / "cit_curation", options.pairs, options.shorter_side)
    rates: dict[str, float] = {"curate": 0.0, "decode": 0.0}
    for _ in range(options.repeats):
        for name in rates:
            rate = measure(name, photos, options)["pairs_per_second"]
            rates[name] = max(rates[name], rate)
    ratio = rates["curate"] / rates["decode"]
    print(
        f"{options.pairs:,} pairs of {options.shorter_side} px: curation {rates['curate']:,.0f} "
        f"pairs/s, decoding loader {rates['decode']:,.0f}, ratio {ratio:.1f} (at least "
        f"{LEAST_RATIO:.0f})"
    )
    memory = [measure("curate", pool, options) for pool in pools(options)]
    growth = memory[1]["peak_mib"] / memory[0]["peak_mib"]
    for row in memory:
        print(
            f"pool of {row['pool']:,} pairs, all scanned: peak {row['peak_mib']:,.0f} MiB, "
            f"{row['pairs_per_second']:,.0f} pairs/s"
        )
    print(f"growth of the peak {growth:.2f} (at most {MOST_GROWTH})")
    report = {
        "pairs": options.pairs, "shorter_side": options.shorter_side, "size": SIZE,
        "rates": rates, "ratio": ratio, "least_ratio": LEAST_RATIO,
        "memory": memory, "growth": growth, "most_growth": MOST_GROWTH,
        "device": options.device, "measured_on": place(options.device),
    }  # fmt: skip
    write(options.out, report)
    if ratio < LEAST_RATIO or growth > MOST_GROWTH:
        raise SystemExit("a limit is missed")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=4_000, help="of the comparison of speed")
    parser.add_argument("--shorter-side", type=int, default=480, help="of the images, in pixels")
    parser.add_argument("--pool", type=int, default=10_000, help="pairs; the other has ten times")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--device", default="cpu", help="where captions are embedded")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cit_curation.json"))
    parser.add_argument("--measure", choices=("curate", "decode"), help=argparse.SUPPRESS)
    found, rest = parser.parse_known_args()
    if found.measure:
        found.pool = Path(rest[0])
    elif rest:
        parser.error(f"unknown: {rest[0]}")
    return found


def measure(name: str, pool: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds, on one core."""
    command = [sys.executable, __file__, "--measure", name, "--device", options.device, str(pool)]
    # oneDNN would keep kernels for the last 1,024 shapes it has seen, some 200 MiB of them
    return measured(command, {"OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4"})


def enlarged(folder: Path, pairs: int, shorter_side: int) -> Path:
    """Scenes with images as large as photos; what an earlier call left is used again."""
    drawn = scenes(folder / f"scenes-{pairs}", train_samples=pairs, image_size=64)
    out = folder / f"photos-{pairs}-{shorter_side}"
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)
        new_folder(out, samples_per_shard=1_000)
        write_tars(out, larger(drawn / "train", shorter_side), samples_per_shard=1_000)
        (out / "done").touch()
    return out


def larger(folder: Path, shorter_side: int) -> Iterator[NewSample]:
    """The samples of some shards with larger images."""
    from frugal.common.data.patterns import find_files
    from frugal.common.data.samples import Fields
    from frugal.common.data.sources import build_index, open_shard

    for path in find_files(str(folder)):
        build_index(path)
        shard = open_shard(path, Fields())[0]
        reader = shard.open(Fields())
        for number in range(shard.num_samples):
            raw = reader.read(number)
            image = Image.open(io.BytesIO(raw.image)).resize((shorter_side * 4 // 3, shorter_side))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95)
            about = {"caption": raw.captions[0]}
            yield NewSample(
                image=buffer.getvalue(), extension="jpg", about=about, text=raw.captions[0]
            )
        reader.close()


def pools(options: argparse.Namespace) -> Iterator[Path]:
    """A pool of small images, and one of ten times its shards."""
    folder = options.out.parent / "cit_curation"
    drawn = scenes(folder / f"pool-{options.pool}", train_samples=options.pool, image_size=16)
    yield drawn / "train"
    ten = folder / f"pool-{options.pool}-times-10"
    ten.mkdir(exist_ok=True)
    for path in sorted((drawn / "train").glob("*.tar")):
        for copy in range(10):
            target = ten / f"{copy}-{path.name}"
            if not target.exists():
                shutil.copyfile(path, target)
    yield ten


def the_recipe(pool: Path) -> Any:
    """CiT's demo on a pool, for images of 224 pixels."""
    from frugal.cit.metadata import Metadata
    from frugal.cit.recipes import demo

    recipe: Any = demo()
    model = replace(recipe.model, image=replace(recipe.model.image, image_size=SIZE))
    metadata = Metadata(sources=("cifar100",))
    data = replace(recipe.data, train=(str(pool),), metadata=metadata, period=1)
    return replace(recipe, model=model, data=data)


def this_process(device: str) -> Any:
    """A run without a folder."""
    import torch

    from frugal.common.run import Run

    torch.set_num_threads(1)
    log = logging.getLogger("benchmark")
    return Run(Path("unused"), 0, 1, 0, torch.device(device), log)


def curate(pool_folder: Path, device: str) -> dict[str, Any]:
    """Scan a pool once."""
    import torch

    from frugal.cit.curation import Curator, gather_scores
    from frugal.cit.features import TextFeatures
    from frugal.cit.pool import open_pool

    recipe, run = the_recipe(pool_folder), this_process(device)
    pool = open_pool(
        recipe.data,
        recipe,
        run,
        needed=recipe.batch_size,
        scan=recipe.data.scan,
        tags=recipe.data.tag_places,
    )
    # nothing passes: all is scanned, and what is nearest fills up
    data = replace(recipe.data, threshold=1.0, min_ratio=None, when_short="best")
    tower = recipe.model.build().text.to(run.device)
    length = recipe.model.text.length
    features = TextFeatures(
        tower, pool.transform.tokenizer, length=length, device=run.device, dtype=torch.float32
    )
    gather = partial(gather_scores, device=run.device)
    options = {"needed": recipe.batch_size, "features": features, "gather": gather}
    for limit in (data.scan, pool.samples):  # the first chooses kernels
        limited = replace(data, max_scanned=limit)
        curator = Curator(limited, limited.rule, pool, data.metadata.classes(), run, first_unit=0)
        found = curator.curate(0, 0, **options)
    return {
        "pool": pool.samples,
        "pairs_per_second": found.facts.scanned / found.seconds,
        "peak_mib": memory_in_mib("cpu", peak=True),
    }


def decode(folder: Path) -> dict[str, Any]:
    """Load all pairs of a pool as training does."""
    from frugal.common.data.config import PairData

    recipe, run = the_recipe(folder), this_process("cpu")
    data = PairData(
        train=(str(folder),),
        tokenizer=recipe.data.tokenizer,
        augmentation=recipe.data.augmentation,
        workers=0,
    )
    stream = data.build(recipe, run, first_sample=0, state={}, engine=None)
    batches = iter(stream)
    next(batches)
    steps = max(stream.epoch_samples // recipe.batch_size - 1, 1)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = time.perf_counter() - start
    return {"pairs_per_second": steps * recipe.batch_size / seconds}


if __name__ == "__main__":
    main()
