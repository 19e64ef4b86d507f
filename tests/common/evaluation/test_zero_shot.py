"""Zero-shot classification: prompts, class embeddings and accuracies."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids
from clip_benchmark.metrics import zeroshot_classification as reference
from open_clip import zero_shot_metadata
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from frugal.common.data.labeled import grouped
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.class_names import Naming, held_out_classes, naming
from frugal.common.evaluation.embed import TEXTS_AT_ONCE, Embedder, evaluating, text_table
from frugal.common.evaluation.metrics import (
    mean_per_class_recall,
    ranked_classes,
    top_k_accuracy,
)
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.prompts import (
    class_embeddings,
    imagenet_class_names,
    named_templates,
    prompts,
)
from frugal.common.evaluation.remarks import Remarks, same_names
from frugal.common.evaluation.zero_shot import ZeroShot, classify

WIDTH = 12


def accuracy(scores, labels, topk) -> list[float]:
    """clip_benchmark's own; it says float() to arrays of one element, which NumPy 2.4 refuses."""
    with mock.patch.object(reference, "float", lambda array: array.item(), create=True):
        return reference.accuracy(scores, labels, topk=topk)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    pad_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def assemble(self, ids, length: int) -> list[int]:
        return [1, *ids[: length - 2], 2]


class Towers(nn.Module):
    """Any function of the text and of the mean color will do; the vectors are not unit length."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.words = nn.Embedding(256, WIDTH)
        self.words.weight.data = torch.randn(256, WIDTH, generator=generator)
        self.colors = nn.Parameter(torch.randn(3, WIDTH, generator=generator))
        self.drop = nn.Dropout(0.5)
        self.texts_seen: list[int] = []

    def encode_text(self, token_ids, text_lengths):
        self.texts_seen.append(len(token_ids))
        place = torch.arange(token_ids.shape[1])
        inside = (place < text_lengths[:, None])[..., None]
        weight = torch.cos(place * 0.7)[:, None]
        return self.drop((self.words(token_ids) * weight * inside).sum(1))

    def encode_image(self, images):
        assert images.dtype == torch.uint8
        return self.drop(images.float().mean((2, 3)) @ self.colors)


def embedder() -> Embedder:
    return Embedder(Towers().eval(), Bytes(), context_length=64, device=torch.device("cpu"))


class Labeled:
    """Labeled images in memory."""

    class_names = None
    templates = None

    def __init__(self, images, labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rank, world_size, batch_size, workers):
        places = torch.arange(len(self))[rank::world_size]
        for part in places.split(batch_size):
            yield self.images[part], self.labels[part], part


def colored(count: int, classes: int, seed: int = 0) -> Labeled:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 4, 6), generator=generator, dtype=torch.uint8)
    return Labeled(images, torch.randint(classes, (count,), generator=generator))


# Metrics.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "classes"), [(50, 5), (33, 64), (400, 1000), (7, 6)])
def test_accuracies_equal_clip_benchmark(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    scores[torch.arange(count), labels] += 1.5
    ranked = ranked_classes(scores)
    ours = [top_k_accuracy(ranked, labels, k) for k in (1, 5)]
    assert ours == accuracy(scores, labels, topk=(1, 5))
    best = scores.argmax(1)
    expected = balanced_accuracy_score(labels.numpy(), best.numpy())
    assert mean_per_class_recall(best, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 9, 70, 400])
def test_ties_fall_as_in_clip_benchmark(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    scores = torch.randint(3, (300, classes), generator=generator).float()
    labels = torch.randint(classes, (300,), generator=generator)
    ks = (1, 5) if classes >= 5 else (1,)  # as its evaluate asks for
    ranked = ranked_classes(scores)
    assert [top_k_accuracy(ranked, labels, k) for k in ks] == accuracy(scores, labels, topk=ks)
    for row in ranked:
        assert len(set(row.tolist())) == min(5, classes)


def test_with_fewer_than_five_classes_each_is_among_the_top_five() -> None:
    scores, labels = torch.randn(40, 3), torch.randint(3, (40,))
    ranked = ranked_classes(scores)
    assert ranked.shape == (40, 3)
    assert top_k_accuracy(ranked, labels, 5) == 1.0
    right = int((scores.argmax(1) == labels).sum())
    assert top_k_accuracy(ranked, labels, 1) == right / 40


def test_classes_without_images_do_not_count_in_the_mean_per_class() -> None:
    labels = torch.tensor([0, 0, 0, 0, 7])
    predicted = torch.tensor([0, 0, 0, 3, 2])
    assert mean_per_class_recall(predicted, labels) == (3 / 4 + 0) / 2


# Prompts.


def slow_class_embedding(texts: list[str]) -> np.ndarray:
    """The definition, one prompt at a time, in float64."""
    towers, tokens = Towers().double().eval(), Bytes()
    total = np.zeros(WIDTH)
    for text in texts:
        ids = tokens.assemble(tokens.encode(text), 64)
        with torch.no_grad():
            vector = towers.encode_text(torch.tensor([ids]), torch.tensor([len(ids)]))[0].numpy()
        total += vector / math.sqrt((vector**2).sum())
    mean = total / len(texts)
    return mean / math.sqrt((mean**2).sum())


NAMES = ["red circle", ("sofa", "couch", "settee"), "äpple", "red circle", "tram"]
TEMPLATES = ["a photo of a {c}.", "{c}", "the {c}, or another {c}"]


MANY = [f"{{c}} number {number}" for number in range(150)]


@pytest.mark.parametrize(
    ("names", "templates"),
    [
        (NAMES, TEMPLATES),
        (["tram"], ["{c}"]),
        (NAMES, MANY),  # more prompts of a class than are encoded at a time
        ([f"thing {number}" for number in range(100)], TEMPLATES),  # more classes than that
    ],
)
def test_class_embeddings_follow_the_definition(names, templates) -> None:
    source = embedder()
    with torch.no_grad():
        ours = class_embeddings(source, names, templates, ranks=Ranks())
    assert max(source.model.texts_seen) <= TEXTS_AT_ONCE
    for row, name in zip(ours, names, strict=True):
        words = [name] if isinstance(name, str) else name
        texts = [t.replace("{c}", word) for word in words for t in templates]
        np.testing.assert_allclose(row.numpy(), slow_class_embedding(texts), atol=1e-6)


def test_prompts_are_normalized_before_they_are_averaged() -> None:
    with torch.no_grad():
        ours = class_embeddings(embedder(), ["tram"], TEMPLATES, ranks=Ranks())[0]
        raw = embedder()
        vectors = []
        for text in prompts("tram", TEMPLATES):
            ids = raw.tokenizer.assemble(raw.tokenizer.encode(text), 64)
            vectors.append(raw.model.encode_text(torch.tensor([ids]), torch.tensor([len(ids)])))
    averaged_first = nn.functional.normalize(torch.cat(vectors).mean(0), dim=0)
    assert (ours - averaged_first).abs().max() > 1e-3


def test_classes_of_the_same_name_tie_to_the_last_bit() -> None:
    names = [f"thing {n % 190}" for n in range(380)]
    ours = class_embeddings(embedder(), names, TEMPLATES, ranks=Ranks())
    assert torch.equal(ours[:190], ours[190:])


def test_images_are_grouped_by_64_however_they_come() -> None:
    rows = torch.arange(150)
    whole = [(part, part * 2) for part in rows.split(64)]
    for size in (1, 7, 50, 64, 100, 1000):
        ours = list(grouped((part, part * 2) for part in rows.split(size)))
        for mine, theirs in zip(ours, whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert list(grouped(iter([]))) == []
    assert [len(part[0]) for part in grouped((r,) for r in rows[:128].split(64))] == [64, 64]


def test_equal_texts_are_encoded_once() -> None:
    source = embedder()
    table = text_table(source, ["one", "two", "one", "three", "two"], ranks=Ranks())
    assert sum(source.model.texts_seen) - 1 == 3  # one more to learn the width
    assert torch.equal(table[0], table[2])
    assert torch.equal(table[1], table[4])
    assert torch.allclose(table[3], source.texts(["three"])[0], atol=1e-6)


def test_texts_that_the_tower_sees_alike_are_encoded_once() -> None:
    source = embedder()
    table = text_table(source, ["x" * 70, "y", "x" * 62, "x" * 80 + "y"], ranks=Ranks())
    assert sum(source.model.texts_seen) - 1 == 2
    assert torch.equal(table[0], table[2]) and torch.equal(table[0], table[3])
    assert not torch.equal(table[0], table[1])


def test_texts_too_long_for_the_tower_are_cut_by_the_tokenizer() -> None:
    source = embedder()
    assert torch.equal(source.texts(["x" * 500]), source.texts(["x" * 62]))


@pytest.mark.parametrize(
    ("length", "told"),
    [
        (30, None),
        # two special tokens leave 12 bytes; "a photo of a " has 13, and "trolleybuses" 12
        (14, "the name of the class is cut off in 1 of 3 templates, and in part in 1 of 6 prompts"),
        (5, "the name of the class is cut off in 1 of 3 templates, and in part in 4 of 6 prompts"),
    ],
)
def test_prompts_that_lose_the_name_of_the_class_are_counted(length, told, caplog) -> None:
    source = Embedder(Towers(), Bytes(), context_length=length, device=torch.device("cpu"))
    templates = ["a photo of a {c}.", "a {c}", "{c} there"]
    for _ in range(2):  # it is told once
        with torch.no_grad(), caplog.at_level("WARNING", logger="frugal"):
            class_embeddings(source, ["tram", ["trolleybuses"]], templates, ranks=Ranks())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (told is not None)
    assert told is None or (told in messages[0] and f"length of {length} tokens" in messages[0])


def test_imagenet_names_and_templates_are_open_clips() -> None:
    names = imagenet_class_names()
    assert names == list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    for name, published in (
        ("imagenet_80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet_7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES),
    ):
        templates = named_templates(name)
        assert prompts("tench", templates) == [template("tench") for template in published]
        assert len(templates) == int(name.rpartition("_")[2])
    assert named_templates("name") == ["{c}"]


@pytest.mark.parametrize(
    ("name", "templates", "message"),
    [
        ("", ["{c}"], "empty name"),
        ((), ["{c}"], "empty name"),
        (("sofa", " "), ["{c}"], "empty name"),
        ("sofa", [], "no prompt templates"),
        ("sofa", ["a photo"], "has no {c}"),
    ],
)
def test_useless_prompts_are_refused(name, templates, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompts(name, templates)


def test_braces_in_a_class_name_stay() -> None:
    assert prompts("f{x}", ["a {c}"]) == ["a f{x}"]


# The whole task, on images in memory.


def reference_answers(data: Labeled, names) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines in float64, all at once."""
    classes = np.stack([slow_class_embedding(prompts(name, TEMPLATES)) for name in names])
    pixels = data.images.double().mean((2, 3)).numpy()
    vectors = pixels @ Towers().colors.detach().double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = torch.from_numpy(vectors @ classes.T)
    return scores, data.labels


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_equal_clip_benchmark_on_the_same_embeddings(batch_size: int) -> None:
    names = [f"color {n}" for n in range(11)]
    data = colored(50, len(names))
    scores, labels = reference_answers(data, names)
    source = embedder()
    with torch.no_grad():
        classes = class_embeddings(source, names, TEMPLATES, ranks=Ranks())
        numbers = classify(source, data, classes, batch_size=batch_size).numbers()
    top1, top5 = accuracy(scores, labels, topk=(1, 5))
    assert (numbers["top1"], numbers["top5"]) == (top1, top5)
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert numbers["mean_per_class_recall"] == pytest.approx(expected)
    assert (numbers["images"], numbers["classes"]) == (50, 11)


