"""The search for a threshold."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.threshold_search import MOST_STEPS, PRECISION, bisect
from frugal.common.errors import InputError
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import PatchView

LOG = logging.getLogger("test")
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def pictures(count: int, *, grain: int = 60, seed: int = 0) -> torch.Tensor:
    """Images of 6x8 patches of 4 pixels in a few colors, with noise."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 256, (count, 3, 5), generator=generator)
    which = torch.randint(0, 5, (count, 1, 48), generator=generator).expand(-1, 3, -1)
    flat = colors.gather(2, which).view(count, 3, 6, 8)
    flat = flat.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randint(-grain, grain + 1, flat.shape, generator=generator)
    return (flat + noise).clamp(0, 255).to(torch.uint8)


def seen(images: torch.Tensor, first: int = 0) -> tuple[PatchView, SampleNoise]:
    numbers = torch.arange(first, first + len(images))
    return PatchView(images, 4, mean=MEAN, std=STD), SampleNoise(0, numbers)


def alone(value: Any) -> list[Any]:
    return [value]


def prepared(masking: ClusterMasking, images: torch.Tensor) -> ClusterMasking:
    return masking.calibrate([seen(images)], gather=alone, log=LOG)


@pytest.mark.parametrize("target", [0.35, 0.5, 0.65, 0.8])
@pytest.mark.parametrize("anchor_ratio", [0.03, 0.1])
def test_the_threshold_found_masks_the_target_ratio(target: float, anchor_ratio: float) -> None:
    images = pictures(300)
    masking = ClusterMasking(target_mask_ratio=target, anchor_ratio=anchor_ratio)
    found = prepared(masking, images)
    assert found.threshold is not None
    view, noise = seen(images)
    achieved = found.mask(view, noise=noise).mask_ratio.double().mean().item()
    assert achieved == pytest.approx(target, abs=PRECISION + 1e-6)
    kept = found.keep(view, noise=noise)
    assert kept.counts.double().mean().item() == pytest.approx(
        48 * (1 - target), abs=48 * PRECISION
    )
    assert found.off_target({"mask_ratio": achieved}) is None


def test_what_is_known_is_not_searched_again() -> None:
    masking = ClusterMasking(threshold=0.3)
    assert masking.calibration_images == 0
    assert masking.calibrate([], gather=alone, log=LOG) is masking
    assert ClusterMasking(search_images=77).calibration_images == 77
    assert prepared(ClusterMasking(), pictures(100)).calibration_images == 0


def test_how_images_are_batched_does_not_matter() -> None:
    images = pictures(240)
    whole = prepared(ClusterMasking(), images)
    parts = [seen(images[start : start + 50], start) for start in range(0, 240, 50)]
    assert ClusterMasking().calibrate(parts, gather=alone, log=LOG) == whole


class Meeting:
    """Gathers one value of each of several threads, as processes gather theirs."""

    def __init__(self, members: int) -> None:
        self.values: list[Any] = [None] * members
        self.barrier = threading.Barrier(members, timeout=60)

    def gather(self, member: int) -> Callable[[Any], list[Any]]:
        def meet(value: Any) -> list[Any]:
            self.values[member] = value
            self.barrier.wait()
            gathered = list(self.values)
            self.barrier.wait()
            return gathered

        return meet


def test_members_with_other_images_and_other_numbers_of_them_agree() -> None:
    images = pictures(240)
    expected = prepared(ClusterMasking(), images)
    shares = [(0, 100), (100, 101), (101, 240)]
    meeting = Meeting(len(shares))
    found: dict[int, ClusterMasking] = {}

    def search(member: int, start: int, stop: int) -> None:
        found[member] = ClusterMasking().calibrate(
            [seen(images[start:stop], start)], gather=meeting.gather(member), log=LOG
        )

    threads = [
        threading.Thread(target=search, args=(member, *share))
        for member, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[member] for member in range(3)] == [expected] * 3


def test_a_search_ends_and_returns_the_first_of_the_nearest() -> None:
    found = bisect(lambda threshold: 0.75 if threshold < 0.3 else 0.25, target=0.5)
    assert len(found.visited) == MOST_STEPS
    assert found.threshold == 0.5 and found.mask_ratio == 0.25  # 0.25 is as far off, but later
    visited = [threshold for threshold, _ in found.visited]
    assert visited[:4] == [0.5, 0.25, 0.375, 0.3125]


@pytest.mark.parametrize("at", [0.0003, 0.124, 0.5, 0.77, 0.9998])
def test_a_search_on_a_line_finds_its_place(at: float) -> None:
    # the share masked falls by one from zero to one, steeply around the place wanted
    found = bisect(lambda threshold: 1 / (1 + 2.0 ** (20 * (threshold - at))), target=0.5)
    assert found.threshold == pytest.approx(at, abs=1e-3)
    assert abs(found.mask_ratio - 0.5) < 0.01


@pytest.mark.parametrize(
    ("images", "reached"),
    [
        (torch.full((100, 3, 24, 32), 90, dtype=torch.uint8), "100.00%"),  # flat, of one hue
        (torch.zeros(100, 3, 24, 32), "31.25%"),  # constant as the model takes it: incomparable
    ],
)
def test_flat_images_reach_no_target(images: torch.Tensor, reached: str) -> None:
    with pytest.raises(InputError, match=r"no reduction\.image\.threshold masks 50\.00%") as raised:
        prepared(ClusterMasking(), images)
    assert reached in str(raised.value) and "\n" not in str(raised.value)


def test_a_target_between_two_steps_is_taken_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # the same image again and again, with the same anchors
    images = pictures(1, grain=90, seed=3).expand(30, -1, -1, -1)
    view, _ = seen(images)
    noise = SampleNoise(0, torch.zeros(30, dtype=torch.long))
    masking = ClusterMasking(target_mask_ratio=0.51, tolerance=0.2)
    with caplog.at_level(logging.INFO, logger="test"):
        found = masking.calibrate([(view, noise)], gather=alone, log=LOG)
    assert found.threshold is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no threshold comes nearer to 51.00 %" in caplog.text


def test_what_was_found_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="test"):
        found = prepared(ClusterMasking(), pictures(300))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"threshold {found.threshold:.6g} masks" in caplog.text and "300 images" in caplog.text


def test_too_few_readable_images_are_refused() -> None:
    with pytest.raises(InputError, match="only 20 of the first images of the run can be read"):
        prepared(ClusterMasking(), pictures(20))
