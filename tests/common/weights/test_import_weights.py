"""Models of other libraries become run directories, and leave again as they came."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from foreign_makers import Archived, openai_model, save_with, shaken, transformers_model
from run_directories import small, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from frugal.common.checkpoint.store import find_checkpoint, load_weights
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.export import Options as Export
from frugal.common.export import export
from frugal.common.import_weights import Options, import_weights
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.image_encoder import image_encoder, with_projection_as_head
from frugal.common.models.named import clip_encoder, clipa_encoder
from frugal.common.weights import open_clip as open_clip_weights
from frugal.common.weights import timm as timm_weights
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.load import load_model
from frugal.common.weights.model_card import model_card
from frugal.common.weights.transformers import clip as transformers_clip
from frugal.common.weights.transformers import config_files
from frugal.common.weights.written import two_towers
from support import ALONE, TINY_WITH_CLIPS_WORDS, command, run_code, train

MODULE = "frugal.common.import_weights"
State = dict[str, Tensor]


def weights_of(folder: Path) -> State:
    """Of a run directory."""
    return load_weights(find_checkpoint(folder))


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(left[n].equal(right[n]) for n in left)


def taken_in(source: Path, out: Path, name: str | None = None) -> Path:
    import_weights(Options(source=source, out=out, model=name))
    return out


def exported(run: Path, to: Any, out: Path) -> State:
    """What an export writes, by the other library's names."""
    assert export(Export(checkpoint=run, to=to, out=out)) < 1e-5
    (file,) = out.glob("*.safetensors")
    return load_file(file)


# ------------------------------------------------------------------------------------------------
# How images are prepared

CLIP = small(clip_encoder("B/16"))
CROPS = {
    "open_clip": [CenterCrop(interpolation="bilinear"), CenterCrop(order="stretch")],
    "transformers": [
        CenterCrop(share=0.8, half_pixel="down"),
        CenterCrop(order="stretch", interpolation="lanczos"),
        CenterCrop(order="stretch", share=0.8, half_pixel="down"),
    ],
    "timm": [
        CenterCrop(share=0.8, interpolation="box"), CenterCrop(order="stretch"),
        CenterCrop(order="stretch", share=0.8),
    ],
}  # fmt: skip


NEAREST: dict[str, Callable[[CenterCrop, Any], CenterCrop]] = {
    "open_clip": open_clip_weights.nearest_crop,
    "transformers": config_files.nearest_crop,
    "timm": lambda crop, image: timm_weights.nearest_crop(crop),
}


@pytest.mark.parametrize("library", CROPS)
def test_how_images_are_prepared_leaves_and_comes_back(library: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CLIP)
    trained = load_model(run)
    for number, crop in enumerate(CROPS[library]):
        leaving = replace(trained, transform=crop)
        folder = tmp_path / f"{library} {number}"
        folder.mkdir()
        if library == "timm":
            timm_weights.write(with_projection_as_head(image_encoder(leaving)), folder)
        else:
            writer = open_clip_weights if library == "open_clip" else transformers_clip
            writer.write(two_towers(leaving), folder)
        found = read_encoder(folder)
        assert found.preparation is not None
        assert found.preparation.crop == crop
        assert "does not say" not in found.preparation.told_by
        assert crop == NEAREST[library](crop, leaving.image)
        assert (found.tower.mean, found.tower.heads) == (CLIP.image.mean, CLIP.image.heads)


def test_a_card_says_where_a_library_cuts_odd_rows_otherwise(tmp_path: Path) -> None:
    trained = load_model(write_run(tmp_path / "run", CLIP))
    cases = {
        "even": ("open_clip", ["transformers"]),
        "down": ("transformers", ["open_clip", "timm"]),
    }
    for half_pixel, (same, others) in cases.items():
        leaving = replace(trained, transform=CenterCrop(half_pixel=half_pixel))

        def card(library: str, leaving: ModelBundle = leaving) -> str:
            usual = NEAREST[library](leaving.transform, leaving.image)
            return model_card(leaving, name="a run", usage="", library=library, transform=usual)

        assert "comes as near" not in card(same)
        for other in others:
            assert f"comes as near as {other} has" in card(other)


