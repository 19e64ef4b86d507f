"""CLIP-PGS against recorded numbers of its released code, and what is meant by it against loops."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_cluster_masking import ids_keep
from safetensors.torch import load_file

from frugal.cluster_masking.clusters import (
    ANCHORS,
    CUT_OFF,
    ClusterMask,
    clusters_of,
    draw_anchors,
    most_kept,
)
from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pgs import (
    PgsMasking,
    Seeds,
    centered_brightness,
    draw_seeds,
    edge_scores,
    transported,
)
from frugal.common.errors import InputError
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.reduction.image import PatchView

GOLDEN = Path(__file__).parents[1] / "golden" / "extras"
CASES = ("pgs_l16_plain", "pgs_l49_edge", "pgs_l16_full_mix12", "pgs_l49_otn_b05", "pgs_l196_full")


class Case:
    """A recorded batch."""

    def __init__(self, name: str) -> None:
        self.told = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.patches = self.told["L"]
        embeddings = self.tensors["tokens"][:, 1:]
        self.view = PatchView(
            self.tensors["images_u8"], self.told["patch"], mean=tuple(self.told["mean"]),
            std=tuple(self.told["std"]), embed=lambda: embeddings,
            progress=torch.full((len(embeddings),), self.told["mix"]),
        )  # fmt: skip
        self.masking = PgsMasking(
            threshold=self.told["threshold"], min_mask_ratio=self.told["min_mask_ratio"],
            edge_border="zero", use_embeddings=True,
        )  # fmt: skip
        self.noise = RecordedNoise(
            {ANCHORS: self.tensors["noise_anchor"], CUT_OFF: self.tensors["noise_cutoff"]}
        )

    def seeds(self, kind: Seeds, edges: torch.Tensor) -> torch.Tensor:
        count = self.told["n_candidates"]
        return draw_seeds(self.tensors["noise_anchor"], count, seeds=kind, edges=edges, weight=1e6)

    def mask(self, pairs: torch.Tensor, seeds: torch.Tensor) -> ClusterMask:
        """From the (B, N, N) similarity of all pairs, with the published order of the kept."""
        return clusters_of(
            pairs.gather(1, seeds.unsqueeze(2).expand(-1, -1, self.patches)),
            seeds,
            self.tensors["noise_cutoff"],
            threshold=self.told["threshold"],
            most=most_kept(self.patches, self.told["min_mask_ratio"]),
            overflow="index",
        )

    def check(self, mask: ClusterMask, name: str, kept: int) -> None:
        """Hits, and the patches that are kept where every image of a batch keeps equally many."""
        assert torch.equal(mask.hits, self.tensors[f"{name}hits"].long())
        found, expected = mask.order[:, :kept], self.tensors[f"{name}ids_keep"].long()
        assert torch.equal(found.sort(1).values, expected.sort(1).values)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def every(case: Case) -> torch.Tensor:
    """(B, N) numbers of all patches."""
    return torch.arange(case.patches).expand(case.told["N"], -1)


def test_edges_are_the_recorded_ones(case: Case) -> None:
    brightness = case.view.normalized.mean(2)
    torch.testing.assert_close(brightness, case.tensors["gray_raw"], rtol=0, atol=1e-5)
    found = edge_scores(brightness.unflatten(1, case.view.grid), border="zero")
    torch.testing.assert_close(found, case.tensors["edge_raw"], rtol=0, atol=1e-5)
    assert torch.equal(found, case.masking.edges(case.view))


def test_the_similarity_of_pixels_and_embeddings_is_the_recorded_one(case: Case) -> None:
    found = case.masking.similarity(case.view, every(case))
    torch.testing.assert_close(found, case.tensors["sim"], rtol=0, atol=1e-5)


def test_one_round_of_the_published_transport_is_the_recorded_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = case.tensors["otn_iter1"]
    limit = 10 * case.told["otn_iter1_rel_err_vs_fp64"] * float(expected.abs().max())
    monkeypatch.setattr("frugal.cluster_masking.pgs._ROUNDS", 1)
    found = transported(case.tensors["sim"], "published")
    assert float((found - expected).abs().max()) <= limit


@pytest.mark.parametrize("name", [case for case in CASES if case != "pgs_l196_full"])
def test_the_published_transport_of_what_is_not_negative_is_the_recorded_one(name: str) -> None:
    case = Case(name)
    expected = case.tensors["otn_clamped_input_final"]
    found = transported(case.tensors["sim"].clamp(min=0), "published")
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_published_seeds_hits_and_kept_patches_from_recorded_edges_and_transport(
    case: Case,
) -> None:
    kind: Seeds = "published" if case.told["use_edge"] else "random"
    seeds = case.seeds(kind, case.tensors["edge_published"])
    assert torch.equal(seeds, case.tensors["candidates"].long())
    pairs = case.masking.similarity(case.view, every(case))
    if case.told["use_otn"]:
        pairs = pairs + case.tensors["otn_final"]
    mask = case.mask(pairs, seeds)
    case.check(mask, "", case.told["K"])
    assert torch.equal(mask.visible_counts, case.tensors["visible_count"].long())
    expected = case.tensors["mask_ratio"]
    kept = mask.visible_counts.clamp(max=case.told["K"])
    torch.testing.assert_close(1 - kept / case.patches, expected, rtol=0, atol=1e-6)
    extra = case.told["edge_extra"] if kind == "published" else 0
    most = min(mask.most_kept, int(mask.visible_counts.max()) + extra)
    assert most == case.told["K"]


def test_seeds_off_edges_are_the_recorded_ones_and_so_is_all_that_follows(case: Case) -> None:
    mask = case.masking.mask(case.view, noise=case.noise)
    assert torch.equal(mask.anchors, case.tensors["protect_candidates"].long())
    assert torch.equal(mask.hits, case.tensors["protect_hits"].long())
    again = case.mask(case.masking.similarity(case.view, every(case)), mask.anchors)
    case.check(again, "protect_", case.told["protect_K"])
    assert torch.equal(again.stays.sum(1), mask.stays.sum(1))
    assert ids_keep(again).shape[1] == case.told["protect_K"]


def view_of(seed: int, rows: int, columns: int, patch: int = 4) -> PatchView:
    """Images of a few soft spots, in the numbers that a model takes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, 3, 3, 3, generator=generator)
    size = (rows * patch, columns * patch)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return PatchView(smooth + 0.1 * torch.randn(smooth.shape, generator=generator), patch)


