"""Files of weights as they are: several sets in one, prefixes, parts, NaN, names that are wrong."""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from foreign_makers import (
    SMALL,
    TEXT,
    image_processor,
    openai_model,
    save_with,
    shaken,
    transformers_model,
)
from run_directories import small
from safetensors.torch import save_file
from test_load import VISION, assert_same, made_by_open_clip, made_here
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from frugal.common.checkpoint.store import find_checkpoint, load_weights
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.errors import InputError
from frugal.common.export import Options as Export
from frugal.common.export import export
from frugal.common.import_weights import Options, import_weights
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoder
from frugal.common.models.named import clip_encoder
from frugal.common.weights.files import read_weights, state_in
from frugal.common.weights.image_towers import read_encoder
from frugal.common.weights.load import describe, load_model
from frugal.common.weights.wrapped import Wrapped

State = dict[str, Tensor]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the log says, its remarks included."""
    with caplog.at_level(logging.INFO, "frugal"):
        yield caplog


def vit_state(seed: int = 0) -> State:
    """A vision transformer of timm's whose heads are 64 wide."""
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(**SIZES, num_classes=5)
    return dict(shaken(model).state_dict())


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def imported(path: Path, out: Path, **options: Any) -> State:
    import_weights(Options(source=path, out=out, **options))
    return load_weights(find_checkpoint(out))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and " 0x" not in said
    assert "Error" not in said and "<class" not in said and "\x1b" not in said
    return said


# ------------------------------------------------------------------------------------------------
# Several sets