def test_held_out_classes_are_scored_among_all_classes() -> None:
    labels = torch.tensor([0, 1, 2, 2, 2, 1])
    ranked = torch.tensor([[0, 1], [0, 1], [2, 0], [0, 2], [2, 1], [1, 0]])
    answers = Predictions(labels, ranked[:, 0], ranked, 4)
    assert answers.held_out_numbers([2, 3]) == {
        "top1_held_out": 2 / 3,
        "images_held_out": 3,
        "classes_held_out": 2,
    }
    assert answers.held_out_numbers([]) == {}
    assert answers.held_out_numbers([3]) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part[:-1], "1 of 9 images were not evaluated exactly once; image 8 came 0"),
        (lambda part: torch.cat([part, part[:1]]), "image 0 came 2 times"),
    ],
)
def test_an_image_counted_twice_or_not_at_all_is_noticed(change, message: str) -> None:
    class Wrong(Labeled):
        def batches(self, rank, world_size, batch_size, workers):
            part = change(torch.arange(len(self)))
            yield self.images[part], self.labels[part], part

    data = colored(9, 2)
    with pytest.raises(RuntimeError, match=message), torch.no_grad():
        classify(embedder(), Wrong(data.images, data.labels), torch.eye(2, WIDTH), batch_size=9)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_without_a_class_name_is_refused(label: int) -> None:
    data = colored(4, 2)
    data.labels[1] = label
    with pytest.raises(InputError, match=f"label {label}, but there are names for 2 classes"):
        classify(embedder(), data, torch.eye(2, WIDTH), batch_size=2)


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="no images to classify"):
        classify(embedder(), colored(0, 1), torch.eye(2, WIDTH), batch_size=2)


