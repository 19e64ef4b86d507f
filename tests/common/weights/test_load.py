"""Models of other libraries give here what they give there."""

from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from foreign_makers import (
    TEXT,
    Archived,
    image_processor,
    openai_model,
    save_with,
    shaken,
    transformers_model,
)
from PIL import Image
from run_directories import small
from safetensors.torch import load_file
from torch import Tensor, nn

from frugal.common.data.tokenizers import HuggingFace
from frugal.common.embed import Options as EmbedOptions
from frugal.common.embed import embed
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.provenance import weights_digest
from frugal.common.export import Options, export
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoder
from frugal.common.models.named import clip_encoder, clipa_encoder
from frugal.common.weights.files import read_weights
from frugal.common.weights.libraries import is_run
from frugal.common.weights.load import load_model
from frugal.common.weights.torchscript import read_torchscript
from frugal.common.weights.wrapped import Wrapped

CAPTIONS = ["a photo of a dog", "two red squares", "words " * 40]


def pictures(size: tuple[int, int]) -> list[Image.Image]:
    """Three of the size that a model takes: kernels for resizing differ in a gray level."""
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (3, *size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def made_here(foreign: ModelBundle) -> tuple[Tensor, Tensor]:
    """(3, E) of the pictures and (3, E) of the captions, as evaluations make them."""
    size = foreign.config.image.height_width
    images = [foreign.transform.decode(encoded(image), size=size) for image in pictures(size)]
    embedder = Embedder(
        foreign.model,
        foreign.tokenizer,
        context_length=foreign.config.text.length,
        device=torch.device("cpu"),
        image=foreign.config.image,
    )
    with evaluating(foreign.model):
        return embedder.images(torch.from_numpy(np.stack(images))), embedder.texts(CAPTIONS)


def made_by_open_clip(model, preprocess, tokenize, size=(32, 32)) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        images = torch.stack([preprocess(image) for image in pictures(size)])
        return (
            model.eval().encode_image(images, normalize=True),
            model.encode_text(tokenize(CAPTIONS), normalize=True),
        )


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        other = nn.functional.normalize(other.float(), dim=-1)
        assert (mine - other).abs().max() < 2e-5
    assert (ours[0][0] - ours[0][1]).abs().max() > 1e-4  # the model tells pictures apart
    assert (ours[1][0] - ours[1][1]).abs().max() > 1e-4


# open_clip

CLIP = small(clip_encoder("B/16"))
RUNS = {
    "CLIP": CLIP,
    "rectangular images, layer scales, a sigmoid loss": small(
        clip_encoder("B/16"), image={"image_size": (24, 40), "layer_scale": 0.3},
        initial_logit_bias=-10.0,
    ),
    "OpenAI's activation, MLPs that are no multiple": small(
        clip_encoder("B/16", quick_gelu=True), image={"mlp_width": 61}
    ),
    "CLIPA, BERT": small(clipa_encoder("L/14"), text={"vocabulary": 90}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_our_exports_for_open_clip_are_the_run_again(
    name: str, make_run: Callable[..., Path], bert: Path, tmp_path: Path
) -> None:
    run = make_run(RUNS[name], tokenizer=HuggingFace(name=str(bert)) if "BERT" in name else None)
    export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))
    foreign = load_model(tmp_path / "out")
    assert isinstance(foreign.model, DualEncoder) and foreign.source.library == "open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    size = foreign.config.image.height_width
    assert_same(made_here(foreign), made_by_open_clip(model, preprocess, tokenize, size))
    trained = load_model(run)
    if "CLIPA" not in name:  # whose fixed positions are a table of open_clip's
        assert weights_digest(foreign.model) == weights_digest(trained.model)


def test_our_exports_for_transformers_are_the_run_again(clip_run: Path, tmp_path: Path) -> None:
    export(Options(checkpoint=clip_run, to="huggingface", out=tmp_path / "out"))
    foreign = load_model(tmp_path / "out")
    assert foreign.source.library == "transformers"
    trained = load_model(clip_run)
    assert weights_digest(foreign.model) == weights_digest(trained.model)
    assert foreign.config.image.grid == trained.config.image.grid


VISION = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
OPEN_CLIPS = {
    "an ordinary one": ({}, {}, {}, DualEncoder),
    "captions kept apart": ({}, {}, {"custom_text": True}, DualEncoder),
    "attention pooling": ({"attentional_pool": True, "attn_pooler_heads": 4}, {}, {}, Wrapped),
    "normed queries": ({"qk_norm": True}, {}, {}, Wrapped),
    "a ResNet": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}, {}, {}, Wrapped),
    "a bias of the last layer of captions": ({}, {"proj_bias": True}, {}, Wrapped),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ending"),
    [*((kind, "pt") for kind in OPEN_CLIPS), ("an ordinary one", "safetensors")],
)
def test_an_open_clip_name_with_a_file_is_that_model(
    kind: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_model

    vision, text, top, expected = OPEN_CLIPS[kind]
    config = {"embed_dim": 24, "vision_cfg": VISION | vision, "text_cfg": TEXT | text, **top}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small", config)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-small")
    shaken(model)
    path = tmp_path / f"weights.{ending}"
    if ending == "pt":  # as its trainer saves it, under DDP
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, path)
    else:
        save_model(model, str(path))
    before = copy.deepcopy(config)
    foreign = load_model(path, name="ViT-small")
    assert config == before
    assert type(foreign.model) is expected
    tokenize, size = open_clip.get_tokenizer("ViT-small"), foreign.config.image.height_width
    assert_same(made_here(foreign), made_by_open_clip(model, preprocess, tokenize, size))