@pytest.mark.parametrize(
    ("plain", "other"), [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "ema")]
)
def test_of_a_plain_and_an_averaged_set_one_is_taken_and_the_other_named(
    plain: str, other: str, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    sets = {plain: vit_state(0), other: vit_state(1)}
    path = saved(tmp_path / "w.pth", {**sets, "epoch": 3, "optimizer": {"state": {0: {"a": 1}}}})
    weights = imported(path, tmp_path / "plain")
    assert weights["model.image.norm.bias"].equal(sets[plain]["norm.bias"])
    assert f"{plain} is taken, {other} left" in told.text
    assert f"--weights-key {other}" in told.text
    told.clear()
    weights = imported(path, tmp_path / "other", weights_key=other)
    assert weights["model.image.norm.bias"].equal(sets[other]["norm.bias"])
    assert "left" not in told.text
    said = refused(lambda: imported(path, tmp_path / "no", weights_key="average"))
    assert f"no weights under 'average'; there are {plain}, {other}, " in said


def test_sets_of_unusual_names_are_listed_and_chosen_among(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    sets = {"teacher": vit_state(0), "net": vit_state(1)}
    path = saved(tmp_path / "w.pth", sets)
    for read in (lambda: imported(path, tmp_path / "no"), lambda: read_encoder(path)):
        said = refused(read)
        assert "several others: teacher, net" in said and "--weights-key teacher" in said
    weights = imported(path, tmp_path / "net", weights_key="net")
    assert weights["model.image.norm.bias"].equal(sets["net"]["norm.bias"])
    path = saved(tmp_path / "one.pth", {"net": sets["net"]})
    assert read_weights(path).keys() == sets["net"].keys()
    assert "holds weights under net" in told.text
    said = refused(lambda: read_weights(saved(tmp_path / "none.pth", {"epoch": 3, "args": "x"})))
    assert "holds no state_dict; it holds epoch, args" in said


def test_of_two_encoders_in_one_set_the_base_is_taken_and_the_other_named(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    from frugal.cit.published_vision import read_vision

    base, momentum = vit_state(0), vit_state(1)
    state = {f"module.base_encoder.{n}": t for n, t in base.items()}
    state |= {f"module.momentum_encoder.{n}": t for n, t in momentum.items()}
    path = saved(tmp_path / "moco.pth.tar", {"state_dict": state})
    moved = path.rename(tmp_path / "moco.pth")
    for read in (
        lambda: read_vision(moved).state["norm.bias"],
        lambda: read_encoder(moved).state["norm.bias"],
        lambda: imported(moved, tmp_path / "base")["model.image.norm.bias"],
    ):
        told.clear()
        assert read().equal(base["norm.bias"])
        assert "base_encoder is taken, momentum_encoder left" in told.text
    weights = imported(moved, tmp_path / "other", weights_key="momentum_encoder")
    assert weights["model.image.norm.bias"].equal(momentum["norm.bias"])


def test_two_sets_under_a_name_of_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where open_clip's own model computes, whose reader would take another set."""
    for vision, kind in ((VISION, DualEncoder), (VISION | {"qk_norm": True}, Wrapped)):
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small", config)
        model, _, preprocess = open_clip.create_model_and_transforms("ViT-small")
        averaged = {f"module.{n}": t for n, t in shaken(model).state_dict().items()}
        plain = {n: torch.zeros_like(t) for n, t in averaged.items()}
        path = saved(tmp_path / "w.pt", {"state_dict": plain, "ema": averaged})
        foreign = load_model(path, name="ViT-small", weights_key="ema")
        assert type(foreign.model) is kind
        tokenize = open_clip.get_tokenizer("ViT-small")
        assert_same(made_here(foreign), made_by_open_clip(model, preprocess, tokenize))


def test_a_key_is_for_files(clip_run: Path, tmp_path: Path) -> None:
    export(Export(checkpoint=clip_run, to="open_clip", out=tmp_path / "o"))
    assert "is a folder; leave it out" in refused(
        lambda: load_model(tmp_path / "o", weights_key="ema")
    )
    assert "--weights-key ema is for a file" in refused(
        lambda: load_model(clip_run, weights_key="ema")
    )


# ------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "front", ["module.", "_orig_mod.", "model.", "backbone.", "encoder.", "model.module.backbone."]
)
def test_what_wrappers_and_whole_models_put_in_front_is_understood(
    front: str, tmp_path: Path
) -> None:
    state = vit_state()
    path = saved(tmp_path / "w.pth", {f"{front}{n}": t for n, t in state.items()})
    weights = imported(path, tmp_path / "run")
    assert weights["model.image.norm.bias"].equal(state["norm.bias"])
    assert read_encoder(path).state["norm.bias"].equal(state["norm.bias"])


@pytest.mark.parametrize("front", ["clip_model.", "model.", "module.model."])
def test_whole_clip_models_may_stand_inside_of_others(front: str, tmp_path: Path) -> None:
    state = openai_model(resnet=False).state_dict()
    inner = {n.replace("resblocks.", "resblocks._orig_mod."): t for n, t in state.items()}
    content = {f"{front}{n}": t for n, t in inner.items()} | {"loss.weight": torch.zeros(2)}
    path = saved(tmp_path / "w.pt", content)
    foreign = load_model(path, name="openai")
    assert foreign.model.image.norm.bias.equal(state["visual.ln_post.bias"])
    assert read_encoder(path).state["norm.bias"].equal(state["visual.ln_post.bias"])
    alone = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    path = saved(tmp_path / "alone.pt", alone)
    assert read_encoder(path).state["norm.bias"].equal(state["visual.ln_post.bias"])


def test_a_name_that_two_wrappers_share_is_refused() -> None:
    state = {"module.a": torch.zeros(2), "a": torch.ones(2)}
    assert "holds a twice" in refused(lambda: state_in(state, source="F"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {n: t.to(dtype) for n, t in vit_state().items()}
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    for bias in (
        read_encoder(path).state["norm.bias"],
        imported(path, tmp_path / "run")["model.image.norm.bias"],
    ):
        assert bias.dtype == torch.float32 and bias.equal(state["norm.bias"].float())


# ------------------------------------------------------------------------------------------------
# Parts, and files beside each other


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_parts_are_read_whole(ending: str, tmp_path: Path) -> None:
    model = shaken(ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)))
    folder = tmp_path / "vit"
    model.save_pretrained(folder, max_shard_size="8KB")
    if ending == "bin":  # as older versions saved them
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for file in folder.glob("*.safetensors"):
            state = read_weights(file)
            torch.save(state, folder / f"{file.stem}.bin")
            file.unlink()
        names = {n: f.replace("safetensors", "bin") for n, f in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    parts = sorted(folder.glob(f"model-*.{ending}"))
    assert len(parts) > 1
    state = read_encoder(folder).state
    assert state["norm.bias"].equal(model.layernorm.bias)
    imported(folder, tmp_path / "run")
    parts[0].unlink()
    said = refused(lambda: read_encoder(folder))
    assert f"of which 1 are missing, the first {parts[0].name}" in said


def test_of_two_files_in_a_folder_the_one_that_is_left_is_named(
    clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "o"
    export(Export(checkpoint=clip_run, to="open_clip", out=folder))
    torch.save({}, folder / "open_clip_pytorch_model.bin")
    load_model(folder)
    said = "open_clip_model.safetensors is taken, open_clip_pytorch_model.bin left"
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# What is no number


def clip_state(bad: str, odd: float) -> State:
    state = dict(openai_model(resnet=False).state_dict())
    state[bad] = state[bad].clone()
    state[bad].view(-1)[0] = odd
    return state


def spoiled_vit(odd: float) -> State:
    state = vit_state()
    state["blocks.1.mlp.fc2.bias"][2] = odd
    return state


def spoiled_transformers(folder: Path, kind: str, bert: Path) -> Path:
    model = shaken(transformers_model(kind))
    weight = next(p for n, p in model.named_parameters() if n.endswith("patch_embedding.weight"))
    with torch.no_grad():
        weight.view(-1)[5] = torch.nan
    save_with(folder, model, bert, image_processor(kind))
    return folder


READERS: dict[str, Callable[[Path, Path, Callable[..., Path]], Any]] = {
    "OpenAI's file": lambda p, b, r: load_model(
        saved(p / "w.pt", clip_state("visual.proj", torch.inf)), name="openai"
    ),
    "a file in timm's layout": lambda p, b, r: imported(
        saved(p / "w.pth", spoiled_vit(torch.nan)), p / "out"
    ),
    "a teacher": lambda p, b, r: read_encoder(saved(p / "w.pth", spoiled_vit(-torch.inf))),
    "an averaged set": lambda p, b, r: imported(
        saved(p / "w.pth", {"model": vit_state(), "ema": spoiled_vit(torch.nan)}), p / "out",
        weights_key="ema",
    ),
    "a CLIPModel": lambda p, b, r: load_model(spoiled_transformers(p / "f", "clip", b)),
    "a SiglipModel": lambda p, b, r: load_model(spoiled_transformers(p / "f", "siglip", b)),
    "a run that is measured": lambda p, b, r: load_model(r(CLIP, spoil=torch.nan)),
    "a run as an encoder": lambda p, b, r: read_encoder(r(CLIP, spoil=torch.nan)),
    "a run that leaves as it is": lambda p, b, r: export(
        Export(checkpoint=r(CLIP, spoil=torch.nan), to="frugal", out=p / "out")
    ),
    "a run that leaves for timm": lambda p, b, r: export(
        Export(checkpoint=r(CLIP, spoil=torch.inf), to="timm", out=p / "out")
    ),
}  # fmt: skip
CLIP = small(clip_encoder("B/16"))


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_weights_that_are_not_finite(
    reader: str, make_run: Callable[..., Path], bert: Path, tmp_path: Path
) -> None:
    said = refused(lambda: READERS[reader](tmp_path, bert, make_run))
    assert "are not finite: there is NaN or infinity in " in said
    assert not (tmp_path / "out").exists()


def test_masks_of_infinities_are_no_weights() -> None:
    mask = torch.full((3, 3), -torch.inf)
    state = {"transformer.attn_mask": mask, "weight": torch.zeros(2)}
    assert state_in(state, source="F").keys() == {"weight"}


# ------------------------------------------------------------------------------------------------
# Names that contradict what a file says


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-small and ViT-small-quickgelu of open_clip, of the size of :func:`openai_model`."""
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT | {"width": 64, "heads": 1}}
    for name, more in (("ViT-small", {}), ("ViT-small-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config | more)


NUMBERS = {
    "input_resolution": torch.tensor(32), "context_length": torch.tensor(12),
    "vocab_size": torch.tensor(49408),
}  # fmt: skip


def test_openais_file_is_not_computed_with_plain_gelu(
    names: None, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    state = openai_model(resnet=False).state_dict()
    path = saved(tmp_path / "w.pt", {**state, **NUMBERS})
    said = refused(lambda: load_model(path, name="ViT-small"))
    assert "is a file of OpenAI's" in said and "give --model ViT-small-quickgelu" in said
    for name in ("ViT-small-quickgelu", "openai", None):
        foreign: ModelBundle = load_model(path, name=name)
        assert foreign.config.image.activation == foreign.config.text.activation == "quick_gelu"
    half = saved(tmp_path / "half.pt", {n: t.half() for n, t in state.items()})
    load_model(half, name="ViT-small")
    assert "is in half precision, as OpenAI's files are" in told.text
    trainer = saved(tmp_path / "epoch_1.pt", {"epoch": 1, "name": "x", "state_dict": state})
    said = refused(lambda: load_model(trainer, name="openai"))
    assert "was saved by open_clip's trainer" in said


def test_what_a_model_computes_with_is_printed_when_it_is_imported(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {**openai_model(resnet=False).state_dict(), **NUMBERS})
    said = describe(import_weights(Options(source=path, out=tmp_path / "run")))
    assert (
        "image tower: heads 2, activation quick_gelu, epsilon 1e-05, pooled by class, "
        "mean 0.4815 0.4578 0.4082, std 0.2686"
    ) in said
    assert (
        "text tower: activation quick_gelu, heads 1, epsilon 1e-05, pooled by end_of_text" in said
    )
    assert "the shorter side resized to 32 (bicubic), the middle 32x32 pixels" in said


def test_a_name_of_another_size_says_which_tensors_and_shapes(names: None, tmp_path: Path) -> None:
    state = dict(openai_model(resnet=False).state_dict())
    state["visual.conv1.weight"] = torch.zeros(128, 3, 4, 4)
    del state["ln_final.bias"]
    said = refused(lambda: load_model(saved(tmp_path / "w.pt", state), name="ViT-small"))
    assert "open_clip's ViT-small): it lacks ln_final.bias, " in said
    assert "visual.conv1.weight has the shape (128, 3, 4, 4) there and (128, 3, 8, 8) here" in said
    path = saved(tmp_path / "w.pth", vit_state())
    said = refused(lambda: imported(path, tmp_path / "o", model="vit_tiny_patch16_224"))
    assert "does not hold timm's vit_tiny_patch16_224: it lacks blocks.10.attn.proj.bias" in said
    assert "cls_token has the shape (1, 1, 64) there and (1, 1, 192) here" in said


class Settings:
    """Of a training script that is not installed where its files are read."""


@pytest.mark.parametrize("held", [nn.Linear(2, 2), datetime.datetime.now(), Settings()])
@pytest.mark.parametrize("archive", [True, False])
def test_objects_beside_weights_are_refused_by_name(
    held: Any, archive: bool, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    content = {"model": vit_state(), "args": held}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    said = refused(lambda: read_weights(path))
    kind = type(held)
    name = "torch.nn.modules.linear.Linear" if kind is nn.Linear else kind.__qualname__
    assert f"{name}, whose code would have to be run" in said
    assert "torch.save(model.state_dict(), FILE)" in said


# ------------------------------------------------------------------------------------------------
# Where captions are pooled


def test_the_oldest_configurations_of_clip_pool_at_the_highest_id(
    bert: Path, tmp_path: Path
) -> None:
    """A caption ends with token 2, which in such a configuration means "the highest"."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary[2], vocabulary[3] = "[SEP]", "[CLS]"
    from transformers import BertTokenizer

    swapped = tmp_path / "swapped"
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(swapped)
    assert HuggingFace(name=str(swapped)).load().end_id == 2
    model = shaken(transformers_model("clip"))
    model.config.text_config.eos_token_id = 2
    folder = tmp_path / "m"
    save_with(folder, model, swapped, image_processor("clip"))
    foreign = load_model(folder)
    assert isinstance(foreign.model, Wrapped)
    theirs = AutoModel.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)(
        ["a photo of a dog", "two red squares", "words " * 40],
        max_length=16, truncation=True, padding=True, return_tensors="pt",
    )  # fmt: skip
    words.pop("token_type_ids", None)
    with torch.no_grad():
        expected = theirs.get_text_features(**words).pooler_output
    expected = nn.functional.normalize(expected, dim=-1)
    assert (made_here(foreign)[1] - expected).abs().max() < 2e-5


def test_a_text_model_without_a_pooler_is_a_sentence(bert: Path, tmp_path: Path) -> None:
    text = DistilBertConfig(vocab_size=90, dim=24, n_layers=1, n_heads=2, hidden_dim=48)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**SMALL, image_size=32, patch_size=8), text, projection_dim=12
    )
    save_with(tmp_path / "m", VisionTextDualEncoderModel(config), bert, image_processor("vit"))
    said = refused(lambda: load_model(tmp_path / "m"))
    assert "(distilbert) pools nothing" in said


# ------------------------------------------------------------------------------------------------
# Our own exports

ROUND_TRIPS = {
    "another activation, epsilons, heads and pixels": small(
        clip_encoder("B/16", quick_gelu=True),
        image={"heads": 4, "norm_epsilon": 1e-3, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.3, 0.2)},
        text={"heads": 5, "norm_epsilon": 1e-4},
    ),
    "a patch bias, fixed positions and other poolings": small(
        clip_encoder("B/16"),
        image={"patch_bias": True, "positions": "sincos", "pooling": "mean_all", "heads": 2},
        text={"pooling": "last", "pad_id": 0},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "huggingface", "timm"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_exports_come_back_with_the_numbers_they_left_with(
    name: str, to: Any, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(ROUND_TRIPS[name])
    out = tmp_path / "out"
    try:
        export(Export(checkpoint=run, to=to, out=out))
    except InputError as error:  # what a library has no place for is named, not altered
        assert "cannot express model." in str(error)
        return
    imported(out, tmp_path / "back")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    before, after = (load_model(path) for path in (run, tmp_path / "back"))
    assert before.image.mean == pytest.approx(after.image.mean)
    with torch.no_grad():
        pooled = [
            model.image.eval().forward_pooled(images) for model in (before.model, after.model)
        ]
        torch.testing.assert_close(pooled[1], pooled[0], rtol=0, atol=1e-5)
        if to == "timm":
            return
        texts = [
            trained.model.encode_text(torch.tensor([row]), torch.tensor([len(row)]))
            for trained in (before, after)
            for row in [trained.tokenizer.assemble(
                trained.tokenizer.encode("a photo of a dog"), 16)]
        ]  # fmt: skip
    torch.testing.assert_close(texts[1], texts[0], rtol=0, atol=1e-5)
    tower = read_encoder(tmp_path / "back").build()
    with torch.no_grad():
        torch.testing.assert_close(tower.forward_pooled(images), pooled[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["text blocks", "token table", "flat pixels"])
def test_an_openai_file_that_is_not_whole_is_one_sentence(part: str, tmp_path: Path) -> None:
    state = dict(openai_model(resnet=False).state_dict())
    if part == "text blocks":
        state = {n: t for n, t in state.items() if not n.startswith("transformer.resblocks.")}
        said = "holds no transformer.resblocks.0.mlp.c_fc.weight"
    elif part == "token table":
        del state["token_embedding.weight"]
        said = "it has no token_embedding.weight"
    else:
        state["visual.conv1.weight"] = state["visual.conv1.weight"].flatten(1)
        said = "has 2 dimensions, not 4"
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(InputError, match=re.escape(said)):
        load_model(tmp_path / "file.pt", name="openai")


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in (None, "openai", "ViT-B-32"):
        with pytest.raises(InputError, match="there is no file or folder"):
            load_model(tmp_path / "nothere.pt", name=name)