def test_another_shape_is_stretched_where_transformers_would_leave_borders(tmp_path) -> None:
    wide = small(clip_encoder("B/16"), image={"image_size": (24, 40)})
    trained = load_model(write_run(tmp_path / "run", wide))
    image, usual = trained.image, CenterCrop()
    assert NEAREST["transformers"](usual, image) == CenterCrop(order="stretch")
    bilinear = CenterCrop(interpolation="bilinear")
    assert NEAREST["open_clip"](bilinear, image) == usual  # all that it has for such shapes
    assert NEAREST["timm"](bilinear, image) == bilinear


# ------------------------------------------------------------------------------------------------
# Two towers

RUNS = {
    "open_clip: CLIP": CLIP,
    "open_clip: rectangular images, layer scales, a sigmoid loss": small(
        clip_encoder("B/16"), image={"image_size": (24, 40), "layer_scale": 0.3},
        initial_logit_bias=-10.0,
    ),
    "open_clip: OpenAI's activation, MLPs that are no multiple": small(
        clip_encoder("B/16", quick_gelu=True), image={"mlp_width": 61}
    ),
    "open_clip: CLIPA with fixed positions, BERT": small(
        clipa_encoder("L/14"), text={"vocabulary": 90}
    ),
    "open_clip: MAE's fixed positions": small(
        clip_encoder("B/16"), image={"positions": "sincos", "pooling": "mean"}
    ),
    "huggingface: CLIP": CLIP,
    "huggingface: other activations and epsilons, BERT": small(
        clip_encoder("B/16"), image={"activation": "gelu_tanh", "norm_epsilon": 1e-4},
        text={"activation": "quick_gelu", "norm_epsilon": 1e-6, "vocabulary": 90},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_round_trips_of_two_towers_keep_every_bit(
    name: str, make_run: Callable[..., Path], bert: Path, tmp_path: Path
) -> None:
    to = name.partition(":")[0]
    run = make_run(RUNS[name], tokenizer=HuggingFace(name=str(bert)) if "BERT" in name else None)
    theirs = exported(run, to, tmp_path / "out")
    again = taken_in(tmp_path / "out", tmp_path / "in")
    ours = weights_of(run)
    if "CLIPA" not in name and "MAE" not in name:  # whose class token gets a position of zeros
        assert same(weights_of(again), ours)
    assert same(exported(again, to, tmp_path / "out2"), theirs)  # export, import, export
    third = taken_in(tmp_path / "out2", tmp_path / "in2")
    assert same(weights_of(third), weights_of(again))  # import, export, import
    tower = load_model(again).config.image
    assert tower.positions == RUNS[name].image.positions
    assert (again / "tokenizer").is_dir()


@pytest.mark.parametrize("kind", ["TorchScript", "state dict", "state dict without numbers"])
@pytest.mark.filterwarnings("ignore")
def test_openai_s_files_leave_with_the_numbers_they_came_with(kind: str, tmp_path: Path) -> None:
    model, path = Archived(openai_model(resnet=False)).eval(), tmp_path / "ViT-tiny.pt"
    if kind == "TorchScript":
        images = torch.zeros(1, 3, 32, 32)
        torch.jit.trace(model, images, check_trace=False).half().save(str(path))
    else:
        state = model.half().state_dict() | {"vocab_size": torch.tensor(49_408)}
        bare = "without" in kind
        torch.save({n: t for n, t in state.items() if not (bare and t.dtype == torch.int64)}, path)
    run = taken_in(path, tmp_path / "run", "openai" if "without" in kind else None)
    assert load_model(run).config.image.activation == "quick_gelu"
    found = exported(run, "open_clip", tmp_path / "out")
    expected = {n: t.float() for n, t in model.state_dict().items() if t.dtype != torch.int64}
    assert same(found, expected)
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"]


def test_a_name_of_open_clip_says_what_a_file_holds(tmp_path: Path, monkeypatch) -> None:
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small", config)
    model = shaken(open_clip.create_model("ViT-small"))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "epoch_3.pt")
    run = taken_in(tmp_path / "epoch_3.pt", tmp_path / "run", "ViT-small")
    theirs = exported(run, "open_clip", tmp_path / "out")
    expected = {n: t for n, t in model.state_dict().items() if n != "attn_mask"}
    assert same(theirs, expected)
    # and the way back by the name: open_clip's own reading of a file
    file = tmp_path / "out" / "open_clip_model.safetensors"
    again = open_clip.create_model("ViT-small", pretrained=str(file))
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_an_imported_run_is_evaluated_tuned_and_exported(
    alone_with_clips_words: Path, scenes: Path, tmp_path: Path
) -> None:
    export(Export(checkpoint=alone_with_clips_words, to="huggingface", out=tmp_path / "clip"))
    done = command(MODULE, tmp_path / "clip", "--out", tmp_path / "run")
    assert "image tower 32 wide, 1 blocks" in done.stdout and "parameters" in done.stdout
    assert same(weights_of(tmp_path / "run"), weights_of(alone_with_clips_words))
    words = ("--tasks", "zero-shot", "--data", scenes, "--workers", 0, "--device", "cpu")
    for run in (alone_with_clips_words, tmp_path / "run"):
        command(
            "frugal.common.evaluate", "--checkpoint", run, "--out", tmp_path / run.parent.name,
            *words,
        )  # fmt: skip
    measured = [
        json.loads((tmp_path / run.name / "zero_shot.json").read_text())["zero_shot_top1"]
        for run in (alone_with_clips_words.parent, tmp_path)
    ]
    assert measured[0] == measured[1]
    log = train(
        ALONE, tmp_path / "tuned", f"--data.train={scenes / 'train'}", "--schedule.samples=24",
        "--schedule.warmup-samples=0", f"--run.start-from={tmp_path / 'run'}",
        small=TINY_WITH_CLIPS_WORDS,
    )  # fmt: skip
    assert f"started from step 0 of {tmp_path / 'run'}" in log


# ------------------------------------------------------------------------------------------------
# An image tower alone

TIMM = {
    "plain": {},
    "mean of the patches, normed after": {"global_pool": "avg"},
    "mean of all, layer scales": {
        "global_pool": "avg", "fc_norm": False, "pool_include_prefix": True, "init_values": 0.2,
    },
    "no position for the class token": {"no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "like CLIP": {"pre_norm": True, "act_layer": "quick_gelu", "num_classes": 0},
    "wide images": {"img_size": (16, 40), "act_layer": "gelu_tanh"},
}  # fmt: skip
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


def timm_folder(folder: Path, **options: Any) -> tuple[nn.Module, Path]:
    """A folder as timm saves it."""
    model = timm.create_model("vit_tiny_patch16_224", **{"num_classes": 5, **SHAPE, **options})
    shaken(model)
    args = {n: v for n, v in {**SHAPE, **options}.items() if n != "num_classes"}
    size = args["img_size"]
    sizes = [3, size, size] if isinstance(size, int) else [3, *size]
    pretrained = {
        "input_size": sizes, "crop_pct": 0.8, "interpolation": "bilinear", "std": [0.2, 0.3, 0.4],
        "mean": [0.4, 0.5, 0.6],
    }  # fmt: skip
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model, folder


@pytest.mark.parametrize("name", TIMM)
def test_a_vision_transformer_of_timm_comes_in_and_leaves_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    model, source = timm_folder(tmp_path / "timm", **TIMM[name])
    run = taken_in(source, tmp_path / "run")
    trained = load_model(run)
    images = torch.randn(2, 3, *trained.config.image.height_width)
    with torch.inference_mode():
        torch.testing.assert_close(trained.model(images), model(images), rtol=0, atol=1e-5)
    theirs = exported(run, "timm", tmp_path / "out")
    expected = load_file(source / "model.safetensors")
    if name == "no position for the class token":  # as a position of zeros, which is the same
        assert not theirs["pos_embed"][:, 0].any()
        theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    if name == "like CLIP":
        assert same({n: t for n, t in theirs.items() if n != "patch_embed.proj.bias"}, expected)
    else:
        assert same(theirs, expected)
    again = taken_in(tmp_path / "out", tmp_path / "in")
    assert same(
        exported(again, "timm", tmp_path / "out2"),
        load_file(*(tmp_path / "out").glob("*.safetensors")),
    )
    about = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert about["crop_pct"] == 0.8 and about["interpolation"] == "bilinear"
    assert about["mean"] == [0.4, 0.5, 0.6] and about["std"] == [0.2, 0.3, 0.4]
    assert read_encoder(run).tower == trained.config.image  # as teachers and tunings do


def test_a_file_says_by_its_shapes_or_by_timm_s_name_what_it_is(tmp_path: Path) -> None:
    for name, options in (("token", {}), ("avg", {"global_pool": "avg"})):
        model = shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **options))
        file = tmp_path / f"{name}.pth"
        torch.save({"model": model.state_dict()}, file)
        images = torch.randn(1, 3, 224, 224)
        run = taken_in(file, tmp_path / f"{name} by its shapes")
        runs = (
            [run, taken_in(file, tmp_path / "named", "vit_tiny_patch16_224")]
            if not options
            else [run]
        )
        for run in runs:
            with torch.inference_mode():
                ours = load_model(run).model(images)
                torch.testing.assert_close(ours, model(images), rtol=0, atol=1e-5)
            assert weights_of(run)["model.image.pos_embed"].equal(model.pos_embed)


VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60,
    "image_size": 32, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["classes", "masked autoencoder"])
def test_a_vision_transformer_of_transformers_comes_in(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "classes":
        theirs: Any = shaken(ViTForImageClassification(ViTConfig(**VIT, num_labels=4)))
    else:
        small_decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
        config = ViTMAEConfig(**VIT, **small_decoder, decoder_num_attention_heads=2)
        theirs = shaken(ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path / "vit")
    look = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3,
            "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}  # fmt: skip
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(look))
    done = command(MODULE, tmp_path / "vit", "--out", tmp_path / "run")
    assert ("left behind: decoder" in done.stdout) == (kind != "classes")
    assert "heads 3, activation gelu_tanh, epsilon 1e-05, pooled by class" in done.stdout
    assert "mean 0.5 0.4 0.3, std 0.2 0.3 0.4, the shorter side resized to 40" in done.stdout
    assert f"{tmp_path / 'vit' / 'preprocessor_config.json'}" in done.stdout
    trained = load_model(tmp_path / "run")
    assert trained.config.image.std == (0.2, 0.3, 0.4)
    assert trained.transform.share == 0.8
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = trained.model.image.forward_tokens(images)
        if kind == "classes":
            scores = trained.model(images)
            torch.testing.assert_close(scores, theirs(images).logits, rtol=0, atol=1e-5)
        theirs.config.mask_ratio = 0.0
        vit = theirs.vit
        seen = (
            vit(images)
            if kind == "classes"
            else vit(images, noise=torch.arange(16.0).expand(2, -1))
        )
        torch.testing.assert_close(tokens, seen.last_hidden_state, rtol=0, atol=1e-5)
    theirs = exported(tmp_path / "run", "huggingface", tmp_path / "out")
    again = taken_in(tmp_path / "out", tmp_path / "in")
    assert same(weights_of(again), weights_of(tmp_path / "run"))
    assert same(exported(again, "huggingface", tmp_path / "out2"), theirs)


