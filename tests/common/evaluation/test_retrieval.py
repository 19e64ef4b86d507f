"""Image-text retrieval against clip_benchmark's own functions."""

from __future__ import annotations

import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from torch import Tensor, nn

from frugal.common.distributed import Ranks
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.metrics import recall_at
from frugal.common.evaluation.retrieval import embed
from frugal.common.report.examples import retrieval_examples

AT = (1, 5, 10)


def unit(*shape: int, seed: int) -> Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(noise, dim=-1)


def captions_per_image(images: int, most: int, seed: int) -> Tensor:
    """(M,) the image of each text: 1 to ``most`` texts per image, in order."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, most + 1, (images,), generator=generator)
    return torch.arange(images).repeat_interleave(counts)


def clip_benchmarks(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, list[float]]:
    """What clip_benchmark's evaluate does with embeddings."""
    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), image_of_text] = True
    return {
        "image": [(recall_at_k(scores, positive, k) > 0).float().mean().item() for k in AT],
        "text": [(recall_at_k(scores.T, positive.T, k) > 0).float().mean().item() for k in AT],
    }


def both(images: Tensor, texts: Tensor, image_of_text: Tensor, **options) -> dict[str, list[float]]:
    recall = recall_at(images, texts, image_of_text, at=AT, **options)
    return {
        "image": [recall.image_retrieval[k] for k in AT],
        "text": [recall.text_retrieval[k] for k in AT],
    }


def assert_same(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    for way in ("image", "text"):
        assert ours[way] == pytest.approx(theirs[way], abs=1e-6)  # theirs are float32 means


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "width", "most"), [(13, 3, 1), (60, 8, 5), (150, 16, 7)])
def test_recall_equals_clip_benchmark(seed: int, count: int, width: int, most: int) -> None:
    image_of_text = captions_per_image(count, most, seed)
    images = unit(count, width, seed=seed)
    noise = unit(len(image_of_text), width, seed=seed + 99)
    texts = nn.functional.normalize(images[image_of_text] + 0.9 * noise, dim=-1)
    theirs = clip_benchmarks(images, texts, image_of_text)
    assert_same(both(images, texts, image_of_text), theirs)
    assert 0 < theirs["image"][0] < theirs["image"][2]


def test_captions_in_any_order_may_belong_to_any_image() -> None:
    image_of_text = torch.randint(20, (90,), generator=torch.Generator().manual_seed(1))
    images, texts = unit(20, 6, seed=1), unit(90, 6, seed=2)
    assert_same(both(images, texts, image_of_text), clip_benchmarks(images, texts, image_of_text))


@pytest.mark.parametrize("seed", range(3))
def test_ties_fall_as_in_clip_benchmark(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_of_text = captions_per_image(40, 3, seed)
    # small integers: every product is exact, and most are tied
    images = torch.randint(-1, 2, (40, 4), generator=generator).float()
    texts = torch.randint(-1, 2, (len(image_of_text), 4), generator=generator).float()
    theirs = clip_benchmarks(images, texts, image_of_text)
    for scores_at_once in (1, 500, 1 << 24):
        assert_same(both(images, texts, image_of_text, scores_at_once=scores_at_once), theirs)


@pytest.mark.parametrize("scores_at_once", [1, 130, 1000])
def test_the_similarity_is_never_held_whole(scores_at_once: int, monkeypatch) -> None:
    from frugal.common.evaluation import metrics

    held: list[int] = []

    def watched(queries: Tensor, candidates: Tensor) -> Tensor:
        held.append(len(queries) * len(candidates))
        return queries @ candidates.T

    monkeypatch.setattr(metrics, "similarity", watched)
    images, texts = unit(30, 5, seed=0), unit(60, 5, seed=1)
    image_of_text = torch.arange(30).repeat_interleave(2)
    chunked = both(images, texts, image_of_text, scores_at_once=scores_at_once)
    assert max(held) <= max(scores_at_once, 60)  # or one row
    monkeypatch.undo()
    assert chunked == both(images, texts, image_of_text)


def test_with_fewer_candidates_than_k_everything_is_found() -> None:
    images, texts = unit(4, 5, seed=0), unit(4, 5, seed=1)
    recall = recall_at(images, texts, torch.arange(4), at=(1, 5, 10))
    assert recall.image_retrieval[5] == recall.text_retrieval[10] == 1.0
    assert recall.image_retrieval[1] < 1.0


def test_an_image_without_captions_is_never_found() -> None:
    images = torch.eye(3)
    recall = recall_at(images, torch.eye(3)[:2], torch.tensor([0, 1]), at=(1,))
    assert recall.text_retrieval[1] == pytest.approx(2 / 3)
    assert recall.image_retrieval[1] == 1.0


class Letters:
    pad_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def assemble(self, ids, length: int) -> list[int]:
        return list(ids[:length])


class Towers(nn.Module):
    """Texts "0", "1", ... and images of that gray value meet."""

    def encode_text(self, token_ids, text_lengths):
        digits = (token_ids - ord("0")).clamp(0, 9).float()
        values = [
            row[:length] @ 10.0 ** torch.arange(length - 1, -1, -1)
            for row, length in zip(digits, text_lengths.tolist(), strict=True)
        ]
        angle = torch.stack(values) / 20
        return 3 * torch.stack([angle.cos(), angle.sin()], dim=1)

    def encode_image(self, images):
        angle = images.float().mean((1, 2, 3)) / 20
        return 0.5 * torch.stack([angle.cos(), angle.sin()], dim=1)


class Captioned:
    def __init__(self, gray: list[int], captions: list[list[str]]) -> None:
        self.gray, self.captions = torch.tensor(gray, dtype=torch.uint8), captions

    def __len__(self) -> int:
        return len(self.gray)

    def batches(self, rank, world_size, batch_size, workers):
        places = torch.arange(len(self))[rank::world_size]
        for part in places.split(batch_size):
            yield self.gray[part][:, None, None, None].expand(-1, 3, 2, 3), part


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_an_image_is_found_if_any_of_its_captions_is(batch_size: int) -> None:
    data = Captioned([10, 20, 30], [["10", "60"], ["21"], ["12", "55", "44"]])
    source = Embedder(Towers(), Letters(), context_length=4, device=torch.device("cpu"))
    embedded = embed(source, data, batch_size=batch_size)
    assert embedded.image_of_text.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.allclose(embedded.texts.norm(dim=1), torch.ones(6))
    recall = embedded.recall(Ranks())
    # nearest caption: of 10 its "10", of 20 its "21", of 30 the "21" of another
    assert recall.text_retrieval[1] == pytest.approx(2 / 3)
    # nearest image: "10" and "12" to 10, "21" to 20, the rest to 30; right are 10, 21, 55 and 44
    assert recall.image_retrieval[1] == pytest.approx(4 / 6)


def test_the_nearest_captions_are_distinct_and_the_own_ones_marked() -> None:
    data = Captioned([10, 20, 30, 40], [["11", "60"], ["19", "11"], ["31"], ["60", "75"]])
    source = Embedder(Towers(), Letters(), context_length=4, device=torch.device("cpu"))
    said = [
        [(guess.text, guess.right) for guess in example.guesses]
        for example in retrieval_examples(source, data, count=4)
    ]
    assert said == [
        [("11", True), ("19", False), ("31", False)],
        [("19", True), ("11", True), ("31", False)],
        [("31", True), ("19", False), ("11", False)],
        [("31", False), ("60", True), ("19", False)],
    ]
