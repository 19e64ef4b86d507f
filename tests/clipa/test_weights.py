"""Published weights: files of every kind to towers that give the same embeddings."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from frugal.clipa.named_models import MODELS, named_model
from frugal.clipa.published_weights import Published, read_published
from frugal.clipa.tower_of_weights import fit_towers
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.weight_names import from_open_clip, to_open_clip

GOLDEN = Path(__file__).parents[1] / "golden" / "clipa"
VOCABULARY = 500
OPEN_CLIP_NAMES = [name for name in open_clip.list_models() if "CLIPA" in name]


def shallow(config: DualEncoderConfig) -> DualEncoderConfig:
    """The same towers with one block and a short vocabulary."""
    return replace(
        config,
        image=replace(config.image, depth=1),
        text=replace(config.text, depth=1, vocabulary=VOCABULARY),
    )


def open_clip_model(name: str) -> torch.nn.Module:
    settings = open_clip.get_model_config(name)
    settings["vision_cfg"]["layers"] = settings["text_cfg"]["layers"] = 1
    settings["text_cfg"]["vocab_size"] = VOCABULARY
    for tokenizer in ("hf_tokenizer_name", "tokenizer_kwargs"):
        settings["text_cfg"].pop(tokenizer, None)
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**settings).eval()
    with torch.no_grad():
        for weight in model.parameters():  # no norm is 1 and no bias 0, so that a swap shows
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def fitted(published: Published, **options) -> tuple[DualEncoderConfig, dict]:
    choices = {
        "name": None, "image_size": None, "image_pooling": None, "heads": None,
        "as_in_open_clip": False,
    }  # fmt: skip
    return fit_towers(published, **{**choices, **options}, source="the file")


# ------------------------------------------------------------------------------------------------
# open_clip


def test_open_clip_ships_the_models_that_have_names_here():
    assert len(OPEN_CLIP_NAMES) >= 6
    assert set(OPEN_CLIP_NAMES) <= MODELS.keys()


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
@torch.inference_mode()
def test_embeddings_equal_those_of_open_clip_both_ways(name):
    theirs = open_clip_model(name)
    config = shallow(named_model(name, as_in_open_clip=True))
    ours = config.build().eval()
    ours.load_state_dict(from_open_clip(theirs.state_dict(), config))
    size = theirs.visual.image_size[0]
    images = torch.randn(2, 3, size, size)
    token_ids = torch.randint(1, VOCABULARY, (3, 32))
    token_ids[0, 20:] = 0
    for mine, other in (
        (ours.encode_image(images), theirs.encode_image(images, normalize=True)),
        (ours.encode_text(token_ids), theirs.encode_text(token_ids, normalize=True)),
        (ours.logit_scale.exp().squeeze(), theirs.logit_scale.exp()),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-5)
    back = to_open_clip(ours.state_dict(), config)
    assert back.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_named_towers_have_every_parameter_of_open_clip_s(name):
    settings = open_clip.get_model_config(name)
    for tokenizer in ("hf_tokenizer_name", "tokenizer_kwargs"):
        settings["text_cfg"].pop(tokenizer, None)
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**settings)
        ours = DualEncoder(named_model(name, as_in_open_clip=True))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    written = to_open_clip(ours.state_dict(), ours.config)
    assert {key: value.shape for key, value in written.items()} == shapes
    assert ours.config.image.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.config.text.heads == theirs.transformer.resblocks[0].attn.num_heads


def test_original_towers_differ_from_open_clip_s_in_epsilon_activation_and_positions():
    original, theirs = (
        named_model("ViT-H-14-CLIPA"),
        named_model("ViT-H-14-CLIPA", as_in_open_clip=True),
    )
    changes = {
        f"{part}.{key}": (value, vars(getattr(theirs, part))[key])
        for part in ("image", "text")
        for key, value in vars(getattr(original, part)).items()
        if value != vars(getattr(theirs, part))[key]
    }
    assert changes == {
        "image.activation": ("gelu_tanh", "gelu"),
        "image.norm_epsilon": (1e-6, 1e-5),
        "image.positions": ("sincos_bigvision", "learned"),
        "text.activation": ("gelu_tanh", "gelu"),
        "text.norm_epsilon": (1e-6, 1e-5),
    }


# ------------------------------------------------------------------------------------------------
# Files


TINY = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 48}


def tiny(*, name: str = "ViT-L-14-CLIPA", **image) -> DualEncoder:
    config = named_model(name)
    image = {**TINY, "patch_size": 8, "image_size": 32, **image}
    return (
        replace(
            config,
            image=replace(config.image, **image),
            text=replace(config.text, **TINY, vocabulary=50, length=9),
            embed_dim=12,
        )
        .build(torch.Generator().manual_seed(3))
        .eval()
    )


def assert_same_model(published: Published, model: DualEncoder, **options) -> None:
    config, state = fitted(published, heads=(4, 4), **options)
    assert config.image == model.config.image
    assert config.text == model.config.text
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-L-16-CL16-GAP"])
@pytest.mark.parametrize("kind", ["plain", "checkpoint", "data parallel", "compiled", "legacy"])
def test_pytorch_files_are_read_however_they_were_saved(tmp_path, name, kind):
    model = tiny(name=name)
    state = to_open_clip(model.state_dict(), model.config)
    content: dict = state
    if kind == "checkpoint":
        content = {"epoch": 3, "name": "a", "state_dict": state, "optimizer": {"state": {}}}
    elif kind == "data parallel":
        content = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    elif kind == "compiled":
        content = {"state_dict": {f"_orig_mod.{key}": value for key, value in state.items()}}
    path = tmp_path / "epoch_3.pt"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    assert_same_model(read_published(path), model)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_safetensors_are_read(tmp_path, whole_folder):
    model = tiny()
    path = tmp_path / "open_clip_model.safetensors"
    save_file(to_open_clip(model.state_dict(), model.config), path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert_same_model(read_published(tmp_path if whole_folder else path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = tiny(positions="learned").to(dtype).float()
    state = to_open_clip(model.state_dict(), model.config)
    save_file({key: value.to(dtype) for key, value in state.items()}, tmp_path / "a.safetensors")
    assert_same_model(read_published(tmp_path), model)


@pytest.mark.parametrize("positions", ["sincos_bigvision", "sincos", "learned"])
@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-L-16-CL16-GAP"])
def test_a_fixed_position_table_is_recognized(tmp_path, name, positions):
    model = tiny(name=name, positions=positions)
    save_file(to_open_clip(model.state_dict(), model.config), tmp_path / "a.safetensors")
    assert_same_model(read_published(tmp_path), model)


def test_the_width_of_b16_tells_that_its_class_token_is_pooled():
    model = shallow(named_model("ViT-B-16-CL16")).build()
    image = fitted(Published(model.state_dict(), None))[0].image
    assert (image.pooling, image.norm_after_pooling, image.heads) == ("class", False, 12)
    config, _ = fitted(Published(model.state_dict(), None), image_pooling="mean_all")
    assert (config.image.pooling, config.image.norm_after_pooling) == ("mean_all", True)


def test_rectangular_images_must_be_stated(tmp_path):
    model = tiny(image_size=(16, 40), positions="learned")
    published = Published(model.state_dict(), None)
    with pytest.raises(InputError, match=r"11 rows, .* give --image-size HEIGHT WIDTH"):
        fitted(published, heads=(4, 4))
    assert_same_model(published, model, image_size=(16, 40))


def test_unknown_widths_need_their_heads():
    published = Published(tiny().state_dict(), None)
    with pytest.raises(InputError, match="image tower of width 32 has; give --heads"):
        fitted(published)


def test_a_name_that_does_not_fit_is_refused():
    state = shallow(named_model("ViT-L-14-CLIPA")).build().state_dict()
    with pytest.raises(InputError, match=r"where the towers need \(1, 1, 1280\).*check --model"):
        fitted(Published(state, None), name="ViT-H-14-CLIPA")
    with pytest.raises(InputError, match="there is no CLIPA model 'ViT-Q-14-CLIPA'; choose from"):
        fitted(Published(state, None), name="ViT-Q-14-CLIPA")


@pytest.mark.parametrize("name", ["ViT-L-16-CL16-Syntax-GAP", "ViT-H-14-CL8-SyntaxMask-GAP"])
def test_published_spellings_of_names_are_known(name):
    plain = name.replace("-SyntaxMask", "").replace("-Syntax", "")
    assert named_model(name) == named_model(plain)
    with pytest.raises(InputError, match="leave out --as-in-open-clip"):
        named_model(name, as_in_open_clip=True)


# ------------------------------------------------------------------------------------------------
# npz


def bare() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "clipa_npz_params.npz") as archive:
        return dict(archive)


def write_npz(path: Path, members: dict[str, np.ndarray], *, compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **members)
    return path


def moments(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Optimizer and clock of a train state: first moments in bfloat16, as two raw bytes."""
    state = {"opt/0/count": np.int32(7), "chrono/accum_train_time": np.float64(3.5)}
    for name, value in params.items():
        state[f"opt/0/mu/{name}"] = np.zeros(value.shape, "V2")
        state[f"opt/0/nu/{name}"] = np.ones_like(value)
    return state


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("compressed", [False, True])
def test_parameters_are_found_in_every_kind_of_train_state(tmp_path, prefix, compressed):
    params = bare()
    members = {f"{prefix}{name}": value for name, value in params.items()}
    if prefix:
        members |= moments(params)
    path = write_npz(tmp_path / "a.npz", members, compressed=compressed)
    expected = read_published(GOLDEN / "clipa_npz_params.npz")
    found = read_published(path)
    assert found.heads == expected.heads == (4, 3)
    assert found.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert torch.equal(found.state[name], value), name