def test_the_mode_of_every_module_comes_back() -> None:
    model = Towers().train()
    model.words.eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert model.training
    assert model.drop.training
    assert not model.words.training
    assert torch.is_grad_enabled()


# Names and templates of a data set.


def described(names, templates=None, folders=None) -> SimpleNamespace:
    return SimpleNamespace(
        class_names=names, templates=templates, class_folders=folders, empty_folders=[],
        has_given_names=folders is None,
    )  # fmt: skip


def class_folders(names, classnames=None) -> SimpleNamespace:
    """Data whose labels count class folders, which may have been given names of their own."""
    data = described(list(classnames or names), folders=list(names))
    data.has_given_names = classnames is not None
    return data


def naming_of(task: ZeroShot, data, source: Path) -> Naming:
    return naming(task.class_names, task.templates, data, source)


def names_and_templates(task: ZeroShot, data, source: Path) -> tuple[list, list[str]]:
    found = naming_of(task, data, source)
    return found.names, found.templates


def test_own_names_and_templates_come_first(tmp_path) -> None:
    data = described(["cat", "dog"], ["a {c}"])
    assert names_and_templates(ZeroShot(), data, tmp_path) == (["cat", "dog"], ["a {c}"])
    bare = ZeroShot(templates="name")
    assert names_and_templates(bare, data, tmp_path) == (["cat", "dog"], ["{c}"])
    seven = named_templates("imagenet_7")
    assert names_and_templates(ZeroShot(), described(["cat"]), tmp_path) == (["cat"], seven)


