"""The command that counts the words of a corpus."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.clipa.frequency_masking import FrequencyMasking
from frugal.clipa.word_counts import main
from frugal.common.data.tokenizers import ClipBpe
from support import run_code

CAPTIONS = [
    ["A dog, a red dog."],
    ["The dog sleeps", "A dog sleeps!"],
    ["caf\u00e9 &amp; bar"],
    ["a cat"],
    ["Don't feed the dog"],
]
COUNTS = {
    "a": 4, "dog": 5, ",": 1, "red": 1, ".": 1, "the": 2, "sleeps": 2, "!": 1, "caf\u00e9": 1,
    "&": 1, "bar": 1, "cat": 1, "don't": 1, "feed": 1,
}  # fmt: skip
"""Counted by hand."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[list[str]], *, broken: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, captions in enumerate(samples):
            described = json.dumps({"captions": captions}).encode()
            if number == broken:
                described = b"{no JSON"
            for suffix, content in (("jpg", picture()), ("json", described)):
                header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return path


def test_every_caption_of_every_shard_is_counted_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "data/00000.tar", CAPTIONS[:2])
    write_tar(tmp_path / "data/00001.tar", CAPTIONS[2:])
    contents = []
    for processes in ("1", "2"):
        out = tmp_path / f"made/{processes}.json"
        words = [str(tmp_path / "data"), "--out", str(out)]
        assert main([*words, "--processes", processes]) == 0
        contents.append(json.loads(out.read_text()))
    assert contents[0] == contents[1]
    assert contents[0]["counts"] == COUNTS
    assert contents[0]["words"] == sum(COUNTS.values())
    assert contents[0]["distinct_words"] == len(COUNTS)
    assert contents[0]["captions"] == 6
    FrequencyMasking(counts=out).prepare(ClipBpe().load(), length=8)


def test_rare_words_are_counted_but_not_listed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "00000.tar", CAPTIONS)
    out = tmp_path / "counts.json"
    assert main([str(shard), "--out", str(out), "--least-share", "0.08"]) == 0
    content = json.loads(out.read_text())
    assert content["counts"] == {word: n for word, n in COUNTS.items() if n >= 2}  # of 23
    assert content["words"] == sum(COUNTS.values())
    assert content["distinct_words"] == len(COUNTS)


def test_unreadable_captions_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "00000.tar", CAPTIONS, broken=3)
    out = tmp_path / "counts.json"
    assert main([str(shard), "--out", str(out)]) == 0
    assert "1 samples could not be read" in capsys.readouterr().out
    expected = Counter(COUNTS) - Counter({"a": 1, "cat": 1})
    assert json.loads(out.read_text())["counts"] == expected


def test_the_command_says_how_many_words_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "list.tsv"
    file.write_text("title\tfilepath\n" + "\n".join(f"the the the the w{n}\t" for n in range(20)))
    assert main([str(file), "--out", str(tmp_path / "counts.json")]) == 0
    said = capsys.readouterr().out
    # at 1e-2, 80 of 100 words stay with sqrt(0.01 / 0.8), 20 with sqrt(0.01 / 0.01)
    kept = (80 * (0.01 / 0.8) ** 0.5 + 20) / 20
    assert f"{kept:8.1f}  at threshold 0.01\n" in said
    assert "20 captions, 100 words, 21 distinct" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no shards are given"),
        (["missing.tar"], "missing.tar, which does not exist"),
        (["pipe:cat a.tar"], "cannot be counted where it is"),
        (["{shard}", "--processes", "0"], "--processes is 0, must be at least 1"),
        (["{shard}", "--least-share", "-1"], "--least-share is -1.0, must lie between"),
        (["{shard}", "--least-share", "0.5"], "no word that makes up 0.5 or more is found"),
        (["{shard}", "--fields.caption", "txt"], "is found in the 0 captions of"),
        (["{shard}", "--out", "{shard}/counts.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_counted_is_refused_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    shard = write_tar(tmp_path / "00000.tar", CAPTIONS)
    out = tmp_path / "counts.json"
    given = [word.format(shard=shard) for word in ("--out", str(out), *words)]
    assert main([*given[2:], *given[:2]] if "--out" not in words else given[2:]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert reason in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_its_help_answers_without_nltk() -> None:
    code = (
        "import sys; from frugal.clipa.word_counts import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(' '.join({'transformers', 'nltk'} & sys.modules.keys()) or 0)"
    )
    result = run_code(code)
    assert result.returncode == 0, result.stderr
