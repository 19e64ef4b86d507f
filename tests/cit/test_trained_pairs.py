"""What a run trained on, counted and written as shards."""

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cit_runs import pairs

from frugal.cit.trained_pairs import count_pairs, relevant, write
from frugal.common.data.samples import Fields
from frugal.common.data.sources import open_source
from frugal.common.errors import InputError
from support import ALONE, TINY, alter_state, train


@pytest.mark.parametrize("rows_at_once", [4_000_000, 100])
def test_counts_add_up_to_updates_times_batch_and_are_those_of_the_curations(
    rows_at_once: int, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs.parquet"
    total, different = count_pairs(undisturbed, out, rows_at_once=rows_at_once)
    expected = Counter(pair for period in pairs(undisturbed) for pair in period)
    rows = pq.read_table(out).to_pylist()
    assert {(r["shard"], r["index"], r["text"]): r["times"] for r in rows} == expected
    assert (total, different) == (20 * 24, len(expected)) == (expected.total(), len(rows))
    assert max(expected.values()) > 1
    assert all(row["pair"] == f"{row['key']}_{row['text']}" for row in rows)


def test_only_what_was_trained_on_counts(undisturbed: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "pairs.parquet"
    shutil.copytree(undisturbed, run)
    alter_state(run / "checkpoints" / "step_000000020", step=7)
    assert count_pairs(run, out)[0] == 7 * 24
    found = pairs(undisturbed)
    expected = Counter([*found[0], *found[1][: 2 * 24]])
    rows = pq.read_table(out).to_pylist()
    assert {(r["shard"], r["index"], r["text"]): r["times"] for r in rows} == expected


def test_the_share_of_relevant_pairs_is_that_of_the_samples_own_words(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    assert relevant(run) == 0
    told = json.loads((run / "evaluation" / "curation.json").read_text())
    said: dict[tuple[str, int], bool] = {}
    chosen = [pair for period in pairs(run) for pair in period]
    for shard in {pair[0] for pair in chosen}:
        with tarfile.open(shard) as archive:
            names = sorted(one.name for one in archive if one.name.endswith(".json"))
            for number, name in enumerate(names):
                content = archive.extractfile(name)
                assert content is not None
                said[shard, number] = json.loads(content.read())["relevant"]
    expected = sum(said[shard, number] for shard, number, _ in chosen) / len(chosen)
    assert told["curation_precision"] == pytest.approx(expected)


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
    return found


def test_written_pairs_are_the_images_and_texts_that_were_trained_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    table, out = tmp_path / "pairs.parquet", tmp_path / "shards"
    count_pairs(undisturbed, table)
    rows = {row["pair"]: row for row in pq.read_table(table).to_pylist()}
    assert write(table, out=out, samples_per_shard=50) == 0
    found = members(out)
    assert len(found) == len(rows)
    for sample in found.values():
        about = json.loads(sample["json"])
        row = rows[about["pair"]]
        assert about["times"] == row["times"]
        source = open_source(row["shard"], Fields()).shards[0].open(Fields())
        raw = source.read(row["index"])
        assert sample["jpg"] == raw.image
        assert [sample["txt"].decode()] == [about["caption"]] == raw.captions
        source.close()


def test_pairs_are_repeated_or_left_out_by_how_often_they_were_trained_on(
    undisturbed: Path, tmp_path: Path
) -> None:
    table = tmp_path / "pairs.parquet"
    count_pairs(undisturbed, table)
    times = pq.read_table(table)["times"].to_pylist()
    write(table, out=tmp_path / "repeated", repeat=True)
    write(table, out=tmp_path / "often", least=2)
    assert len(members(tmp_path / "repeated")) == sum(times) == 480
    assert len(members(tmp_path / "often")) == sum(number >= 2 for number in times) > 0


def test_a_run_without_curation_trains_on_what_another_chose(
    undisturbed: Path, tmp_path: Path
) -> None:
    table, out = tmp_path / "pairs.parquet", tmp_path / "shards"
    count_pairs(undisturbed, table)
    write(table, out=out, repeat=True)
    train(ALONE, tmp_path / "run", "--schedule.samples=48", f"--data.train={out}", small=TINY)


def test_what_cannot_be_counted_or_written_is_told_in_a_sentence(
    undisturbed: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "pairs.parquet"
    shutil.copytree(undisturbed, run)
    (run / "curation" / "000001.parquet").unlink()
    with pytest.raises(InputError, match=r"000001\.parquet is missing"):
        count_pairs(run, out)
    assert not out.exists()
    out.write_text("no table")
    with pytest.raises(InputError, match="no table of pairs"):
        write(out, out=tmp_path / "shards")
    count_pairs(undisturbed, out)
    table = pq.read_table(out)
    gone = table.set_column(1, "shard", [[str(tmp_path / "gone.tar")] * len(table)])
    pq.write_table(gone, out)
    with pytest.raises(InputError, match=r"gone\.tar, which does not exist any more"):
        write(out, out=tmp_path / "shards")
    with pytest.raises(InputError, match="at least 1"):
        write(out, out=tmp_path / "shards", least=0)