def alike(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's correlation."""
    return float(np.corrcoef(left, right)[0, 1])


def in_loops(view: PatchView, masking: PgsMasking, noise: np.ndarray) -> list[set[int]]:
    """Which patches are masked, in float64, one patch after another."""
    (rows, columns), found = view.grid, []
    for image, uniform in zip(view.pixels.double().numpy(), noise, strict=True):
        shown = image.mean(1).reshape(rows, columns)

        def at(row: int, column: int, shown: np.ndarray = shown) -> float:
            return shown[min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)]

        strength = []
        for row, column in np.ndindex(rows, columns):
            across = sum(
                w * (at(row + d, column + 1) - at(row + d, column - 1))
                for d, w in ((-1, 1), (0, 2), (1, 1))
            )
            down = sum(
                w * (at(row + 1, column + d) - at(row - 1, column + d))
                for d, w in ((-1, 1), (0, 2), (1, 1))
            )
            strength.append(math.hypot(across, down))
        low, high = min(strength), max(strength)
        edges = [(value - low) / (high - low + 1e-6) for value in strength]
        keys = [u + masking.edge_weight * (1 - e) for u, e in zip(uniform, edges, strict=True)]
        count = len(keys) - int(len(keys) * (1 - masking.anchor_ratio))
        seeds = np.argsort(keys, kind="stable")[len(keys) - count :]
        above = masking.protect_above if masking.protect_above is not None else math.inf
        found.append(
            {
                patch
                for patch in range(len(keys))
                if edges[patch] <= above
                and any(alike(image[patch], image[seed]) > masking.threshold for seed in seeds)
            }
        )
    return found


