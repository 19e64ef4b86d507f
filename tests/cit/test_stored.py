"""Training on what frozen towers have put out, in the place of images and captions."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save
from transformers import BertConfig, BertModel, BertTokenizer

from frugal.cit.recipes import RECIPES
from frugal.common import save_model
from frugal.common.data.samples import Fields
from frugal.common.data.stored_vectors import IMAGES, TEXTS, StoredVectors, width_of
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.embed import Options, Start, embed
from frugal.common.errors import InputError
from frugal.common.files import write_json
from frugal.common.models.image_encoder import image_encoder
from frugal.common.models.pretrained import (
    PretrainedDualEncoderConfig,
    TimmImage,
    TransformersText,
)
from frugal.common.recipe_json import to_json
from frugal.common.weights.load import load_model
from support import (
    ALONE,
    DDP,
    ROOT,
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


def embedded(checkpoint: Path | None, data: Path, out: Path, **options: object) -> Path:
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


def test_files_that_are_gone_or_of_another_shard_or_model_are_refused(
    alone: Path, scenes: Path, both: Path, tmp_path: Path
) -> None:
    odd, other = tmp_path / "odd", tmp_path / "other"
    shutil.copytree(both, odd)
    files = sorted(odd.glob("*.safetensors"))
    assert len(files) > 1
    last = files[-1]
    kept, header = last.read_bytes(), safe_open(last, "pt").metadata()
    train(ALONE, other, f"--data.train={scenes / 'train'}", "--schedule.samples=24",
          "--schedule.warmup-samples=0", "--run.seed=5")  # fmt: skip
    foreign = embedded(other, scenes / "train", tmp_path / "foreign", texts=True) / last.name

    def with_rows(name: str, rows: torch.Tensor) -> bytes:
        return save(load(kept) | {name: rows.contiguous()}, metadata=header)

    images, texts = (load(kept)[name] for name in ("image_pooled", "text_pooled"))
    for content, sentence in (
        (None, "cannot be read ("),
        (files[0].read_bytes(), "holds the vectors of another shard than"),
        (foreign.read_bytes(), "holds the vectors of another model, or with other options,"),
        (kept[:100], "cannot be read ("),
        (with_rows("image_pooled", images[:-1]), "holds image_pooled of shape"),
        (with_rows("image_pooled", images[:, 0]), "holds image_pooled of shape"),
        (with_rows("image_pooled", images[:, :, 1:]), "holds image_pooled of shape"),
        (with_rows("text_pooled", texts[:-1]), "holds text_pooled of shape"),
        (with_rows("text_pooled", texts[:, 1:]), "holds text_pooled of shape"),
    ):
        last.unlink() if content is None else last.write_bytes(content)
        said = train(
            ALONE, tmp_path / "a", *align(alone, scenes / "train", odd, odd),
            module=CIT, recipe="demo-align", expect=2,
        )  # fmt: skip
        assert f"{last} {sentence}" in said and "Traceback" not in said
        assert "give the command of frugal.common.embed again" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda index: index.update(shards=[1, 2]), "is not of embeddings"),
        (lambda index: index["shards"][0].update(samples=[1]), "is not of embeddings"),
        (lambda index: index["shards"][0].update(file="../x"), "that do not lie beside it"),
        (lambda index: index["about"].pop("version"), "was written by another version"),
        (lambda index: index.update(complete=False), "is not complete"),
    ],
)
def test_an_index_that_is_odd_or_old_is_a_sentence(
    change: Callable[[dict], object], sentence: str, both: Path, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(both, folder)
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    for kind in (IMAGES, TEXTS):
        with pytest.raises(InputError, match=sentence):
            width_of(folder, kind)


def test_vectors_of_images_of_another_size_are_of_another_tower(
    scenes: Path, tmp_path: Path
) -> None:
    """Where positions are computed, no weight tells the size."""
    fixed = ("--model.image.positions=sincos",)
    flip, run = tmp_path / "flip", tmp_path / "run"
    train(ALONE, flip, f"--data.train={scenes / 'train'}", "--schedule.samples=24",
          "--schedule.warmup-samples=0", *fixed)  # fmt: skip
    vectors = embedded(flip, scenes / "train", tmp_path / "vectors")
    words = (*lit(flip, scenes), f"--data.stored={vectors}", *fixed)
    options = {"module": CIT, "recipe": "demo-lit"}
    said = train(
        ALONE, run, *words, "--model.image.image-size=64", "--run.interpolate", expect=2, **options
    )
    assert "is of another image tower than the one that this run starts from" in said
    train(ALONE, run, *words, **options)


def test_a_shard_of_which_no_image_can_be_read_is_damaged_samples(
    alone: Path, tmp_path: Path
) -> None:
    data = captioned(tmp_path / "data" / "train")
    rewrite_shard(
        data / "00001.tar", data / "00002.tar",
        lambda name, content: b"xx" if name.endswith("png") else content,
    )  # fmt: skip
    fields = Fields(caption=("json.title",))
    vectors = embedded(alone, data, tmp_path / "out", texts=True, fields=fields)
    said = train(
        ALONE, tmp_path / "run", *align(alone, data, vectors, vectors), "--data.max-damaged=0.9",
        "--data.fields.caption=json.title", module=CIT, recipe="demo-align",
    )  # fmt: skip
    assert "it could not be read when it was embedded" in said and "unreadable" not in said


def test_many_shards_are_mixed_and_none_is_read_whole(tmp_path: Path) -> None:
    files = []
    for number in range(300):
        rows = torch.arange(12.0).view(3, 1, 4) + number
        files.append(tmp_path / f"{number}.safetensors")
        files[-1].write_bytes(save({"image_pooled": rows, "image_valid": torch.ones(3) > 0}))
    vectors = StoredVectors(files, 4, 1, 0, "")
    for shard in (*range(300), *range(300)):
        np.testing.assert_array_equal(vectors.of(shard, 2, 0), [8 + shard, 9 + shard, 10 + shard,
                                                                11 + shard])  # fmt: skip


@pytest.fixture(scope="module")
def both(alone: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "out"
    return embedded(alone, scenes / "train", out, texts=True)


def align(alone: Path, data: Path, *stored: Path | None) -> tuple[str, ...]:
    images, texts = stored or (None, None)
    return (
        *lit(alone, data.parent), f"--data.train={data}", "--objective.train-text=none",
        f"--objective.text-weights={alone}", f"--data.stored={images}",
        f"--data.stored-texts={texts}",
    )  # fmt: skip


@pytest.mark.parametrize("heads", [(), ("--model.head-width=24",)], ids=["linear", "two layers"])
def test_heads_learn_from_stored_vectors_as_from_images_and_captions(
    heads: tuple[str, ...], alone: Path, scenes: Path, both: Path, tmp_path: Path
) -> None:
    data = scenes / "train"
    runs = {name: tmp_path / name for name in ("pairs", "vectors", "two")}
    options = {"module": CIT, "recipe": "demo-align"}
    train(ALONE, runs["pairs"], *align(alone, data), *WHOLE, *heads, **options)
    words = (*align(alone, data, both, both), *heads)
    said = train(ALONE, runs["vectors"], *words, **options)
    train(DDP, runs["two"], *words, **options)
    assert f"captions are not encoded: {both} holds their vectors, 32 numbers each" in said
    expected = losses(runs["pairs"])
    assert losses(runs["vectors"]) == pytest.approx(expected, rel=1e-4)
    assert losses(runs["two"]) == pytest.approx(expected, rel=1e-4)
    whole = saved_tensors(runs["vectors"])
    assert largest_difference(saved_tensors(runs["pairs"]), whole) < 1e-4
    lines = metrics(runs["vectors"])
    assert {(line["image_tokens"], line["text_tokens"]) for line in lines} == {(0.0, 0.0)}
    trained = {name.partition("/")[2] for name in whole if name.startswith("exp_avg/")}
    second = {f"model.{side}_head.1.weight" for side in ("image", "text")} if heads else set()
    assert trained == second | {
        "model.image.projection.weight", "model.text.projection.weight", "model.logit_scale"
    }  # fmt: skip
    shutil.rmtree(newest(runs["vectors"]))
    assert "from step 3 of 6" in train(ALONE, runs["vectors"], *words, **options)
    again = saved_tensors(runs["vectors"])
    assert largest_difference(again, whole, ("weight", "exp_avg")) == 0.0


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a ViT of timm and a BERT of transformers, which have never met."""
    folder = tmp_path_factory.mktemp("apart")
    torch.manual_seed(1)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **vit)
    timm.models.save_for_hf(model, folder / "timm", model_args=vit)
    words = BertTokenizer(str(ROOT / "tests" / "words.txt"))
    words.save_pretrained(folder / "bert")
    bert = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    BertModel(bert).save_pretrained(folder / "bert")
    recipe = RECIPES["demo-align"]()
    write_json(folder / "recipe.json", to_json(replace(
        recipe,
        model=PretrainedDualEncoderConfig(
            image=TimmImage(name=str(folder / "timm"), image_size=32),
            text=TransformersText(name=str(folder / "bert"), length=24),
            embed_dim=16,
        ),
        objective=replace(
            recipe.objective, image_weights=None, text_weights=None  # type: ignore[type-var]
        ),
        data=replace(
            recipe.data, tokenizer=HuggingFace(name=str(folder / "bert")), workers=0  # type: ignore[type-var]
        ),
        schedule=replace(recipe.schedule, samples=144, warmup_samples=0),
        batch_size=24,
        engine=replace(recipe.engine, precision="float32"),
    )))  # fmt: skip
    return folder