def test_an_image_tower_starts_what_is_trained_on_it(tmp_path: Path) -> None:
    from frugal.common.checkpoint.init_from import Start, init_encoder
    from frugal.common.transfer.classification import init_head
    from frugal.common.transfer.classifier import ClassifierConfig, VisionClassifier

    model, source = timm_folder(tmp_path / "timm")
    run = taken_in(source, tmp_path / "run")
    tower = load_model(run).config.image
    log = logging.getLogger("test")
    classifier = VisionClassifier(ClassifierConfig(image=tower, num_classes=5))
    found = init_encoder(classifier.image, run, Start(interpolate=False, log=log))
    init_head(classifier, found, log=log)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(classifier.eval()(images), model(images), rtol=0, atol=1e-5)


def test_evaluate_says_that_an_image_tower_reads_no_captions(tmp_path: Path, scenes: Path) -> None:
    _, source = timm_folder(tmp_path / "timm")
    run = taken_in(source, tmp_path / "run")
    done = command("frugal.common.evaluate", "--checkpoint", run, "--data", scenes, expect=2)
    assert "holds a model without a text tower, which zero-shot or" in done.stderr
    assert "linear-probe needs" not in done.stderr
    assert "measured by --tasks linear-probe --data DATA (or milan-finetune" in done.stderr
    words = (
        "--data",
        scenes,
        "--tasks",
        "linear-probe",
        "--linear-probe.weight-decay",
        "1",
        "--device",
        "cpu",
    )
    done = command("frugal.common.evaluate", "--checkpoint", run, *words, "--workers", "0")
    assert "linear_probe_top1" in done.stdout
    done = command("frugal.common.evaluate", "--checkpoint", source, *words, "--workers", "0")
    assert "heads 1, activation gelu, epsilon 1e-06, pooled by class" in done.stderr
    assert "mean 0.4 0.5 0.6, std 0.2 0.3 0.4, the shorter side resized to 40" in done.stderr
    assert f"preparation of images: {source / 'config.json'}" in done.stderr
    first, second = (
        json.loads((folder / "evaluation" / "linear_probe.json").read_text())
        for folder in (run, source)
    )
    assert second["linear_probe_measured"]["library"] == "timm"
    for name, value in second.items():
        if isinstance(value, (int, float)):
            assert first[name] == value