def test_bfloat16_parameters_are_read_from_their_raw_bytes(tmp_path):
    params = {name: torch.from_numpy(value).bfloat16() for name, value in bare().items()}
    raw = {name: value.view(torch.int16).numpy().view("V2") for name, value in params.items()}
    path = write_npz(tmp_path / "a.npz", raw)
    found = read_published(path).state
    expected = read_published(
        write_npz(tmp_path / "b.npz", {name: v.float().numpy() for name, v in params.items()})
    )
    for name, value in expected.state.items():
        assert torch.equal(found[name], value), name


def test_an_npz_tells_its_towers_but_not_its_image_size():
    published = read_published(GOLDEN / "clipa_npz_params.npz")
    case = json.loads((GOLDEN / "clipa_npz_params_expected.json").read_text())
    config, state = fitted(published, image_size=case["image"]["size"])
    assert (config.image.heads, config.text.heads) == (4, 3)
    assert config.image.positions == "sincos_bigvision"
    assert "image.pos_embed" not in state
    assert fitted(published)[0].image.image_size == 224
    config, state = fitted(published, image_size=(16, 24), as_in_open_clip=True)
    assert config.image.positions == "learned"
    assert state["image.pos_embed"].shape == (1, 7, 32)
    with pytest.raises(InputError, match=r"has \(4, 3\) attention heads .* have \(8, 3\)"):
        fitted(published, heads=(8, 3))