def test_towers_that_learned_apart_are_aligned(apart: Path, scenes: Path, tmp_path: Path) -> None:
    recipe, out = str(apart / "recipe.json"), tmp_path / "vectors"
    start = Start(recipe=recipe, changes=("model.text.pooling=mean",))
    embedded(None, scenes / "train", out, texts=True, start=start)
    runs = {name: tmp_path / name for name in ("pairs", "vectors")}
    words = (f"--data.train={scenes / 'train'}", "--model.text.pooling=mean", "--run.log-every=1")
    stored = (f"--data.stored={out}", f"--data.stored-texts={out}")
    options = {"module": CIT, "recipe": recipe, "small": ()}
    whole = ("--data.stored=None", "--data.stored-texts=None")
    train(ALONE, runs["pairs"], *words, *whole, *WHOLE, **options)
    train(ALONE, runs["vectors"], *words, *stored, **options)
    assert losses(runs["vectors"]) == pytest.approx(losses(runs["pairs"]), rel=1e-4)
    state = load_model(runs["vectors"]).model.state_dict()
    bert = BertModel.from_pretrained(apart / "bert").state_dict()
    name = "encoder.layer.1.output.dense.weight"
    assert state[f"text.model.{name}"].equal(bert[name]), "a run keeps the whole model"
    shutil.copytree(apart / "bert", tmp_path / "bert")
    BertModel(BertConfig.from_pretrained(apart / "bert")).save_pretrained(tmp_path / "bert")
    said = train(
        ALONE, tmp_path / "other", *words, *stored, f"--model.text.name={tmp_path / 'bert'}",
        expect=2, **options,
    )  # fmt: skip
    assert "is of another text tower than the one that this run starts from" in said


