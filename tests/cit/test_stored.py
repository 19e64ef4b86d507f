"""Training on what a frozen image tower has put out, in the place of images."""

import shutil
from pathlib import Path

import pytest

from frugal.common.embed import Options, embed
from frugal.common.weights.load import load_model
from support import (
    ALONE,
    DDP,
    TINY,
    largest_difference,
    losses,
    metrics,
    newest,
    rewrite_shard,
    saved_tensors,
    train,
)

CIT = "frugal.cit.train"
WHOLE = (
    "--data.augmentation.scale", "1", "1", "--data.augmentation.ratio", "1", "1",
    "--data.augmentation.flip=0",
)  # fmt: skip
"""The crop that is evaluated with, of square images."""


@pytest.fixture(scope="module")
def vectors(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded(alone, scenes / "train", tmp_path_factory.mktemp("vectors") / "out")


def embedded(checkpoint: Path, data: Path, out: Path, **options: object) -> Path:
    options = {"output": "pooled", "dtype": "float32", "workers": 0} | options
    embed(Options(checkpoint=checkpoint, data=(str(data),), out=out, **options))  # type: ignore[arg-type]
    return out


def lit(alone: Path, scenes: Path) -> tuple[str, ...]:
    return (
        f"--data.train={scenes / 'train'}", "--objective.train-image=none",
        f"--objective.image-weights={alone}", "--schedule.samples=144", "--run.save-every=3",
        "--run.keep=9",
    )  # fmt: skip


def test_stored_vectors_train_as_the_images_do(
    alone: Path, scenes: Path, vectors: Path, tmp_path: Path
) -> None:
    words, stored = lit(alone, scenes), f"--data.stored={vectors}"
    runs = {name: tmp_path / name for name in ("images", "vectors", "two")}
    options = {"module": CIT, "recipe": "demo-lit"}
    # a recipe that names vectors is trained on images where they are left out
    train(ALONE, runs["images"], *words, *WHOLE, "--data.stored=None", **options)
    said = train(ALONE, runs["vectors"], *words, stored, **options)
    train(DDP, runs["two"], *words, stored, **options)
    assert f"images are not read: {vectors} holds 1 of their vectors, 32 numbers each" in said
    expected = losses(runs["images"])
    assert losses(runs["vectors"]) == pytest.approx(expected, rel=1e-4)
    assert losses(runs["two"]) == pytest.approx(expected, rel=1e-4)
    pair = [saved_tensors(runs[name]) for name in ("images", "vectors")]
    assert largest_difference(*pair) < 1e-4
    assert [line["image_tokens"] for line in metrics(runs["vectors"])] == [0.0] * 6
    # the whole model is there to be measured
    bundle = load_model(runs["vectors"])
    before = load_model(alone).model.image.state_dict()  # type: ignore[union-attr]
    after = bundle.model.image.state_dict()  # type: ignore[union-attr]
    assert all(
        after[name].equal(value) for name, value in before.items() if "projection" not in name
    )
    shutil.rmtree(newest(runs["vectors"]))
    assert "from step 3 of 6" in train(ALONE, runs["vectors"], *words, stored, **options)
    again = saved_tensors(runs["vectors"])
    assert largest_difference(again, pair[1], ("weight", "exp_avg")) == 0.0


def test_cit_chooses_pairs_and_trains_on_stored_vectors(
    alone: Path, scenes: Path, tmp_path: Path
) -> None:
    views = embedded(alone, scenes / "train", tmp_path / "views", views=3, dtype="float16")
    curated = (
        f"--data.metadata.sources={scenes}/zero_shot/classnames.txt", "--data.period=2",
        "--data.scan=10", "--data.threshold=0.999", "--data.min-ratio=0.25",
    )  # fmt: skip
    run, words = tmp_path / "run", (*lit(alone, scenes), *curated, f"--data.stored={views}")
    train(ALONE, run, *words, "--run.digests", module=CIT)
    whole = saved_tensors(run)
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(newest(run))
    train(ALONE, run, *words, "--run.digests", module=CIT)
    assert largest_difference(saved_tensors(run), whole, ("weight", "exp_avg")) == 0.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--objective.train-image=all",), "which LockedContrastive would train"),
        (
            ("--reduction.image=frugal.common.reduction.random_masking.RandomMasking",),
            "leaves out patches, but data.stored has images no more",
        ),
        (("--data.stored=nowhere",), "nowhere/index.json"),
        (("--data.train={scenes}/retrieval/test",), "holds nothing of"),
    ],
)
def test_what_stored_vectors_do_not_go_with_is_said(
    words: tuple[str, ...], sentence: str, alone: Path, scenes: Path, vectors: Path, tmp_path: Path
) -> None:
    given = [word.format(scenes=scenes) for word in words]
    said = train(
        ALONE, tmp_path / "run", *lit(alone, scenes), f"--data.stored={vectors}", *given,
        module=CIT, recipe="demo-lit", expect=2,
    )  # fmt: skip
    assert sentence in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_vectors_of_another_tower_or_of_other_data_are_refused(
    alone: Path, scenes: Path, vectors: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=48", "--run.seed=5")
    train(ALONE, other, *words, small=TINY)
    options = {"module": CIT, "recipe": "demo-lit", "expect": 2}
    said = train(ALONE, tmp_path / "a", *lit(other, scenes), f"--data.stored={vectors}", **options)
    assert "is of another image tower than the one that this run starts from" in said
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    for shard in (scenes / "train").glob("*.tar"):
        rewrite_shard(shard, data / shard.name, lambda name, content: content + b" ")
    said = train(
        ALONE, tmp_path / "b", *lit(alone, data.parent), f"--data.stored={vectors}", **options
    )
    assert "holds nothing of 00000.tar as it is now" in said
    only_projected = embedded(alone, scenes / "train", tmp_path / "out", output="projected")
    said = train(
        ALONE, tmp_path / "c", *lit(alone, scenes), f"--data.stored={only_projected}", **options
    )
    assert "holds no pooled vectors of images; embed them with --output pooled" in said
    run = tmp_path / "d"
    train(
        ALONE, run, *lit(alone, scenes), f"--data.stored={vectors}", module=CIT, recipe="demo-lit"
    )
    shutil.rmtree(newest(run))
    again = embedded(alone, scenes / "train", tmp_path / "again", dtype="float16")
    said = train(ALONE, run, *lit(alone, scenes), f"--data.stored={again}", **options)
    assert "data.stored" in said


def test_files_that_are_gone_or_of_another_shard_are_refused(
    alone: Path, scenes: Path, vectors: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(vectors, odd)
    files = sorted(odd.glob("*.safetensors"))
    assert len(files) > 1
    options = {"module": CIT, "recipe": "demo-lit", "expect": 2}
    kept = files[-1].read_bytes()
    for content, sentence in (
        (None, "cannot be read ("),
        (files[0].read_bytes(), "holds the vectors of another shard than"),
        (kept[:100], "cannot be read ("),
    ):
        files[-1].unlink() if content is None else files[-1].write_bytes(content)
        said = train(ALONE, tmp_path / "a", *lit(alone, scenes), f"--data.stored={odd}", **options)
        assert f"{files[-1]} {sentence}" in said
        assert "give the command of frugal.common.embed again" in said
