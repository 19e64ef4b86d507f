"""Captions per second and core of every text reduction, against open_clip's, and what B/16 needs.

    python benchmarks/text_reduction.py --data 'cc3m/{00000..00010}.tar'

One core, one caption at a time, as a loader process works, drawing its generator included. Cold:
the caption was never seen, its words were. Warm: it is remembered, as in the second epoch of a
small data set. Syntax masking is left out where NLTK's data are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write

from frugal.clipa import syntax_masking
from frugal.clipa.frequency_masking import FrequencyMasking
from frugal.clipa.syntax_masking import SyntaxMasking
from frugal.clipa.text_masking import BlockTextMasking, RandomTextMasking
from frugal.clipa.word_counts import WordCounts
from frugal.common.data.damage import Damaged
from frugal.common.data.patterns import find_files
from frugal.common.data.samples import Fields
from frugal.common.data.sources import index_missing, open_shard
from frugal.common.data.tokenizers import ClipBpe, Tokenizer, WordPiece
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.reduction.text import TextReduction, Truncate
from frugal.common.run import make_logger

ROOT = Path(__file__).parents[1]
LENGTH = 16
"""Of CLIPA's B/16 (I50,T16); its batch, GPUs and loader processes for each of them follow."""
BATCH = 65_536
GPUS = 8
WORKERS = 6
PUBLISHED_RATE = (6 * 407_332_084 + 131_072_000) / (2 * 24 * 3600) / GPUS
"""Samples/s of one A100: both stages of B/16 in two days on eight."""
MOST_WORKERS = 1.0
"""Of the six, that the text may occupy at the published rate, whatever the strategy."""