def test_an_npz_of_another_kind_of_model_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", {**bare(), "img/MAPHead_0/probe": np.zeros(3)})
    with pytest.raises(InputError, match="'img/MAPHead_0/probe', which no tower of ours has"):
        read_published(path)
    params = bare()
    del params["txt/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/value/bias"]
    with pytest.raises(InputError, match=r"but no .*value/bias; it is incomplete"):
        read_published(write_npz(tmp_path / "b.npz", params))
    params = bare()
    del params["txt/head/kernel"]
    with pytest.raises(InputError, match=r"text\.projection\.weight; it is incomplete"):
        fitted(read_published(write_npz(tmp_path / "c.npz", params)))


# ------------------------------------------------------------------------------------------------
# Damage and malice


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("run-by-a-pickle"),))


def test_no_pickle_is_ever_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Malicious()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt cannot be read as a PyTorch file of plain"):
        read_published(tmp_path / "a.pt")
    objects = np.array([Malicious()], dtype=object)
    np.savez(tmp_path / "b.npz", **{**bare(), "t": objects}, allow_pickle=True)
    with pytest.raises(InputError, match=r"b\.npz cannot be read as an npz of arrays"):
        read_published(tmp_path / "b.npz")
    assert not (tmp_path / "run-by-a-pickle").exists()


@pytest.mark.parametrize("ending", ["pt", "safetensors", "npz", "bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "noise", "cut"])
def test_damaged_files_are_refused_with_a_sentence(tmp_path, ending, damage):
    path = tmp_path / f"weights.{ending}"
    model = tiny()
    state = to_open_clip(model.state_dict(), model.config)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "noise":
        path.write_bytes(bytes(range(256)) * 40)
    elif damage == "cut":
        if ending == "npz":
            write_npz(path, bare())
        elif ending == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=f"weights.{ending}"):
        read_published(path)


def test_a_damaged_member_of_an_npz_is_noticed(tmp_path):
    path = write_npz(tmp_path / "a.npz", bare())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("img/head/kernel.npy")
    content = bytearray(path.read_bytes())
    content[member.header_offset + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz cannot be read"):
        read_published(path)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds no state_dict"):
        read_published(tmp_path / "a.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="holds no weights; give the file to convert"):
        read_published(tmp_path / "folder")
