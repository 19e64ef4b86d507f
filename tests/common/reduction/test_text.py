"""Truncation of captions."""

from frugal.common.reduction.text import TextReduction, Truncate


class Letters:
    """Letters as tokens between a start (1) and an end (2)."""

    def encode(self, caption: str) -> list[int]:
        return [ord(letter) for letter in caption]

    def assemble(self, content_ids: list[int], length: int) -> list[int]:
        return [1, *content_ids[: length - 2], 2]


def test_truncation_keeps_the_start_of_the_caption_and_every_special_token():
    cut = Truncate().encode("abcdef", Letters(), length=5, generator=None)
    assert cut == [1, ord("a"), ord("b"), ord("c"), 2]


def test_a_short_caption_stays_whole():
    assert Truncate().encode("ab", Letters(), length=9, generator=None) == [1, 97, 98, 2]
    assert Truncate().encode("", Letters(), length=9, generator=None) == [1, 2]


def test_truncation_satisfies_the_contract():
    assert isinstance(Truncate(), TextReduction)
