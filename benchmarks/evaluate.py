"""Our evaluation of a model against clip_benchmark's, in turns in one process: time and numbers.

    OMP_NUM_THREADS=2 python benchmarks/evaluate.py

Both sides measure the same weights of open_clip's model, drawn at random, on the same drawn data in
clip_benchmark's layout, in float32 and without worker processes: zero-shot images and prompts, and
retrieval. Each is done by one side and by the other, so that whatever else a machine does meets
both; a ratio is the median of those of the pairs. The numbers of both sides are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # clip_benchmark's bars; tqdm asks when it is imported

import open_clip
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from measuring import place, write
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from frugal.common import load_model
from frugal.common.distributed import Ranks
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.retrieval import Retrieval, embed, open_captioned
from frugal.common.evaluation.zero_shot import ZeroShot, classify, open_dataset
from frugal.common.run import Run, make_logger
from frugal.common.scenes.settings import Settings
from frugal.common.scenes.writing import write as write_scenes

Work = Callable[[], Any]


def main() -> None:
    """Measure, print a table, keep the numbers."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    print(f"{options.model}, {options.size}-pixel pictures, {place('cpu')}")
    print(f"{'':10}{'of':>8}{'ours /s':>10}{'theirs /s':>11}{'ratio':>7}{'least':>7}{'most':>7}")
    for name, row in rows.items():
        speeds = (f"{row[side]:,.1f}" for side in ("ours", "clip_benchmark"))
        spread = (f"{row[key]:.2f}" for key in ("ratio", "least", "most"))
        print("{:10}{:>8,}{:>10}{:>11}{:>7}{:>7}{:>7}".format(name, row["count"], *speeds, *spread))
    about = {"model": options.model, "size": options.size, "threads": torch.get_num_threads()}
    write(options.out, {**about, "torch": torch.__version__, "rows": rows})


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip")
    parser.add_argument("--images", type=int, default=192, help="of zero-shot and of retrieval")
    parser.add_argument("--size", type=int, default=320, help="side of a picture in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="pairs of measurements")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/evaluate.json"))
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Of every kind of work how much was done in a second by either side."""
    data = folder / "scenes"
    write_scenes(
        Settings(
            out=data,
            train_samples=0,
            zero_shot_samples=options.images,
            probe_samples=0,
            retrieval_samples=options.images,
            compositional_samples=0,
            image_size=options.size,
        )
    )
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(options.model)
    tokenizer = open_clip.get_tokenizer(options.model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    theirs = Theirs(model.eval(), transform, tokenizer, data, options.batch)
    ours = Ours(folder / "weights.safetensors", data, options)
    counts = {
        "prompts": len(theirs.classes) * len(theirs.templates),
        "images": options.images,
        "retrieval": options.images,
    }
    rows = {}
    for name, count in counts.items():
        pairs = [
            turn(getattr(ours, name), getattr(theirs, name), name)
            for _ in range(options.rounds + 1)
        ]
        pairs = pairs[1:]  # the first chooses kernels and fills caches
        ratios = [other / mine for mine, other in pairs]
        rows[name] = {
            "count": count,
            "ours": count / statistics.median(mine for mine, _ in pairs),
            "clip_benchmark": count / statistics.median(other for _, other in pairs),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    return rows


def turn(ours: Work, theirs: Work, part: str) -> tuple[float, float]:
    """Seconds of either side, which must have found the same."""
    start = time.perf_counter()
    mine = ours()
    between = time.perf_counter()
    other = theirs()
    end = time.perf_counter()
    compare(part, mine, other)
    return between - start, end - between


class Theirs:
    """clip_benchmark's functions, as its command calls them with --no_amp --num_workers 0."""

    def __init__(self, model: Any, transform: Any, tokenizer: Any, data: Path, batch: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.loaders = {}
        for task, part in (
            ("zeroshot_classification", "zero_shot"), ("zeroshot_retrieval", "retrieval")
        ):  # fmt: skip
            dataset = build_dataset(
                f"wds/{part}", root=str(data / part), transform=transform, split="test", task=task
            )
            loader = DataLoader(dataset.batched(batch), batch_size=None)
            self.loaders[part] = loader
            if part == "zero_shot":
                self.classes, self.templates = dataset.classes, dataset.templates

    def prompts(self) -> Any:
        """One vector for every class."""
        self.classifier = zeroshot_classification.zero_shot_classifier(
            self.model, self.tokenizer, self.classes, self.templates, "cpu", amp=False
        )
        return self.classifier.T

    def images(self) -> Any:
        """The share of right answers."""
        scores, labels = zeroshot_classification.run_classification(
            self.model, self.classifier, self.loaders["zero_shot"], "cpu", amp=False
        )
        return {"top1": (scores.argmax(1) == labels).float().mean().item()}

    def retrieval(self) -> Any:
        """Recalls."""
        found = zeroshot_retrieval.evaluate(
            self.model, self.loaders["retrieval"], self.tokenizer, "cpu", amp=False,
            recall_k_list=[1, 5, 10],
        )  # fmt: skip
        return {name.replace("retrieval_recall@", ""): value for name, value in found.items()}


class Ours:
    """What the tasks of an evaluation do, in the same parts."""

    def __init__(self, weights: Path, data: Path, options: argparse.Namespace) -> None:
        self.bundle = load_model(weights, name=options.model)
        self.zero_shot = ZeroShot(batch_size=options.batch)
        self.task, self.captioned = Retrieval(batch_size=options.batch), data / "retrieval"
        self.run = Run(data, 0, 1, 0, torch.device("cpu"), make_logger(1))
        self.dataset = open_dataset(self.zero_shot, data / "zero_shot", self.bundle)

    def _embedder(self) -> Embedder:
        return Embedder.of(self.bundle, self.run, self.zero_shot)

    def prompts(self) -> Any:
        """(C, E): one vector for every class."""
        embedder, about = self._embedder(), self.dataset
        with embedder.measuring(Ranks()):
            self.classes = class_embeddings(embedder, about.names, about.templates, ranks=Ranks())
        return self.classes

    def images(self) -> Any:
        """The share of right answers."""
        embedder = self._embedder()
        with embedder.measuring(Ranks()):
            found = classify(
                embedder, self.dataset.images, self.classes, batch_size=self.zero_shot.batch_size
            )
        return {"top1": found.numbers(None)["top1"]}

    def retrieval(self) -> Any:
        """Recalls."""
        captioned = open_captioned(self.task, self.captioned, self.bundle)
        embedder = self._embedder()
        with embedder.measuring(Ranks()):
            embedded = embed(embedder, captioned, batch_size=self.task.batch_size)
            recall = embedded.recall(Ranks())
        return {
            f"{way}_{k}": value
            for way, found in (("image", recall.image_retrieval), ("text", recall.text_retrieval))
            for k, value in found.items()
        }


def compare(part: str, ours: Any, theirs: Any) -> None:
    """Refuse to show speeds of what is not the same."""
    if isinstance(ours, dict):
        differ = {n: (ours[n], theirs[n]) for n in theirs if abs(ours[n] - theirs[n]) > 1e-6}
    else:
        worst = (ours - theirs).abs().max().item()
        differ = {part: worst} if worst > 1e-5 else {}
    if differ:
        raise SystemExit(f"{part}: the numbers differ: {differ}")


if __name__ == "__main__":
    main()