IMAGENET = list(zero_shot_metadata.IMAGENET_CLASSNAMES)
NAME_OF = dict(zip(all_imagenet_wordnet_ids, IMAGENET, strict=True))


def names_of(data, tmp_path, **options) -> list:
    return names_and_templates(ZeroShot(**options), data, tmp_path)[0]


def test_folders_that_are_wordnet_ids_get_imagenets_names(tmp_path) -> None:
    data = class_folders(all_imagenet_wordnet_ids)
    names, templates = names_and_templates(ZeroShot(), data, tmp_path)
    assert names == IMAGENET
    assert templates == named_templates("imagenet_7")
    assert names_of(data, tmp_path, class_names="imagenet") == IMAGENET


def test_some_of_imagenets_classes_are_asked_about_alone(tmp_path) -> None:
    # as ImageNet-A and ImageNet-R are: 200 of the 1,000
    some = sorted(all_imagenet_wordnet_ids[n] for n in range(3, 1000, 5))
    assert len(some) == 200
    for data in (class_folders(some), described(some)):
        found = naming_of(ZeroShot(), data, tmp_path)
        assert found.names == [NAME_OF[n] for n in some] and found.numbers is None
        assert found.incomplete == "200 of the 1,000 classes of ImageNet-1k"


def test_some_of_imagenets_classes_are_found_among_all_of_its_names(tmp_path) -> None:
    places = [*range(998, 3, -7)]  # neither sorted nor contiguous
    some = [all_imagenet_wordnet_ids[n] for n in places]
    for data in (class_folders(some), described(some)):
        found = naming_of(ZeroShot(class_names="imagenet"), data, tmp_path)
        assert found.names == IMAGENET and found.numbers == places
        assert found.incomplete == f"{len(places)} of the 1,000 classes of ImageNet-1k"
    whole = naming_of(
        ZeroShot(class_names="imagenet"), class_folders(all_imagenet_wordnet_ids), tmp_path
    )
    assert whole.numbers == list(range(1000)) and whole.incomplete == ""


