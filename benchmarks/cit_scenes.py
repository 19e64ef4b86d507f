"""CiT on a pool of scenes of which four in five are irrelevant, against the raw pool and an oracle.

    python benchmarks/cit_scenes.py --seeds 3 --updates 400

For every seed the method's demo is trained three times for as many updates: on what it chooses
itself, on the pool as it comes, and on the relevant pairs of the pool alone, which an oracle knows.
Means and standard deviations over the seeds of the zero-shot accuracy and of the share of relevant
pairs in what was trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from small_runs import finish, outcome, report_seeds

from frugal.common.comparison.running import lasting
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import Fields
from frugal.common.data.sources import build_index, open_shard
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.writing import NewSample, new_folder, write_tars

MODULE = "frugal.cit.train"
ALL = ("--data.threshold=-1", "--data.min-ratio", "None")
"""Everything is kept: the pairs come in the order of the pool."""
Numbers = dict[str, float]


def main() -> None:
    """Train everything, or what is missing of it, and write table, JSON and page."""
    options = read_options()
    pool = draw(options)
    relevant = mark_relevant(pool)
    oracle = pick_relevant(pool, relevant, options.out / f"oracle-{options.pairs}")
    settings = {
        "curated": (pool / "train", ()),
        "raw pool": (pool / "train", ALL),
        "oracle": (oracle, ALL),
    }
    outcomes: dict[str, list[Numbers]] = {name: [] for name in settings}
    for seed in range(options.seeds):
        for name, (data, words) in settings.items():
            run = train(options, name, data, words, pool, seed)
            numbers = measured_numbers(run, relevant if name != "oracle" else None)
            outcomes[name].append(numbers)
            print(
                f"seed {seed}, {name}: top-1 {numbers['zero_shot_top1']:.1%}, "
                f"{numbers['relevant']:.1%} relevant",
                flush=True,
            )
    report(options, outcomes)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=40_000, help="of the pool")
    parser.add_argument("--irrelevant", type=float, default=0.8, help="share of the pool")
    parser.add_argument("--updates", type=int, default=400, help="of every run")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--period", type=int, default=20, help="updates between two curations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/cit_scenes"))
    return parser.parse_args()


def draw(options: argparse.Namespace) -> Path:
    """The pool and its evaluations, drawn if they are not there yet."""
    from frugal.common.scenes.settings import Settings
    from frugal.common.scenes.writing import write as write_scenes

    folder = options.out / f"pool-{options.pairs}"
    settings = Settings(
        out=folder, train_samples=options.pairs, image_size=40, irrelevant=options.irrelevant
    )
    settings.check()
    print(write_scenes(settings))
    return folder


def mark_relevant(pool: Path) -> dict[tuple[str, int], bool]:
    """Which samples of a pool are relevant, by shard and number; their JSON says it."""
    found = {}
    for path in find_files(str(pool / "train")):
        build_index(path)
        reader = TarReader(path, Fields())
        for number in range(reader.index.num_samples):
            about = json.loads(reader.content(reader.members(number)["json"]))
            found[str(path), number] = about["relevant"]
        reader.close()
    return found


def pick_relevant(pool: Path, relevant: dict[tuple[str, int], bool], out: Path) -> Path:
    """The relevant pairs of a pool as shards of their own."""

    def samples() -> Iterator[NewSample]:
        for path in find_files(str(pool / "train")):
            reader = open_shard(path, Fields())[0].open(Fields())
            for number in (n for (shard, n), is_wanted in relevant.items() if shard == str(path)):
                if relevant[str(path), number]:
                    raw = reader.read(number)
                    about = {"caption": raw.captions[0]}
                    yield NewSample(
                        image=raw.image, extension="jpg", about=about, text=raw.captions[0]
                    )
            reader.close()

    if not out.exists():
        new_folder(out, samples_per_shard=1_000)
        write_tars(out, samples(), samples_per_shard=1_000)
    return out


def train(
    options: argparse.Namespace, name: str, data: Path, words: Any, pool: Path, seed: int
) -> Path:
    """Train the demo in one process, or find what an earlier call left."""
    length = f"{options.updates}x{options.batch_size}-of-{options.pairs}"
    run = options.out / f"{name.replace(' ', '-')}-{length}-seed-{seed}"
    given = [
        f"--data.train={data}", f"--data.metadata.sources={pool / 'zero_shot' / 'classnames.txt'}",
        f"--data.period={options.period}", f"--batch-size={options.batch_size}",
        *lasting(options.updates * options.batch_size), f"--run.seed={seed}",
        *(f"--evaluation.{task}.data={pool}" for task in range(3)),
        "--run.log-every=20", "--run.save-every=100000",
    ]  # fmt: skip
    finish(MODULE, "demo", run, [*given, *words])
    return run


def measured_numbers(run: Path, relevant: dict[tuple[str, int], bool] | None) -> Numbers:
    """Every share that a run's evaluations gave, and that of relevant pairs it trained on."""
    numbers: Numbers = {"train_seconds": outcome(run).train_seconds}
    for file in sorted((run / "evaluation").glob("*.json")):
        content = json.loads(file.read_text())
        numbers |= {key: value for key, value in content.items() if isinstance(value, float)}
    shares = [1.0]
    if relevant is not None:
        shares = [share_of(file, relevant) for file in sorted((run / "curation").glob("*.parquet"))]
    numbers["relevant"] = sum(shares) / len(shares)
    numbers["relevant_first"], numbers["relevant_last"] = shares[0], shares[-1]
    return numbers


def share_of(file: Path, relevant: dict[tuple[str, int], bool]) -> float:
    """The share of relevant pairs among those of one curation."""
    rows = pq.read_table(file, columns=["shard", "index"])
    pairs = list(zip(rows["shard"].to_pylist(), rows["index"].to_pylist(), strict=True))
    return sum(relevant[pair] for pair in pairs) / len(pairs)


def report(options: argparse.Namespace, outcomes: dict[str, list[Numbers]]) -> None:
    """Table, JSON and page."""
    report_seeds(
        options.out / "cit_scenes",
        outcomes,
        settings={name: value for name, value in vars(options).items() if name != "out"},
        contests={"curated above raw": ("curated", "raw pool")},
        shown=("zero_shot_top1", "Zero-shot accuracy"),
        title="Curation, the raw pool and an oracle on scenes",
        summary=f"{options.updates:,} updates of {options.batch_size} pairs each. "
        f"{(__doc__ or '').splitlines()[0]}",
    )


if __name__ == "__main__":
    main()