@pytest.mark.parametrize("weight", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("protect_above", [None, 0.4])
@pytest.mark.parametrize("grid", [(5, 5), (4, 7)])
def test_what_is_meant_is_what_loops_find(
    weight: float, protect_above: float | None, grid: tuple[int, int]
) -> None:
    view = view_of(3, *grid)
    masking = PgsMasking(anchor_ratio=0.1, edge_weight=weight, protect_above=protect_above)
    noise = SampleNoise(5, torch.arange(3))
    drawn = noise.uniform(ANCHORS, view.num_patches).double().numpy()
    mask = masking.mask(view, noise=SampleNoise(5, torch.arange(3)))
    expected = in_loops(view, masking, drawn)
    assert [set(row.nonzero().flatten().tolist()) for row in mask.masked] == expected
    assert any(expected)


def test_without_edges_it_is_cluster_masking() -> None:
    view = view_of(1, 6, 6)
    same = {"anchor_ratio": 0.1, "threshold": 0.4, "min_mask_ratio": 0.2}
    for masking in (PgsMasking(seeds="random", **same), PgsMasking(edge_weight=0.0, **same)):
        for seed in range(3):
            noise = SampleNoise(seed, torch.arange(3))
            found = masking.mask(view, noise=noise)
            expected = ClusterMasking(**same).mask(view, noise=SampleNoise(seed, torch.arange(3)))
            assert torch.equal(found.anchors, expected.anchors)
            assert torch.equal(found.stays, expected.stays)


def test_no_seed_lies_on_a_stronger_edge_than_a_patch_that_is_none() -> None:
    view, masking = view_of(2, 7, 7), PgsMasking(anchor_ratio=0.2)
    edges = masking.edges(view)
    seeds = masking.anchors(view, noise=SampleNoise(0, torch.arange(3)))
    is_seed = torch.zeros_like(edges).scatter(1, seeds, 1.0).bool()
    for strength, chosen in zip(edges, is_seed, strict=True):
        assert strength[chosen].max() <= strength[~chosen].min()


def test_a_flat_image_has_no_edges_but_those_of_its_border_as_published() -> None:
    flat = torch.full((1, 7, 7), 0.8)
    assert not edge_scores(flat).any()
    published = edge_scores(flat, border="zero").view(7, 7)
    assert published[0, 0] == pytest.approx(1.0, abs=1e-5) and not published[1:-1, 1:-1].any()
    assert published[0, 3] == pytest.approx(0.943, abs=1e-3)


def test_published_edges_are_rounding_noise() -> None:
    assert float(centered_brightness(view_of(0, 7, 7).normalized).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [8, 49])
def test_sinkhorn_ends_with_rows_and_columns_of_one(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    pairs = torch.rand(2, size, size, generator=generator) + 0.1
    found = transported(pairs, "sinkhorn")
    for axis in (1, 2):
        torch.testing.assert_close(found.sum(axis), torch.ones(2, size), rtol=0, atol=1.1e-3)
    assert not transported(-pairs, "sinkhorn").any()
    assert not transported(pairs, "none").any()
    # the published one leaps: its sums are far from 1 however long it goes on
    published = transported(torch.ones(1, 8, 8), "published")
    assert float((published.sum(2) - 1).abs().max()) > 0.5


def test_an_image_is_transported_alike_whatever_else_is_in_its_batch() -> None:
    view, more = view_of(4, 6, 6), {"transport": "sinkhorn", "threshold": 0.8}
    masking = PgsMasking(**more)
    together = masking.mask(view, noise=SampleNoise(0, torch.arange(3)))
    for place in range(3):
        one = replace(view, images=view.images[place : place + 1])
        alone = masking.mask(one, noise=SampleNoise(0, torch.arange(place, place + 1)))
        assert torch.equal(alone.hits[0], together.hits[place])
    without = PgsMasking(**more | {"transport": "none"})
    other = without.mask(view, noise=SampleNoise(0, torch.arange(3)))
    assert not torch.equal(other.hits, together.hits)


def test_a_constant_patch_resembles_nothing() -> None:
    view = view_of(6, 5, 5)
    pixels = view.images.clone()
    pixels[:, :, :8, :8] = 0.5  # four patches of one color
    flat = replace(view, images=pixels)
    for transport in ("none", "sinkhorn", "published"):
        masking = PgsMasking(seeds="random", anchor_ratio=0.9, threshold=0.1, transport=transport)
        mask = masking.mask(flat, noise=SampleNoise(0, torch.arange(3)))
        assert not mask.masked[:, [0, 1, 5, 6]].any()
        assert mask.masked.any()


def test_the_threshold_is_searched_with_the_seeds_of_training() -> None:
    import logging

    view = view_of(7, 20, 20)
    masking = PgsMasking(threshold=None, target_mask_ratio=0.4, min_mask_ratio=0.1, edge_weight=0.5)
    found = masking.calibrate(
        [(view, SampleNoise(0, torch.arange(3)))],
        gather=lambda value: [value],
        log=logging.getLogger("test"),
    )
    assert isinstance(found, PgsMasking) and found.edge_weight == 0.5
    mask = found.mask(view, noise=SampleNoise(0, torch.arange(3)))
    assert float(mask.mask_ratio.mean()) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seeds": "edges"}, "reduction.image.seeds is 'edges'; choose from"),
        ({"transport": "optimal"}, "reduction.image.transport is 'optimal'; choose from"),
        ({"edge_border": "mirror"}, "reduction.image.edge_border is 'mirror'; choose from"),
        ({"edge_weight": -1.0}, "reduction.image.edge_weight"),
        ({"protect_above": 1.0}, "reduction.image.protect_above"),
        ({"threshold": None}, "neither a threshold nor a target_mask_ratio"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        PgsMasking(**options)


def test_anchors_of_no_edges_are_those_of_cluster_masking() -> None:
    noise = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    found = draw_seeds(noise, 5, seeds="random", weight=3.0)
    assert torch.equal(found, draw_anchors(noise, 5))