@pytest.mark.parametrize("options", [{}, {"class_names": "imagenet"}])
def test_folders_numbered_as_imagenets_classes_get_its_names(tmp_path, options) -> None:
    numbers = class_folders([str(number) for number in range(1000)])
    assert names_of(numbers, tmp_path, **options) == IMAGENET


def test_a_few_numbers_are_not_taken_for_imagenets_classes(tmp_path) -> None:
    digits = class_folders([str(number) for number in range(10)])
    with pytest.raises(InputError, match="holds 10 classes, but ImageNet-1k has 1000 names"):
        names_of(digits, tmp_path, class_names="imagenet")


@pytest.mark.parametrize(
    "folders",
    [
        [str(number) for number in range(1, 1001)],
        [f"{number:03d}" for number in range(1000)],
        ["0", "1", "3", "17"],
        ["7", "cat"],
    ],
    ids=["from one", "padded", "gaps", "one of two"],
)
def test_names_that_are_bare_numbers_make_no_prompts(tmp_path, folders) -> None:
    with pytest.raises(InputError, match=r"called by numbers such as .*classnames\.json") as caught:
        names_of(class_folders(folders), tmp_path)
    assert "--zero-shot.class-names" in str(caught.value) and "\n" not in str(caught.value)
    given = [f"thing {folder}" for folder in folders]
    assert names_of(class_folders(folders, given), tmp_path) == given
    # in tars they stand in the file of names
    assert names_of(described(folders[:4]), tmp_path) == folders[:4]


def test_padded_numbers_of_all_thousand_are_imagenets_if_it_is_said(tmp_path) -> None:
    padded = [f"{number:03d}" for number in range(1000)]
    assert names_of(class_folders(padded), tmp_path, class_names="imagenet") == IMAGENET
    from_one = [str(number) for number in range(1, 1001)]
    with pytest.raises(InputError, match="neither ImageNet-1k's WordNet ids nor the numbers"):
        names_of(class_folders(from_one), tmp_path, class_names="imagenet")


def test_names_given_to_the_folders_win_over_imagenets(tmp_path) -> None:
    some = all_imagenet_wordnet_ids[:2]
    data = class_folders(some, ["a fish", "another"])
    assert names_of(data, tmp_path) == ["a fish", "another"]
    found = naming_of(ZeroShot(class_names="imagenet"), data, tmp_path)
    assert (found.names, found.numbers) == (IMAGENET, [0, 1])