# ------------------------------------------------------------------------------------------------
# What cannot be taken in


def refused(*words: object) -> str:
    """The one sentence of a command that ends with exit code 2."""
    done = command(MODULE, *words, expect=2)
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.split("\n") if line.startswith("error: ")]
    return sentence


def test_what_is_known_elsewhere_is_refused_with_the_commands_that_know_it(
    bert: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel, ViTImageProcessor

    out = tmp_path / "out"
    (tmp_path / "clipa.npz").write_bytes(b"PK")
    (tmp_path / "t5x").mkdir()
    torch.save({"vision_model.x": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"state_dict": {"module.base_encoder.x": torch.zeros(2)}}, tmp_path / "moco.pth")
    mixed = transformers_model("vision-text-dual-encoder")
    save_with(tmp_path / "mixed", mixed, bert, ViTImageProcessor(size={"height": 32, "width": 32}))
    BertModel(BertConfig(num_hidden_layers=1)).save_pretrained(tmp_path / "bert")
    for name in ("clipa.npz", "t5x", "pytorch_model.bin", "moco.pth", "mixed", "bert"):
        said = refused(tmp_path / name, "--out", out)
        assert "python -m frugal.clipa.convert" in said and "frugal.cit.convert" in said
        assert str(tmp_path / name) in said
    assert "is a VisionTextDualEncoderModel of transformers" in refused(
        tmp_path / "mixed", "--out", out
    )
    assert not out.exists()


def test_truncated_files_and_wrong_words_are_sentences(clip_run: Path, tmp_path: Path) -> None:
    export(Export(checkpoint=clip_run, to="open_clip", out=tmp_path / "clip"))
    export(Export(checkpoint=clip_run, to="timm", out=tmp_path / "timm"))
    out = tmp_path / "out"
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("is a run directory or checkpoint of this library already", (clip_run,)),
        ("there is no file or folder", (tmp_path / "nothing",)),
        ("give --model with open_clip's name", (file,)),
        ("not of the model it is said to be", (file, "--model", "ViT-B-32")),
        ("open_clip has no model called 'ViT-Z'", (file, "--model", "ViT-Z")),
        ("does not hold timm's vit_base_patch16_224", (file, "--model", "vit_base_patch16_224")),
        ("which does; leave it out", (tmp_path / "timm", "--model", "ViT-B-32")),
    ]
    for said, words in cases:
        assert said in refused(*words, "--out", out)
    for folder in ("clip", "timm"):
        (weights,) = (tmp_path / folder).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        assert weights.name in refused(tmp_path / folder, "--out", out)
    torch.save({"model": dict(timm.create_model("vit_tiny_patch16_224").state_dict())}, file)
    half = tmp_path / "half.pth"
    half.write_bytes(file.read_bytes()[:100_000])
    assert "half.pth cannot be read" in refused(half, "--out", out)
    assert not out.exists()
    assert "is not empty" in refused(tmp_path / "clip", "--out", tmp_path / "timm")


def test_options_that_towers_of_ours_do_not_have_are_named(tmp_path: Path) -> None:
    cases = {
        "reg_tokens": {"reg_tokens": 2},
        "global_pool": {"global_pool": "map"},
        "final_norm": {"final_norm": False},
        "computes something that towers of this library do not": {"act_layer": "relu"},
        "which no tower of ours has": {"qk_norm": True},
    }
    for number, (said, options) in enumerate(cases.items()):
        _, source = timm_folder(tmp_path / f"timm{number}", **options)
        with pytest.raises(InputError, match=said):
            taken_in(source, tmp_path / "out")
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**about, "architecture": "resnet18"}))
    with pytest.raises(InputError, match="resnet18 is none of its plain vision transf"):
        taken_in(source, tmp_path / "out")


def test_help_needs_nothing_slower_than_torch() -> None:
    check = (
        "import sys, frugal.common.import_weights, frugal.common.weights.encoder_config;"
        "heavy = {'transformers', 'open_clip', 'timm'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