def main() -> None:
    """Measure, print, write, and fail if the text would hold up training."""
    options = read_options()
    torch.set_num_threads(1)
    captions = read_captions(options)
    known, new = captions[: len(captions) // 2], captions[len(captions) // 2 :]
    clip = ClipBpe().load()
    tokenizers = {"byte pairs": clip, "word pieces": WordPiece(vocab=options.vocab).load()}
    theirs = open_clip_tokenizers()
    corpus = tempfile.TemporaryDirectory()
    rows = []
    for name, reduction in reductions(captions, Path(corpus.name)).items():
        for layout, tokenizer in tokenizers.items():
            if not is_ready(name, reduction, tokenizer):
                continue
            row: dict[str, Any] = {"strategy": name, "tokenizer": layout}
            row |= measure(reduction, tokenizer, known, new, repeats=options.repeats)
            if layout == "byte pairs" and name in theirs:
                row["open_clip"] = rate(theirs[name], known, new, repeats=options.repeats)
            rows.append(row)
    check_agreement(theirs["truncate"], clip, new)
    report = {
        "captions": len(new),
        "words_of_a_caption": sum(len(caption.split()) for caption in new) / len(new),
        "text_length": LENGTH,
        "rates": {"published": PUBLISHED_RATE, "wanted": options.rate},
        "strategies": rows,
    }
    print_table(report)
    write(options.out, report)
    if PUBLISHED_RATE / min(row["cold"] for row in rows) > MOST_WORKERS:
        sys.exit("the text reductions miss their limit")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="data/scenes/train", help="as data.train takes it")
    parser.add_argument("--image-column", default="filepath", help="of CSV files")
    parser.add_argument("--caption-column", default="title", help="of CSV files")
    parser.add_argument("--captions", type=int, default=10_000, help="different ones to read")
    parser.add_argument("--rate", type=float, default=10_000, help="samples/s wanted of a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument(
        "--vocab", type=Path, default=ROOT / "tests/golden/flip/bert_uncased_vocab.txt"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/text_reduction.json"))
    return parser.parse_args()


def read_captions(options: argparse.Namespace) -> list[str]:
    """Different captions of the data, in their order."""
    fields = Fields(csv_image=options.image_column, csv_caption=options.caption_column)
    files = find_files(options.data)
    index_missing(files, make_logger(0))
    captions: dict[str, None] = {}
    for caption in iterate_captions(files, fields):
        captions[caption] = None
        if len(captions) == options.captions:
            break
    return list(captions)


def iterate_captions(files: list[Path], fields: Fields) -> Iterator[str]:
    """All captions of some shards that can be read."""
    for path in files:
        shard, _ = open_shard(path, fields)
        reader = shard.open(fields)
        for number in range(shard.num_samples):
            try:
                yield from reader.captions(number)
            except Damaged:
                continue


def reductions(captions: list[str], folder: Path) -> dict[str, Any]:
    """Every strategy; the words of the captions are the corpus of frequency masking."""
    words = WordCounts()
    for caption in captions:
        words.add_caption(caption)
    counts = folder / "counts.json"
    counts.write_text(json.dumps(words.content(least_share=0)))
    return {
        "truncate": Truncate(),
        "random": RandomTextMasking(),
        "block": BlockTextMasking(),
        "syntax": SyntaxMasking(),
        "frequency": FrequencyMasking(counts=counts),
    }


def open_clip_tokenizers() -> dict[str, Callable[[str], Any]]:
    """open_clip's way to tokens, one caption at a time, as its loader calls it."""
    from open_clip import tokenizer as module

    module._nltk_init = True  # it would download at the first call
    theirs = module.SimpleTokenizer(context_length=LENGTH)
    start, end = theirs.sot_token_id, theirs.eot_token_id

    def masked(function: Callable[..., Any]) -> Callable[[str], Any]:
        return lambda caption: function([caption], LENGTH, start, end, theirs.encode)

    return {
        "truncate": lambda caption: theirs([caption]),
        "random": masked(module.random_mask_tokenize),
        "block": masked(module.simple_mask_tokenize),
        "syntax": masked(module.syntax_mask_tokenize),
    }


def is_ready(name: str, reduction: TextReduction, tokenizer: Tokenizer) -> bool:
    """Whether a strategy has what it needs; if not, says what is missing."""
    try:
        reduction.prepare(tokenizer, length=LENGTH)
    except InputError as error:
        print(f"{name} masking is left out: {error}")
        return False
    return True


def measure(
    reduction: Any, tokenizer: Tokenizer, known: list[str], new: list[str], *, repeats: int
) -> dict[str, float]:
    """Captions per second of a strategy."""

    def encode(caption: str) -> None:
        generator = sample_generator(0, "text", len(caption))
        reduction.encode(caption, tokenizer, length=LENGTH, generator=generator)

    return {
        "cold": rate(encode, known, new, repeats=repeats, forget=True),
        "warm": rate(encode, new, new, repeats=repeats),
    }


def rate(
    encode: Callable[[str], Any],
    known: list[str],
    new: list[str],
    *,
    repeats: int,
    forget: bool = False,
) -> float:
    """Captions per second, after some others."""
    seconds = []
    for _ in range(repeats):
        if forget:
            syntax_masking._kept_text.cache_clear()
        for caption in known:
            encode(caption)
        start = time.perf_counter()
        for caption in new:
            encode(caption)
        seconds.append(time.perf_counter() - start)
    return len(new) / min(seconds)


def check_agreement(theirs: Callable[[str], Any], clip: Tokenizer, captions: list[str]) -> None:
    """Both sides must have done the same work."""
    draws = np.random.default_rng(0)
    for caption in captions:
        ids = Truncate().encode(caption, clip, length=LENGTH, generator=draws)
        if theirs(caption)[0].tolist()[: len(ids)] != ids:
            sys.exit(f"open_clip has other tokens for {caption!r}")


def print_table(report: dict[str, Any]) -> None:
    """What was measured, and the arithmetic of a B/16 run, for people."""
    published, wanted = report["rates"].values()
    print(
        f"captions/s of one core, {report['captions']:,} captions of "
        f"{report['words_of_a_caption']:.1f} words, {LENGTH} tokens"
    )
    print(
        f"{'':12}{'':14}{'cold':>9}{'warm':>9}{'open_clip':>11}{'ratio':>8}"
        f"{f'cores at {published:,.0f}/s':>18}{f'at {wanted:,.0f}/s':>13}"
    )
    for row in report["strategies"]:
        peer = row.get("open_clip")
        theirs = f"{peer:11,.0f}{row['cold'] / peer:8.1f}" if peer else " " * 19
        print(
            f"{row['strategy']:12}{row['tokenizer']:14}{row['cold']:9,.0f}{row['warm']:9,.0f}"
            f"{theirs}{published / row['cold']:18.2f}{wanted / row['cold']:13.2f}"
        )
    slowest = min(report["strategies"], key=lambda row: row["cold"])
    print(
        f"B/16 (I50,T16): {BATCH:,} captions a step. At the published {published:,.0f} samples/s "
        f"of each of {GPUS} GPUs a step takes {BATCH / published / GPUS:.1f} s, and its captions "
        f"by {slowest['strategy']} masking {BATCH / slowest['cold']:.1f} core-seconds, cold: "
        f"{published / slowest['cold']:.2f} of the {WORKERS} loader processes of a GPU. At "
        f"{wanted:,.0f} samples/s it takes {wanted / slowest['cold']:.2f} of them"
    )


if __name__ == "__main__":
    main()