def test_a_model_that_is_not_named_once_is_refused(
    alone: Path, apart: Path, tmp_path: Path
) -> None:
    recipe = Start(recipe=str(apart / "recipe.json"))
    for checkpoint, start, more, sentence in (
        (None, Start(), {}, "neither is there"),
        (alone, recipe, {}, "both are there"),
        (alone, Start(changes=("batch-size=2",)), {}, "--start.changes goes with --start.recipe"),
        (None, recipe, {"model": "RN50"}, "--model goes with --checkpoint"),
        (None, recipe, {"output": "both"}, "are random; take --output pooled"),
        (None, Start(recipe="cit:nothing"), {}, "there is no recipe 'nothing'"),
        (None, replace(recipe, changes=("nothing",)), {}, "--start.changes has 'nothing'"),
    ):
        with pytest.raises(InputError, match=sentence):
            embedded(checkpoint, tmp_path, tmp_path / "out", start=start, **more)
    assert not (tmp_path / "out").exists()


def captioned(folder: Path) -> Path:
    """Two tars of 24 pairs with a title and a description, some blank, one damaged, one bare."""
    draw = np.random.default_rng(3)
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(24):
                file = io.BytesIO()
                pixels = draw.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                texts = {"title": f"a {number} of {shard}", "desc": "" if number % 3 == 0 else
                         f"number {number * 7} and {shard}"}  # fmt: skip
                image = file.getvalue()
                if (shard, number) == (1, 4):
                    texts = {"title": " "}
                if (shard, number) == (0, 5):
                    image = image[:50]
                for extension, content in (("png", image), ("json", json.dumps(texts).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize(
    ("apart", "weights"),
    [(False, ("--data.fields.weights", "1", "3")), (True, ())],
    ids=["one folder, weighted", "a folder each, captions not read"],
)
def test_the_caption_that_is_drawn_is_the_one_whose_vector_is_taken(
    apart: bool, weights: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    data = captioned(tmp_path / "data" / "train")
    fields = Fields(caption=("json.title", "json.desc"), separate=True)
    vectors = embedded(alone, data, tmp_path / "out", texts=not apart, fields=fields)
    texts = vectors
    if apart:
        texts = embedded(alone, data, tmp_path / "texts", images=False, texts=True, fields=fields)
    words = (
        "--data.fields.caption", "json.title", "json.desc", "--data.fields.separate",
        *weights, "--data.max-damaged=0.2",
    )  # fmt: skip
    options = {"module": CIT, "recipe": "demo-align"}
    train(ALONE, tmp_path / "pairs", *align(alone, data), *words, *WHOLE, **options)
    said = train(
        ALONE, tmp_path / "vectors", *align(alone, data, vectors, texts), *words, **options
    )
    expected = losses(tmp_path / "pairs")
    assert losses(tmp_path / "vectors") == pytest.approx(expected, rel=1e-4)
    assert "no image" in said and "no caption" in said
    pairs, vectors = (
        [sum(line["damaged"].values()) for line in metrics(tmp_path / name)]
        for name in ("pairs", "vectors")
    )
    assert pairs == vectors and sum(pairs) > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--objective.train-text=all",), "which LockedContrastive would train or reads the"),
        (
            ("--reduction.text=frugal.clipa.sub_captions.SubCaption",),
            "chooses among the tokens of a caption, but data.stored_texts has none any more",
        ),
        (("--data.stored-texts=nowhere",), "nowhere/index.json"),
        (
            ("--data.stored-texts={vectors}",),
            "holds no pooled vectors of captions; embed them with",
        ),
        (("--data.fields.caption=txt",), "holds captions of data.fields.caption"),
        (("--data.fields.image=png",), "holds images of data.fields.image"),
        (("--data.train={scenes}/retrieval/test",), "holds nothing of"),
    ],
)
def test_what_stored_captions_do_not_go_with_is_said(
    words: tuple[str, ...],
    sentence: str,
    alone: Path,
    scenes: Path,
    vectors: Path,
    both: Path,
    tmp_path: Path,
) -> None:
    given = [word.format(scenes=scenes, vectors=vectors) for word in words]
    said = train(
        ALONE, tmp_path / "run", *align(alone, scenes / "train", both, both), *given,
        module=CIT, recipe="demo-align", expect=2,
    )  # fmt: skip
    assert sentence in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_captions_of_another_tower_and_curation_are_refused(
    alone: Path, scenes: Path, both: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    words = (f"--data.train={scenes / 'train'}", "--schedule.samples=48", "--run.seed=5")
    train(ALONE, other, *words, small=TINY)
    foreign = align(alone, scenes / "train", both, both)
    said = train(
        ALONE, tmp_path / "a", *foreign, f"--objective.text-weights={other}",
        module=CIT, recipe="demo-align", expect=2,
    )  # fmt: skip
    assert "is of another text tower than the one that this run starts from" in said
    said = train(
        ALONE, tmp_path / "b", *foreign,
        f"--data.metadata.sources={scenes}/zero_shot/classnames.txt",
        module=CIT, recipe="demo-stored", expect=2,
    )  # fmt: skip
    assert "curation asks the text tower which captions are near" in said


def test_a_model_with_heads_of_two_layers_is_measured_and_exported_as_a_run_alone(
    alone: Path, scenes: Path, both: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(
        ALONE, run, *align(alone, scenes / "train", both, both), "--model.head-width=24",
        module=CIT, recipe="demo-align",
    )  # fmt: skip
    bundle = load_model(run)
    model = bundle.model
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(256, size=(3, 3, 32, 32), dtype=np.uint8)
    )
    weights = model.state_dict()
    with torch.no_grad():
        pooled = model.image.forward_pooled(pixels)  # type: ignore[union-attr, operator]
        hidden = torch.nn.functional.gelu(pooled @ weights["image.projection.weight"].T)
        expected = hidden @ weights["image_head.1.weight"].T
        found = model.encode_image(pixels)  # type: ignore[operator]
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1))
    for to in ("open_clip", "huggingface", "timm"):
        with pytest.raises(InputError, match=r"cannot express model\.head_width 24.*--to frugal"):
            save_model(bundle, tmp_path / to, to=to)
    save_model(bundle, tmp_path / "frugal", to="frugal")
    again = load_model(tmp_path / "frugal").model.state_dict()
    assert all(again[name].equal(value) for name, value in weights.items())
    # what stands alone is the tower: the first layer of a head is no projection
    assert image_encoder(bundle).embed_dim is None
