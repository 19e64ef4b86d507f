"""Masks and thresholds against numbers of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from reference_cluster_masking import both_visible, cluster_mask, ids_keep, kept_hits
from safetensors.torch import load_file

from frugal.cluster_masking.clusters import (
    ANCHORS,
    CUT_OFF,
    ClusterMask,
    draw_anchors,
    most_kept,
    num_anchors,
)
from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.similarity import pixel_similarity
from frugal.cluster_masking.threshold_search import MOST_STEPS, bisect, closest_anchor, num_kept
from frugal.common.randomness import RecordedNoise
from frugal.common.reduction.image import PatchView

GOLDEN = Path(__file__).parents[1] / "golden" / "cluster_masking"
MASKS = ("mask_l16", "mask_l16_high_thr", "mask_l49", "mask_l49_min0", "mask_l196")
EVERY_MASK = (*MASKS, "mask_embed_mix")
SEARCHES = ("search_l49", "search_l49_b", "search_l49_min0", "search_no_solution")


def golden(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return (
        json.loads((GOLDEN / f"{case}.json").read_text()),
        load_file(GOLDEN / f"{case}.safetensors"),
    )


def view_of(described: dict, tensors: dict[str, torch.Tensor]) -> PatchView:
    mean, std = tuple(described["mean"]), tuple(described["std"])
    return PatchView(tensors["images_u8"], described["patch"], mean=mean, std=std)


def mask_of(case: str, overflow: str = "index") -> ClusterMask:
    described, tensors = golden(case)
    more = {}
    if described["kind"] == "mask_embed":
        more = {"embeddings": tensors["tokens"][:, 1:], "mix": described["mix"], "centered": False}
    return cluster_mask(
        view_of(described, tensors).normalized,
        anchor_noise=tensors["noise_anchor"],
        cut_off_noise=tensors["noise_cutoff"],
        anchor_ratio=described["anchor_ratio"],
        threshold=described["threshold"],
        min_mask_ratio=described["min_mask_ratio"],
        overflow=overflow,
        **more,
    )


@pytest.mark.parametrize("case", EVERY_MASK)
def test_anchors_clusters_and_kept_patches_equal_the_reference(case: str) -> None:
    _, tensors = golden(case)
    mask = mask_of(case)
    assert torch.equal(mask.anchors, tensors["anchor_ids"].long())
    assert torch.equal(mask.hits, tensors["hits"].long())
    assert torch.equal(mask.visible_counts, tensors["visible_count"].long())
    assert torch.equal(ids_keep(mask), tensors["ids_keep"].long())
    torch.testing.assert_close(mask.mask_ratio, tensors["mask_ratio"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in MASKS if case != "mask_l196"])
def test_the_pairs_of_tokens_that_are_blocked_equal_the_reference(case: str) -> None:
    visible = both_visible(kept_hits(mask_of(case)))
    assert torch.equal(~visible, golden(case)[1]["attn_blocked"])


@pytest.mark.parametrize("case", EVERY_MASK)
def test_our_cut_off_differs_from_the_reference_only_where_a_tie_decided(case: str) -> None:
    _, tensors = golden(case)
    ours, theirs = mask_of(case, "random"), tensors["ids_keep"].long()
    limit = ours.most_kept
    for row in range(len(theirs)):
        kept = ours.stays[row].nonzero().flatten().tolist()
        if tensors["visible_count"][row] <= limit:
            assert kept == theirs[row, : len(kept)].tolist()
            continue
        assert len(kept) == limit
        assert not ours.masked[row, kept].any()
        noise = tensors["noise_cutoff"][row]
        visible = (~ours.masked[row]).nonzero().flatten().tolist()
        assert kept == sorted(sorted(visible, key=lambda patch: noise[patch].item())[:limit])


def test_some_golden_image_has_too_many_visible_patches() -> None:
    counts = golden("mask_l16_high_thr")[1]["visible_count"]
    assert (counts > most_kept(16, 0.3)).sum() >= 2


@pytest.mark.parametrize("case", MASKS)
def test_the_reduction_keeps_the_visible_patches_of_the_reference(case: str) -> None:
    described, tensors = golden(case)
    masking = ClusterMasking(
        anchor_ratio=described["anchor_ratio"],
        threshold=described["threshold"],
        target_mask_ratio=None,
        min_mask_ratio=described["min_mask_ratio"],
    )
    noise = {ANCHORS: tensors["noise_anchor"], CUT_OFF: tensors["noise_cutoff"]}
    kept = masking.keep(view_of(described, tensors), noise=RecordedNoise(noise))
    limit = most_kept(described["L"], described["min_mask_ratio"])
    visible = tensors["visible_count"].long()
    assert torch.equal(kept.counts, visible.clamp(max=limit))
    stays = kept.mask(described["L"])
    for row in (visible <= limit).nonzero().flatten():
        assert torch.equal(stays[row], tensors["hits"][row] == 0)


def test_the_numbers_of_anchors_equal_the_reference() -> None:
    for case in EVERY_MASK:
        described, tensors = golden(case)
        count = num_anchors(described["L"], described["anchor_ratio"])
        assert count == tensors["anchor_ids"].shape[1]


def search(case: str):
    """The search of a golden case; its images are one batch of one process."""
    described, tensors = golden(case)
    count = num_anchors(described["L"], described["anchor_ratio"])
    anchors = draw_anchors(tensors["noise_anchor"], count)
    closest = closest_anchor(pixel_similarity(view_of(described, tensors).normalized, anchors))
    most = most_kept(described["L"], described["min_mask_ratio"])
    return bisect(
        lambda threshold: 1 - num_kept(closest, threshold, most=most) / closest.numel(),
        target=described["target_mask_ratio"],
    )


@pytest.mark.parametrize("case", SEARCHES)
def test_searches_visit_what_the_reference_visits(case: str) -> None:
    described, tensors = golden(case)
    found = search(case)
    visited, ratios = zip(*found.visited, strict=True)
    assert list(visited) == tensors["visited_clean"].tolist()
    assert list(ratios) == pytest.approx(tensors["ratio_clean"].tolist(), abs=1e-6)
    if described["kind"] == "search":
        assert found.threshold == described["threshold_clean"]
        assert len(visited) == described["iterations_clean"]
    else:
        assert found.threshold == described["best_threshold"]
        assert found.mask_ratio == pytest.approx(described["best_ratio"])
        assert len(visited) == MOST_STEPS == described["max_steps"]


@pytest.mark.parametrize("case", SEARCHES)
def test_a_search_predicts_the_ratio_of_the_masks_it_leads_to(case: str) -> None:
    described, tensors = golden(case)
    found = search(case)
    for threshold, ratio in found.visited:
        mask = cluster_mask(
            view_of(described, tensors).normalized,
            anchor_noise=tensors["noise_anchor"],
            cut_off_noise=torch.zeros_like(tensors["noise_anchor"]),
            anchor_ratio=described["anchor_ratio"],
            threshold=threshold,
            min_mask_ratio=described["min_mask_ratio"],
        )
        assert mask.mask_ratio.double().mean().item() == pytest.approx(ratio, abs=1e-6)
