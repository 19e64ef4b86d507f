"""Texts of any length, embedded in groups: what each gets is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from frugal.common.distributed import Ranks
from frugal.common.evaluation.embed import TEXTS_AT_ONCE, Embedder, evaluating, text_table
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower

LENGTH = 24


class Letters:
    """One token a letter, from 1; 90 ends a text."""

    pad_id = 0
    end_id = 90

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def assemble(self, ids: Any, length: int) -> list[int]:
        return [*ids[: length - 1], self.end_id]


def dual_encoder(**text: Any) -> DualEncoder:
    narrow = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
    config = DualEncoderConfig(
        image=ImageTower(**narrow, image_size=8, patch_size=4),
        text=TextTower(**narrow, vocabulary=91, length=LENGTH, **text),
        embed_dim=8,
    )
    return config.build(torch.Generator().manual_seed(3)).eval()


def texts(count: int) -> list[str]:
    """Of 1 to 23 letters, in no order."""
    drawn = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, LENGTH, (count,), generator=drawn).tolist()
    return [
        "".join(chr(97 + (7 * row + place) % 26) for place in range(n))
        for row, n in enumerate(lengths)
    ]


TOWERS = [
    {},
    {"packed": True},
    {"causal": False, "pad_mask": True, "pooling": "mean"},
    {"causal": False, "pooling": "first"},
    {"pooling": "last"},
    {"pooling": "mean_all"},
]


@pytest.mark.parametrize("tower", TOWERS, ids=str)
def test_every_text_has_the_vector_of_its_whole_length(tower: dict[str, Any]) -> None:
    model, asked = dual_encoder(**tower), texts(TEXTS_AT_ONCE + 30)
    embedder = Embedder(model, Letters(), context_length=LENGTH, device=torch.device("cpu"))
    with evaluating(model):
        table = text_table(embedder, asked, ranks=Ranks())
        together = embedder.texts(asked)
        alone = torch.cat([whole(model, text) for text in asked])
    assert (table - alone).abs().max() < 2e-6
    assert (together - alone).abs().max() < 2e-6


def whole(model: DualEncoder, text: str) -> Tensor:
    """(1, E): of every slot that the tower has."""
    ids = Letters().assemble(Letters().encode(text), LENGTH)
    filled = torch.tensor([[*ids, *[0] * (LENGTH - len(ids))]])
    return model.encode_text(filled, torch.tensor([len(ids)]))


def test_short_texts_are_not_computed_at_the_length_of_long_ones() -> None:
    model, widths = dual_encoder(), []
    embedder = Embedder(model, Letters(), context_length=LENGTH, device=torch.device("cpu"))
    assert embedder.width == 8  # found out by a text of its own
    model.text.blocks.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[:2]))
    short = ["a" + chr(97 + row // 26) + chr(97 + row % 26) for row in range(TEXTS_AT_ONCE)]
    asked = [text for start in short for text in (start, start + "b" * 20)]
    with evaluating(model):
        text_table(embedder, asked, ranks=Ranks())
    assert [tuple(width) for width in widths] == [(TEXTS_AT_ONCE, 4), (TEXTS_AT_ONCE, LENGTH)]
