"""What cannot be curated is said in one sentence."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from cit_runs import MODULE, pairs, words

from frugal.cit.curated_data import CuratedData
from frugal.cit.recipes import demo
from frugal.common.data.samples import Fields
from frugal.common.errors import InputError
from support import ALONE, metrics, rewrite_shard, train

PASSES_NOTHING = ("--data.threshold=1", "--data.min-ratio", "None")


def fails(pool: Path, run: Path, *more: str) -> str:
    """The one sentence with which a run ends."""
    output = train(ALONE, run, *more, small=words(pool), module=MODULE, expect=2)
    assert "Traceback" not in output
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return sentence


def test_a_threshold_that_nothing_passes_ends_with_the_best_similarity(
    pool: Path, tmp_path: Path
) -> None:
    sentence = fails(pool, tmp_path / "run", *PASSES_NOTHING, "--data.max-scanned=400")
    assert "scanned 400 captions and kept 0 of the 120" in sentence
    best = float(sentence.split("best similarity it saw is ")[1].split(" ")[0])
    assert 0 < best < 1
    # without a limit the pool of 700 is gone through once, in units of 40
    sentence = fails(pool, tmp_path / "another", *PASSES_NOTHING)
    assert "scanned 720 captions" in sentence


def test_what_is_missing_is_filled_up_with_the_nearest_where_that_is_wanted(
    pool: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = train(
        ALONE, run, *PASSES_NOTHING, "--data.when-short=best", "--data.max-scanned=400",
        small=words(pool), module=MODULE,
    )  # fmt: skip
    assert output.count("the nearest of the others fill up") == 4
    assert [len(set(part)) for part in pairs(run)] == [120] * 4
    assert all(line["kept_ratio"] == 0 for line in metrics(run))


def test_a_pool_smaller_than_one_curation_is_refused(pool: Path, tmp_path: Path) -> None:
    more = ("--data.period=40", "--schedule.samples=960")
    sentence = fails(pool, tmp_path / "run", *more)
    assert "holds 700 pairs, fewer than one curation" in sentence
    assert "= 960" in sentence


def test_metadata_without_a_name_is_refused(pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "nothing.txt"
    file.write_text("\n")
    assert "names no class" in fails(pool, tmp_path / "run", f"--data.metadata.sources={file}")


def test_captions_without_text_are_refused_and_single_ones_passed_over(
    pool: Path, tmp_path: Path
) -> None:
    sentence = fails(pool, tmp_path / "run", "--data.fields.caption", "json.title")
    assert "none of the 720 samples" in sentence and "json.title" in sentence

    mixed = tmp_path / "mixed"
    (mixed / "train").mkdir(parents=True)
    (mixed / "zero_shot").symlink_to(pool / "zero_shot")
    for path in (pool / "train").glob("*.tar"):
        empty_some(path, mixed / "train" / path.name)
    run = tmp_path / "mixed_run"
    output = train(ALONE, run, small=words(mixed), module=MODULE)
    assert "without text" in output
    chosen = {pair for part in pairs(run) for pair in part}
    assert len(chosen) > 120
    assert all(index % 3 for _, index, _ in chosen)


def empty_some(source: Path, out: Path) -> None:
    """Copy a shard with every third caption made empty."""
    place: dict[str, int] = {}

    def change(name: str, content: bytes) -> bytes:
        key, _, extension = name.partition(".")
        is_third = not place.setdefault(key, len(place)) % 3
        return {"txt": b" ", "json": b"{}"}.get(extension, content) if is_third else content

    rewrite_shard(source, out, change)


def test_a_pool_of_unreadable_texts_stops_the_run(pool: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar"
    with tarfile.open(broken, "w") as archive:
        for number in range(300):
            for extension, content in (("jpg", b"x"), ("txt", b"\xff\xfe")):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    sentence = fails(pool, tmp_path / "run", f"--data.train={broken}")
    assert "damaged (text" in sentence and "data.max_damaged" in sentence


@pytest.mark.parametrize(
    ("fields", "words_of_it"),
    [
        ({"period": 0}, "data.period is 0"),
        ({"scan": 0}, "data.scan is 0"),
        ({"max_scanned": 0}, "data.max_scanned is 0"),
        ({"threshold": 1.5}, "data.threshold is 1.5"),
        ({"min_ratio": 0.0}, "data.min_ratio is 0"),
        ({"min_ratio": 1.1}, "data.min_ratio is 1.1"),
        ({"resampled_samples": 100}, "data.resampled_samples"),
        ({"tags": ("json.tag",)}, "none of data.fields.caption"),
        ({"tags": ("txt",)}, "data.fields.separate"),
    ],
)
def test_settings_without_meaning_are_refused(fields: dict, words_of_it: str) -> None:
    data = demo().data
    assert isinstance(data, CuratedData)
    with pytest.raises(InputError, match=words_of_it):
        replace(data, **fields)


def test_a_model_that_reads_no_captions_cannot_choose() -> None:
    with pytest.raises(InputError, match="two towers"):
        replace(demo(), data=replace(demo().data, tokenizer=None))  # type: ignore[type-var]


def test_a_pool_that_only_streams_is_refused(pool: Path, tmp_path: Path) -> None:
    sentence = fails(pool, tmp_path / "run", "--data.train=pipe:cat pool.tar")
    assert "only be read from its beginning on" in sentence


def test_fields_of_separate_texts_have_names_in_the_files_of_a_curation(
    pool: Path, tmp_path: Path
) -> None:
    # the same caption as title and as description, and what is no text at all
    renamed = tmp_path / "renamed"
    (renamed / "train").mkdir(parents=True)
    (renamed / "zero_shot").symlink_to(pool / "zero_shot")

    def rename(name: str, content: bytes) -> bytes:
        if not name.endswith(".json"):
            return content
        caption = json.loads(content)["caption"]
        tags = ",".join(caption.split())
        return json.dumps({"title": caption, "tag": tags, "desc": None}).encode()

    for path in (pool / "train").glob("*.tar"):
        rewrite_shard(path, renamed / "train" / path.name, rename)
    run = tmp_path / "run"
    fields = ("--data.fields.caption", "json.title", "json.desc", "json.tag")
    more = (*fields, "--data.fields.separate", "--data.tags", "json.tag")
    train(ALONE, run, *more, small=words(renamed), module=MODULE)
    assert {text for part in pairs(run) for _, _, text in part} == {"title", "tag"}
    assert Fields(caption=("json.title",), separate=True).separate
