"""What is chosen, against recorded runs of the reference implementation."""

from collections.abc import Sequence

import pytest
import torch
from cit_cases import Case, case, names
from torch import Tensor

from frugal.cit.selection import Collection, class_features, nearest_class, select


def prompts(about: dict) -> list[list[str]]:
    """Every name of a class in every template."""
    synonyms = [[label] if isinstance(label, str) else label for label in about["labels"]]
    return [
        [template.replace("{}", name) for template in about["templates"] for name in names]
        for names in synonyms
    ]


def features(recorded: Case, texts: Sequence[str], vectors: Tensor) -> Tensor:
    row = {text: place for place, text in enumerate(texts)}
    return class_features(
        prompts(recorded.about), lambda wanted: vectors[[row[text] for text in wanted]]
    )


@pytest.mark.parametrize("name", names("classifier"))
def test_class_features_are_the_recorded_ones(name: str) -> None:
    recorded = case(name)
    found = features(recorded, recorded.about["prompts"], recorded.tensors["prompt_embeds"])
    torch.testing.assert_close(found, recorded.tensors["class_features"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", names("curate"))
def test_a_curation_chooses_what_the_reference_chose(name: str) -> None:
    recorded = case(name)
    about, tensors = recorded.about, recorded.tensors
    classes = features(recorded, about["label_texts"], tensors["label_text_embeds"])
    torch.testing.assert_close(classes, tensors["label_features"], rtol=0, atol=1e-6)
    collection: Collection[str] = Collection(keep="list" if about["list_mode"] else "set")
    batches = scanned = 0
    while len(collection) < about["wanted"]:
        similarity, best = nearest_class(tensors["text_embeds"][batches], classes)
        torch.testing.assert_close(
            similarity, tensors["max_similarity"][batches], rtol=0, atol=1e-5
        )
        assert torch.equal(best.int(), tensors["best_class"][batches])
        found = select(similarity, threshold=about["threshold"], min_ratio=about["min_ratio"])
        assert torch.equal(found.chosen, tensors["selector"][batches])
        assert found.fell_back == bool(tensors["used_topk_fallback"][batches])
        keys = about["image_ids"][batches]
        collection.add(keys[row] for row in found.chosen.nonzero().flatten().tolist())
        batches, scanned = batches + 1, scanned + len(similarity)
    assert batches == about["batches_consumed"]
    assert len(collection) / scanned == about["ratio"]
    found_keys = collection.keys if about["list_mode"] else sorted(collection.keys)
    assert found_keys == about["result"]


def test_a_similarity_at_the_threshold_is_not_enough() -> None:
    similarity = torch.tensor([0.5, 0.5000001, 0.4999999])
    found = select(similarity, threshold=0.5, min_ratio=None)
    assert found.chosen.tolist() == [False, True, False]


def test_too_few_above_the_threshold_are_replaced_by_the_nearest() -> None:
    similarity = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.3, 0.0, 0.25, 0.1, 0.1, 0.1])
    # one in ten is above 0.8, of ten a share of 0.39 is the whole number 3; ties go in order
    found = select(similarity, threshold=0.8, min_ratio=0.39)
    assert found.fell_back
    assert found.chosen.nonzero().flatten().tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("min_ratio", "chosen"), [(0.1, [1]), (0.05, [1]), (None, [1]), (0.11, [1])]
)
def test_enough_above_the_threshold_stay_as_they_are(
    min_ratio: float | None, chosen: list[int]
) -> None:
    similarity = torch.tensor([0.1, 0.9] + 8 * [0.5])
    found = select(similarity, threshold=0.8, min_ratio=min_ratio)
    assert found.fell_back == (min_ratio == 0.11)
    assert found.chosen.nonzero().flatten().tolist() == chosen


def test_a_share_below_one_text_empties_the_selection() -> None:
    similarity = torch.tensor([0.9, 0.1, 0.2, 0.3])
    found = select(similarity, threshold=0.95, min_ratio=0.2)
    assert found.fell_back
    assert not found.chosen.any()


def test_a_further_template_changes_and_normalizes_a_class_anew() -> None:
    vectors = {"fox": torch.tensor([3.0, 0.0]), "a fox": torch.tensor([0.0, 0.5])}

    def embed(texts: Sequence[str]) -> Tensor:
        return torch.stack([vectors[text] for text in texts])

    alone = class_features([["fox"]], embed)
    both = class_features([["fox", "a fox"]], embed)
    assert alone.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(both, torch.tensor([[0.5**0.5, 0.5**0.5]]))


def test_a_list_keeps_what_comes_twice_and_a_set_does_not() -> None:
    for keep, expected in (("list", ["b", "a", "b"]), ("set", ["b", "a"])):
        collection: Collection[str] = Collection(keep=keep)
        taken = collection.add(["b", "a", "b"])
        assert collection.keys == expected
        assert taken == [True, True, keep == "list"]
