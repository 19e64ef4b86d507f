"""Draws of a sample: which they are, and that nothing else moves them."""

import numpy as np
import pytest

from frugal.common.randomness import sample_generator, stable_key

SAMPLES = [0, 1, 149, 2**31 + 7, 2**62 + 3]


@pytest.mark.parametrize("number", SAMPLES)
@pytest.mark.parametrize("purpose", ["crop", "caption", "text"])
def test_a_sample_draws_from_numpys_philox_of_its_key(purpose: str, number: int) -> None:
    key = stable_key(7, purpose, number) % 2**64
    mine, theirs = (
        sample_generator(7, purpose, number),
        np.random.Generator(np.random.Philox(key=key)),
    )
    assert mine.random(9).tolist() == theirs.random(9).tolist()
    assert mine.integers(1000, size=5).tolist() == theirs.integers(1000, size=5).tolist()
    assert mine.permutation(13).tolist() == theirs.permutation(13).tolist()


def test_keys_of_both_signs_are_tried() -> None:
    assert {stable_key(7, p, n) < 0 for p in ("crop", "caption", "text") for n in SAMPLES} == {
        True,
        False,
    }


def test_generators_that_are_open_together_do_not_share_a_place() -> None:
    first, again = sample_generator(1, "crop", 5), sample_generator(1, "crop", 5)
    drawn = first.random(4).tolist()
    sample_generator(1, "text", 5).random(3)
    assert again.random(4).tolist() == drawn
