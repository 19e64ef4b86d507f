"""How many words of captions the model finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from frugal.common.contracts import EvaluationTask, Keep, Show
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle
from frugal.common.ranges import Count, Seed, check_ranges
from frugal.common.reduction.text import Truncate
from frugal.common.run import Run
from frugal.superclass.data import draw_batch
from frugal.superclass.model import WordModel
from frugal.superclass.objective import words_of


@dataclass(frozen=True, kw_only=True)
class WordRecall(EvaluationTask):
    """Draws pictures that training never sees, and looks at the likeliest words of each."""

    name: str = "word_recall"
    samples: Count = 512
    seed: Seed = 1_000_003
    batch_size: Count = 64

    def __post_init__(self) -> None:
        check_ranges(self, self.name)

    @override
    def folder(self) -> Path | None:
        """Nothing on disk: the pictures are drawn."""
        return None

    @property
    @override
    def has_data(self) -> bool:
        """Whether there is something to measure: always."""
        return True

    @property
    @override
    def scores(self) -> tuple[str, ...]:
        """The one number."""
        return ("word_recall",)

    @override
    def evaluate(
        self, bundle: ModelBundle, run: Run, *, show: Show | None = None, keep: Keep | None = None
    ) -> dict[str, float | int]:
        """Share of the words of a caption that are among as many of the likeliest words."""
        del show, keep
        ranks = Ranks.current()
        found = torch.zeros(2, dtype=torch.int64, device=run.device)
        if not isinstance(bundle.config, WordModel):
            raise InputError(
                f"{bundle.source.path} predicts no words, which {self.name} counts; give a model "
                "of frugal.superclass"
            )
        inputs = bundle.config.inputs()
        for part in ranks.turns(self.samples, self.batch_size):
            numbers = range(self.samples)[part]
            batch = draw_batch(numbers, seed=self.seed, inputs=inputs, reduction=Truncate())
            batch = batch.to(run.device)
            scores = bundle.model(batch.images)
            words = words_of(batch, scores.shape[1]) > 0  # (B, V)
            places = scores.argsort(1, descending=True).argsort(1)
            hits = (words & (places < words.sum(1, keepdim=True))).sum()
            found += torch.stack([hits, words.sum()])
        hits, total = ranks.sum(found).tolist()
        return {"word_recall": hits / total, "words": total}