# OpenAI's files


@pytest.mark.parametrize("resnet", [False, True], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("kind", ["TorchScript", "a state dict"])
@pytest.mark.filterwarnings("ignore")
def test_openais_files_are_read_without_running_them(
    kind: str, resnet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = openai_model(resnet=resnet)
    path = tmp_path / "ViT-tiny.pt"
    if kind == "TorchScript":
        size = 64 if resnet else 32
        images = torch.zeros(1, 3, size, size)
        traced = torch.jit.trace(Archived(model).eval(), images, check_trace=False)
        traced.half().save(str(path))
    else:
        torch.save(Archived(model).half().state_dict(), path)
    expected = Archived(model).half().state_dict()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("code of a file was compiled")

    monkeypatch.setattr(torch.jit, "load", never)
    state = read_weights(path)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    foreign = load_model(path, name="openai" if kind == "a state dict" else None)
    assert type(foreign.model) is (Wrapped if resnet else DualEncoder)
    preprocess = open_clip.image_transform(64 if resnet else 32, is_train=False)
    tokenize, size = open_clip.SimpleTokenizer(context_length=12), foreign.config.image.height_width
    assert_same(made_here(foreign), made_by_open_clip(model, preprocess, tokenize, size))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_a_torchscript_archive_with_anything_else_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", pickle.dumps(()))
        archive.writestr("a/data.pkl", pickle.dumps({"weight": Bomb()}))
    with pytest.raises(
        InputError, match=r"evil\.pt cannot be read as TorchScript .*builtins\.exec"
    ):
        load_model(path)
    torch.save({"state_dict": {"a": torch.zeros(2)}, "args": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth cannot be read"):
        load_model(tmp_path / "evil.pth", name="ViT-B-32")


# transformers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("clip", DualEncoder), ("siglip", Wrapped), ("vision-text-dual-encoder", Wrapped)],
)
def test_a_folder_of_transformers_is_that_model(
    kind: str, expected: type, bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    save_with(tmp_path / "m", shaken(transformers_model(kind)), bert, image_processor(kind))
    foreign = load_model(tmp_path / "m")
    assert type(foreign.model) is expected and foreign.source.library == "transformers"
    ours = made_here(foreign)

    model = AutoModel.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    options = {"padding": "max_length" if kind == "siglip" else True, "truncation": True}
    words = tokenizer(CAPTIONS, max_length=16, return_tensors="pt", **options)
    if kind == "siglip":  # which sees its padding
        words = {"input_ids": words["input_ids"]}
    size = foreign.config.image.height_width
    pixels = [foreign.transform.decode(encoded(image), size=size) for image in pictures(size)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in
                 (foreign.config.image.mean, foreign.config.image.std))  # fmt: skip
    images = (torch.from_numpy(np.stack(pixels)) / 255 - mean) / std
    with torch.no_grad():
        theirs = model(pixel_values=images, **words)
    assert_same(ours, (theirs.image_embeds, theirs.text_embeds))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_are_prepared_as_the_processor_of_the_folder_does(
    kind: str, bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    save_with(tmp_path / "m", transformers_model(kind), bert, image_processor(kind))
    foreign = load_model(tmp_path / "m")
    # even margins: transformers rounds half a pixel the other way
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (72, 36, 3), dtype=np.uint8))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "m")(image, return_tensors="pt")
    gray = foreign.transform.decode(encoded(image), size=(32, 32))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in
                 (foreign.config.image.mean, foreign.config.image.std))  # fmt: skip
    ours = (torch.from_numpy(gray.copy()) / 255 - mean) / std
    assert (ours - theirs["pixel_values"][0]).abs().max() * 255 * std.max() < 2.5  # gray levels


# What cannot be used.


def refused(path: Path, name: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path, name=name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_files_are_refused_in_a_sentence(
    clip_run: Path, bert: Path, tmp_path: Path
) -> None:
    export(Options(checkpoint=clip_run, to="open_clip", out=tmp_path / "o"))
    export(Options(checkpoint=clip_run, to="huggingface", out=tmp_path / "h"))
    for file in (tmp_path / "o" / "open_clip_model.safetensors", tmp_path / "h/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
        assert str(file.parent) in refused(file.parent)
    torch.save(openai_model(resnet=False).state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    assert "w.pt cannot be read" in refused(tmp_path / "w.pt", "ViT-B-32")
    (tmp_path / "o" / "open_clip_config.json").write_text('{"model_cfg": ')
    assert "open_clip_config.json does not describe a model" in refused(tmp_path / "o")


def test_a_model_that_does_not_fit_is_refused(clip_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(openai_model(resnet=False).state_dict(), path)
    assert "not of the model it is said to be" in refused(path, "ViT-B-32")
    assert "could not be loaded as open_clip's coca_ViT-B-32" in refused(path, "coca_ViT-B-32")
    assert "open_clip has no model called 'ViT-Z'" in refused(path, "ViT-Z")
    assert "give --model with open_clip's name" in refused(path)
    torch.save({"a": torch.zeros(2)}, path)
    assert "is no CLIP model of OpenAI's: it has no text_projection" in refused(path, "openai")
    export(Options(checkpoint=clip_run, to="huggingface", out=tmp_path / "h"))
    assert "is a folder, which does; leave it out" in refused(tmp_path / "h", "ViT-B-32")
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    for change, message in (
        (
            {"model_type": "bert"},
            "holds a model of type 'bert'; open_clip's, timm's and of transformers clip, siglip",
        ),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, "own code are not run"),
    ):
        (tmp_path / "h" / "config.json").write_text(json.dumps(config | change))
        assert message in refused(tmp_path / "h")
    deeper = copy.deepcopy(config)
    deeper["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "h" / "config.json").write_text(json.dumps(deeper))
    assert "not of the model its config.json describes" in refused(tmp_path / "h")


def test_runs_and_checkpoints_of_ours_are_no_foreign_models(clip_run: Path, tmp_path: Path) -> None:
    assert is_run(clip_run)
    assert is_run(next((clip_run / "checkpoints").glob("step_*")))
    export(Options(checkpoint=clip_run, to="frugal", out=tmp_path / "f"))
    assert is_run(tmp_path / "f")
    export(Options(checkpoint=clip_run, to="open_clip", out=tmp_path / "o"))
    assert not is_run(tmp_path / "o")


def test_an_archive_gives_the_names_that_its_state_dict_has(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)
            self.register_buffer("count", torch.tensor(3))
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * self.scale + self.count

    module = nn.Sequential(Inner(), nn.Linear(2, 2))
    torch.jit.script(module).save(str(tmp_path / "m.pt"))
    found = read_torchscript(tmp_path / "m.pt")
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)


# stored embeddings


@pytest.mark.parametrize("kind", ["siglip", "vision-text-dual-encoder"])
def test_what_only_another_library_computes_is_stored_as_it_puts_it_out(
    kind: str, bert: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_with(tmp_path / "m", shaken(transformers_model(kind)), bert, image_processor(kind))
    foreign = load_model(tmp_path / "m")
    (tmp_path / "images").mkdir()
    rows = ["filepath\ttitle"]
    for number, image in enumerate(pictures(foreign.config.image.height_width)):
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(image))
        rows.append(f"images/{number}.png\t{CAPTIONS[number]}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    data, out = (str(tmp_path / "pairs.csv"),), tmp_path / "out"
    given = {"checkpoint": tmp_path / "m", "data": data, "workers": 0, "dtype": "float32"}
    embed(EmbedOptions(**given, out=out, texts=True))
    stored = load_file(out / "00000.safetensors")
    images, texts = made_here(foreign)
    torch.testing.assert_close(stored["image"][:, 0], images, rtol=0, atol=1e-5)
    torch.testing.assert_close(stored["text"], texts, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="without an image tower of this library"):
        embed(EmbedOptions(**given, out=tmp_path / "pooled", output="pooled"))