@pytest.mark.parametrize("odd", ["n99999999", "notes"])
def test_a_folder_that_is_no_class_of_imagenet_is_refused(tmp_path, odd: str) -> None:
    data = class_folders([*all_imagenet_wordnet_ids[:5], odd])
    with pytest.raises(InputError, match=f"has the class {odd}, which is no WordNet id of ImageN"):
        names_of(data, tmp_path)


def test_folders_that_cannot_be_told_apart_by_imagenets_names_are_refused(tmp_path) -> None:
    data = class_folders([f"class {number:03d}" for number in range(1000)])
    with pytest.raises(InputError, match="neither ImageNet-1k's WordNet ids nor the numbers"):
        names_of(data, tmp_path, class_names="imagenet")


def test_another_number_of_classes_than_imagenets_is_refused(tmp_path) -> None:
    names = [f"class {number}" for number in range(998)]
    for data in (described(names), class_folders(names)):
        with pytest.raises(InputError, match="holds 998 classes, but ImageNet-1k has 1000 names"):
            names_of(data, tmp_path, class_names="imagenet")


def test_data_without_names_needs_some(tmp_path) -> None:
    with pytest.raises(InputError, match=r"add a classnames\.txt"):
        names_and_templates(ZeroShot(), described(None), tmp_path)
    task = ZeroShot(class_names="imagenet", templates="imagenet_80")
    names, templates = names_and_templates(task, described(None), tmp_path)
    assert (len(names), len(templates)) == (1000, 80)


def test_held_out_classes_are_read_and_checked(tmp_path) -> None:
    assert held_out_classes(tmp_path, 4) == []
    path = tmp_path / "held_out.txt"
    path.write_text("3\n1\n")
    assert held_out_classes(tmp_path, 4) == [1, 3]
    for wrong in ("4\n", "red circle\n", "-1\n"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="one class index below 4 per line"):
            held_out_classes(tmp_path, 4)


def cut_at(length: int):
    """Letters as tokens, the first few of them."""
    return lambda text: [ord(letter) for letter in text.lower()[:length]]


def test_classes_that_no_prompt_tells_apart_are_found() -> None:
    names = [
        "crane",
        "kite",
        "crane",
        "Kite",
        "gray_seal",
        "gray seal",
        ("a", "b"),
        ("b", "a"),
        "x",
    ]
    whole = same_names(names, ["a photo of a {c}.", "{c}"], cut_at(99))
    assert whole == [[0, 2], [1, 3], [4, 5], [6, 7]]
    # "a photo of a " has 13 letters
    cut = ["black cat", "black dog", "white dog", "black"]
    assert same_names(cut, ["a photo of a {c}"], cut_at(19)) == [[0, 1]]
    assert same_names(cut, ["a photo of a {c}", "{c}."], cut_at(19)) == []
    assert same_names(cut, ["a photo of a {c}", "{c}."], cut_at(6)) == [[0, 1]]


def test_what_is_odd_is_told_by_name_and_kept(caplog) -> None:
    labels = ["crane", "kite", "crane", "seal"]
    remarks = Remarks([[0, 2]], [1, 3], "4 of the 9 classes")
    remarks.passed_over.add("files that are no images (.txt)", "a/b.txt", count=3)
    remarks.tell("mine", labels, logging.getLogger("test"))
    assert (
        "'crane' (0) = 'crane' (2)" in caplog.text
        and "no image of 2 classes: kite, seal" in caplog.text
    )
    assert "mine: the data has 4 of the 9 classes" in caplog.text
    assert remarks.numbers() == {"same_names": 2, "classes_without_images": 2, "passed_over": 3}
    assert remarks.facts(labels) == {
        "same_names": [[[0, "crane"], [2, "crane"]]],
        "classes_without_images": ["kite", "seal"],
        "incomplete": "4 of the 9 classes",
        "passed_over": {"files that are no images (.txt)": 3},
    }
    assert Remarks().numbers() == Remarks().facts(labels) == {}
