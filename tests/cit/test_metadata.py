"""Which classes are wanted."""

import subprocess
from pathlib import Path

import pytest

from frugal.cit.curated_data import CuratedData
from frugal.cit.metadata import Metadata
from frugal.common.errors import InputError
from frugal.common.evaluation.prompts import imagenet_class_names, named_templates
from frugal.common.evaluation.task_labels import TASKS, task_labels
from support import run_code

COUNTS = {
    "food101": (101, 1), "cifar10": (10, 18), "cifar100": (100, 18), "cub200": (200, 1),
    "sun397": (397, 2), "cars": (196, 8), "aircraft": (100, 2), "dtd": (47, 8), "pets": (37, 1),
    "caltech101": (102, 34), "flowers": (102, 1), "mnist": (10, 1), "fer2013": (7, 6),
    "stl10": (10, 2), "eurosat": (10, 3), "resisc45": (45, 18), "gtsrb": (43, 3),
    "kitti_distance": (4, 1), "country211": (211, 5), "patch_camelyon": (2, 1),
    "ucf101_frames": (101, 48), "kinetics700_frames": (700, 28), "clevr_counts": (8, 1),
    "hateful_memes": (2, 1), "rendered_sst2": (2, 1), "imagenet": (1000, 7),
}  # fmt: skip
"""Classes and templates, as the paper's evaluation has them."""


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_number_of_classes_and_templates(task: str) -> None:
    labels = task_labels(task)
    assert (len(labels.classes), len(labels.templates)) == COUNTS[task]
    assert all("{c}" in template and "{}" not in template for template in labels.templates)
    assert all(name.strip() for names in labels.classes for name in names)


def test_there_are_26_tasks_and_faces_have_synonyms() -> None:
    assert set(TASKS) == COUNTS.keys()
    assert any(len(names) > 1 for names in task_labels("fer2013").classes)
    assert [name for (name,) in task_labels("clevr_counts").classes][:2] == ["10", "3"]


def test_imagenet_is_the_list_of_open_clip() -> None:
    labels = task_labels("imagenet")
    assert [name for (name,) in labels.classes] == imagenet_class_names()
    assert sorted(labels.templates) == sorted(named_templates("imagenet_7"))


def test_all_names_of_all_tasks_are_3422() -> None:
    classes = Metadata(sources=("all",), flatten=True).classes()
    assert len(classes) == 3_422
    assert all(len(wanted.prompts) == 1 for wanted in classes)


def test_several_tasks_come_one_after_the_other_and_equal_classes_once() -> None:
    classes = Metadata(sources=("cifar10", "stl10")).classes()
    names = [wanted.name for wanted in classes]
    assert names[:10] == [name for (name,) in task_labels("cifar10").classes]
    both = {n for t in ("cifar10", "stl10") for (n,) in task_labels(t).classes}
    assert len(names) == len(set(names)) == len(both)


def test_templates_are_put_around_every_name() -> None:
    plain = Metadata(sources=("fer2013",)).classes()[0]
    own = Metadata(sources=("fer2013",), templates=("task", "{c}!")).classes()[0]
    assert plain.prompts == task_labels("fer2013").classes[0]
    assert len(own.prompts) == 7 * len(plain.prompts)
    assert f"{plain.name}!" in own.prompts


def test_a_text_file_has_a_class_per_line_and_tabs_between_its_names(tmp_path: Path) -> None:
    file = tmp_path / "wanted.txt"
    file.write_text("red fox\n\n  snow owl \tNyctea scandiaca\nred fox\n")
    classes = Metadata(sources=(str(file), "mnist"), templates=("a {c}",)).classes()
    assert classes[0].prompts == ("a red fox",)
    assert classes[1].prompts == ("a snow owl", "a Nyctea scandiaca")
    assert len(classes) == 2 + 10
    file.write_bytes("\ufeffred fox\r\nsnow\u2028owl\r\n".encode())
    found = Metadata(sources=(str(file),), templates=("a {c}",)).classes()
    assert [wanted.prompts for wanted in found] == [("a red fox",), ("a snow\u2028owl",)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sources": ()}, "empty"),
        ({"sources": ("no_such_task",)}, "no_such_task"),
        ({"sources": ("missing/names.txt",)}, "does not exist"),
        ({"templates": ()}, "empty"),
        ({"templates": ("a photo",)}, "{c}"),
    ],
)
def test_what_names_nothing_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Metadata(**fields).classes()


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("\n  \n")
    with pytest.raises(InputError, match="names no class"):
        Metadata(sources=(str(file),)).classes()
    file.write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        Metadata(sources=(str(file),)).classes()
    file.write_text("fox\n")
    with pytest.raises(InputError, match="no task"):
        Metadata(sources=(str(file),), templates=("task",)).classes()


def wordnet(folder: Path) -> subprocess.CompletedProcess[str]:
    """The nouns that a process finds whose language data lies in a folder."""
    code = "from frugal.cit.metadata import wordnet_nouns as w; print(*w(), sep='|')"
    return run_code(code, NLTK_DATA=str(folder), HOME=str(folder))


def test_wordnet_gives_the_lemmas_of_nouns(tmp_path: Path) -> None:
    # a WordNet of two nouns, in its own format
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for kind in ("index", "data"):
            (folder / f"{kind}.{part}").write_text("  1 license\n")
        (folder / f"{part}.exc").write_text("")
    (folder / "index.sense").write_text("")
    (folder / "lexnames").write_text("00\tadj.all\t3\n01\tnoun.Tops\t1\n")
    (folder / "index.noun").write_text(
        "  1 license\nsnow_owl n 1 0 1 0 00000012  \nred_fox n 1 0 1 0 00000013  \n"
    )
    found = wordnet(tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "red fox|snow owl"


def test_without_wordnet_a_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    found = wordnet(tmp_path)
    assert "InputError" in found.stderr
    assert "nltk.downloader wordnet" in found.stderr


def test_other_names_in_a_file_of_classes_are_other_data_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n")
    data = CuratedData(train=("a.tar",), tokenizer=None, metadata=Metadata(sources=(str(file),)))
    before = data.also_read()
    assert data.also_read() == before and list(before) == ["data.metadata"]
    file.write_text("cat\nfox\n")
    assert data.also_read() != before
