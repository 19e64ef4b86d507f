"""The frozen teacher: its numbers, and the files it comes from."""

import argparse
import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_milan as readable
import torch
from golden_cases import GOLDEN
from run_directories import write_run_of
from safetensors.torch import load_file, save_file

from frugal.common.errors import InputError
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from frugal.common.weights.image_towers import read_encoder
from frugal.flip.recipes import demo
from frugal.milan.model import encoder
from frugal.milan.teacher import FrozenTeacher, Teacher, load_teacher

RECORDED = load_file(GOLDEN / "teacher_clip_tiny.safetensors")
STATE = {n.removeprefix("state/"): t for n, t in RECORDED.items() if n.startswith("state/")}
IMAGES = RECORDED["input/images"]
STUDENT = encoder("S/8", image_size=32, width=32, depth=1, heads=2, mlp_width=64)


class Holder(torch.nn.Module):
    """A module with the names of OpenAI's, to be compiled to an archive as theirs was."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_buffer(leaf, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def written(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.pt"
    if kind == "archive":
        torch.jit.script(Holder(STATE)).save(path)
    elif kind == "saved again":
        torch.save(STATE, path)
    elif kind == "nested, data-parallel":
        torch.save({"state_dict": {f"module.{n}": t for n, t in STATE.items()}}, path)
    elif kind == "float32 without the integers":
        torch.save({n: t.float() for n, t in STATE.items() if t.ndim}, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(STATE, path)
    return path


KINDS = ["archive", "saved again", "nested, data-parallel", "float32 without the integers", "safe"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", KINDS)
def test_openais_file_gives_the_recorded_tokens_and_attention(kind, tmp_path):
    teacher = load_teacher(Teacher(source=str(written(tmp_path, kind))), STUDENT)
    tokens, importance = teacher(IMAGES)
    torch.testing.assert_close(tokens, RECORDED["out/tokens"], rtol=0, atol=2e-5)
    torch.testing.assert_close(importance, RECORDED["out/importance"], rtol=0, atol=1e-6)
    assert teacher.width == 128 and teacher.config.heads == 2
    assert not tokens.requires_grad and not importance.requires_grad
    teacher.tower.double()
    tokens, importance = teacher(IMAGES.double())
    torch.testing.assert_close(tokens.float(), RECORDED["out/tokens"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(importance.float(), RECORDED["out/importance"], rtol=0, atol=1e-7)
    plain, attention = readable.teach(teacher.tower, IMAGES.double())
    torch.testing.assert_close(plain, tokens, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        attention.float(), RECORDED["out/attention_mean_over_heads"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(attention[:, 0, 1:], importance, rtol=0, atol=1e-10)


def openai_teacher(tmp_path: Path, student=STUDENT, **options) -> FrozenTeacher:
    return load_teacher(Teacher(source=str(written(tmp_path, "safe")), **options), student)


def levels(seed: int = 0, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)


def normalized(images: torch.Tensor, mean, std) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


def test_pixels_are_normalized_as_the_students_unless_asked_otherwise(tmp_path):
    images = levels()
    imagenet = normalized(images, IMAGENET_MEAN, IMAGENET_STD)
    published, own = (openai_teacher(tmp_path, normalization=name) for name in ("student", "own"))
    expected = readable.teach(published.tower, imagenet)[0]
    corrected = readable.teach(own.tower, normalized(images, CLIP_MEAN, CLIP_STD))[0]
    assert (expected - corrected).abs().max() > 1e-3
    for given in (images, imagenet):  # bytes, or what was normalized for the student
        torch.testing.assert_close(published(given)[0], expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(own(given)[0], corrected, rtol=0, atol=2e-5)


def test_bfloat16_weights_are_those_that_autocast_would_make(tmp_path):
    teacher, whole = openai_teacher(tmp_path), openai_teacher(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, importance = teacher(levels())
        pixels = normalized(levels(), IMAGENET_MEAN, IMAGENET_STD)
        embedded, layout = whole.tower.embed(pixels)
        for block in whole.tower.blocks:
            embedded = block(embedded, layout)
        expected = whole.tower.projection(whole.tower.norm(embedded))
    assert tokens.dtype == torch.bfloat16 and torch.equal(tokens, expected)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance, whole(levels())[1], rtol=0.02, atol=1e-3)
    # for pictures, outside of the engine's autocast
    assert torch.equal(teacher(levels())[0], tokens)


def test_another_grid_is_refused_with_the_size_that_would_do(tmp_path):
    student = replace(STUDENT, image_size=64)
    with pytest.raises(InputError) as caught:
        openai_teacher(tmp_path, student)
    sentence = str(caught.value)
    assert "grid of 4x4 for images of 32x32" in sentence and "8x8 patches of 8" in sentence
    assert "--objective.teacher.image-size 64" in sentence
    with pytest.raises(InputError, match="image-size 24 40"):
        openai_teacher(tmp_path, replace(STUDENT, image_size=(12, 20), patch_size=4))


def test_a_resized_teacher_sees_resized_images_with_an_interpolated_table(tmp_path):
    student = replace(STUDENT, image_size=(12, 20), patch_size=4)  # 3 x 5 patches
    teacher = openai_teacher(tmp_path, student, image_size=(24, 40))
    images = levels(size=(12, 20))
    tokens, importance = teacher(images)
    assert tokens.shape == (3, 16, 128) and importance.shape == (3, 15)
    table = STATE["visual.positional_embedding"].float()
    grid = table[1:].T.reshape(1, 128, 4, 4)
    grid = torch.nn.functional.interpolate(grid, (3, 5), mode="bicubic", align_corners=False)
    expected = torch.cat((table[:1], grid.flatten(2)[0].T))
    torch.testing.assert_close(teacher.tower.pos_embed[0], expected, rtol=0, atol=1e-5)
    larger = torch.nn.functional.interpolate(
        images.float(), (24, 40), mode="bicubic", antialias=True
    ).clamp(0, 255)
    plain = readable.teach(teacher.tower, normalized(larger, IMAGENET_MEAN, IMAGENET_STD))[0]
    torch.testing.assert_close(tokens, plain, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------------------
# Other files


def assert_teaches_as(folder: Path | str, theirs, tmp_path: Path, **options) -> FrozenTeacher:
    """Our teacher's class token, projected, is another library's image embedding."""
    side = options.pop("side", 32)
    student = encoder("S/8", image_size=side, width=32, depth=1, heads=2, mlp_width=64)
    teacher = load_teacher(Teacher(source=str(folder), normalization="own", **options), student)
    pixels = normalized(levels(size=(side, side)), CLIP_MEAN, CLIP_STD)
    tokens, _ = teacher(levels(size=(side, side)))
    with torch.no_grad():
        expected = theirs(pixels)
    torch.testing.assert_close(tokens[:, 0], expected, rtol=0, atol=3e-5)
    return teacher


def open_clip_model():
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    return CLIP(48, vision, text).eval(), {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}


def test_open_clips_folder_and_file(tmp_path):
    model, config = open_clip_model()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    teacher = assert_teaches_as(folder, model.visual, tmp_path)
    assert teacher.config.heads == 4 and teacher.config.activation == "gelu"
    file = tmp_path / "epoch_7.pt"
    content = {"epoch": 7, "name": "a run", "state_dict": model.state_dict(), "optimizer": {}}
    torch.save(content, file)
    assert_teaches_as(file, model.visual, tmp_path, heads=4)
    torch.save(model.state_dict(), file)
    assert_teaches_as(file, model.visual, tmp_path, heads=4, activation="gelu")


def test_a_folder_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 96, "image_size": 32, "patch_size": 8, "projection_dim": 40,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 8,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=40)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    teacher = assert_teaches_as(
        tmp_path / "clip", lambda pixels: model.get_image_features(pixels).pooler_output, tmp_path
    )
    assert teacher.config.activation == "quick_gelu" and teacher.config.heads == 3
    with pytest.raises(InputError, match="says itself what its tower is like"):
        read_encoder(tmp_path / "clip", heads=2)


def timm_model(**options):
    import timm

    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    model = timm.models.VisionTransformer(**shape, num_classes=0, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_dinos_file_gives_the_tokens_of_a_plain_vision_transformer(tmp_path):
    model = timm_model()
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    teacher = load_teacher(Teacher(source=str(tmp_path / "dino.pth")), STUDENT)
    tokens, importance = teacher(levels())
    with torch.no_grad():
        expected = model.forward_features(normalized(levels(), IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert teacher.width == 128 and teacher.config.norm_epsilon == 1e-6
    assert importance.shape == (3, 16)


def test_slips_file_is_projected_and_its_other_parts_are_left(tmp_path):
    model = timm_model()
    projection = torch.randn(128, 24, generator=torch.Generator().manual_seed(1))
    state = {f"module.visual.{name}": t for name, t in model.state_dict().items()}
    state["module.image_projection"] = projection
    state["module.text_projection"] = torch.zeros(3, 24)
    state["module.image_mlp.layer1.weight"] = torch.zeros(5, 128)
    content = {
        "epoch": 99, "state_dict": state, "best_acc1": np.float64(41.0), "scaler": {"scale": 2.0},
        "args": argparse.Namespace(lr=1e-3, output_dir=Path("somewhere")),
    }  # fmt: skip
    torch.save(content, tmp_path / "slip.pt")
    teacher = load_teacher(Teacher(source=str(tmp_path / "slip.pt")), STUDENT)
    with torch.no_grad():
        features = model.forward_features(normalized(levels(), IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(teacher(levels())[0], features @ projection, rtol=1e-4, atol=2e-4)
    assert teacher.width == 24


VISION = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8, "projection_dim": 40, "hidden_act": "gelu",
    "layer_norm_eps": 1e-4,
}  # fmt: skip
PIXELS = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32,
          "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}  # fmt: skip


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("projected", [False, True])
def test_an_image_tower_of_clip_alone_as_transformers_saves_it(tmp_path, file, projected):
    import transformers

    torch.manual_seed(0)
    name = "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel"
    model = getattr(transformers, name)(transformers.CLIPVisionConfig(**VISION)).eval()
    model.save_pretrained(tmp_path)
    content = PIXELS if file == "preprocessor_config.json" else {"image_processor": PIXELS}
    (tmp_path / file).write_text(json.dumps(content))
    teacher = load_teacher(Teacher(source=str(tmp_path), normalization="own"), STUDENT)
    tokens, _ = teacher(levels())
    with torch.no_grad():
        made = model(normalized(levels(), PIXELS["image_mean"], PIXELS["image_std"]))
    expected = made.image_embeds if projected else made.pooler_output
    torch.testing.assert_close(tokens[:, 0], expected, rtol=0, atol=3e-5)
    assert teacher.config.norm_epsilon == 1e-4 and teacher.config.activation == "gelu"


def test_a_folder_of_timm_says_heads_epsilon_and_pixels(tmp_path):
    import timm

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 6}
    name = "vit_base_patch16_clip_224"  # whose epsilon is 1e-5
    model = timm.create_model(name, num_classes=3, **args).eval()
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 32, 32]}
    about = {"architecture": name, "num_classes": 3, "model_args": args, "pretrained_cfg": pixels}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    teacher = load_teacher(Teacher(source=str(tmp_path), normalization="own"), STUDENT)
    with torch.no_grad():
        expected = model.forward_features(normalized(levels(), pixels["mean"], pixels["std"]))
    torch.testing.assert_close(teacher(levels())[0], expected, rtol=1e-4, atol=1e-4)
    assert teacher.config.heads == 6 and teacher.config.norm_epsilon == 1e-5
    with pytest.raises(InputError, match="heads is given as 2"):
        load_teacher(Teacher(source=str(tmp_path), heads=2), STUDENT)


def test_open_clips_options_are_those_of_its_folder(tmp_path):
    from open_clip.model import CLIP

    torch.manual_seed(0)
    _, config = open_clip_model()
    config["vision_cfg"] |= {
        "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3},
    }  # fmt: skip
    model = CLIP(**config).eval()
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    content = {"model_cfg": config, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    # an export of ours says how it was trained too
    (tmp_path / "recipe.json").write_text("{}")
    teacher = load_teacher(Teacher(source=str(tmp_path), normalization="own"), STUDENT)
    with torch.no_grad():
        expected = model.visual(normalized(levels(), pixels["mean"], pixels["std"]))
    torch.testing.assert_close(teacher(levels())[0][:, 0], expected, rtol=0, atol=3e-5)
    assert teacher.config.activation == "gelu_tanh" and teacher.config.norm_epsilon == 1e-3
    for option in ({"attentional_pool": True}, {"timm_model_name": "resnet18"}):
        odd = config | {"vision_cfg": config["vision_cfg"] | option}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": odd}))
        with pytest.raises(InputError, match="none of CLIP's plain vision transformers"):
            read_encoder(tmp_path)


def test_open_clips_folders_whose_tower_pools_a_mean_can_teach(tmp_path):
    from open_clip.model import CLIP

    torch.manual_seed(0)
    _, config = open_clip_model()
    config["vision_cfg"] |= {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True,
                             "ls_init_value": 0.5}  # fmt: skip
    model = CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = read_encoder(tmp_path).build().eval()
    with torch.no_grad():
        pixels = normalized(levels(), CLIP_MEAN, CLIP_STD)
        expected = model.visual(pixels)
        pooled = tower.projection(tower.forward_pooled(pixels))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=3e-5)
    load_teacher(Teacher(source=str(tmp_path)), STUDENT)


def test_what_a_teacher_is_and_what_it_is_shown_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "frugal"):
        openai_teacher(tmp_path)
    said = caplog.text
    assert "heads 2, activation quick_gelu, epsilon 1e-05, pooled by class, mean 0.4815" in said
    assert "the usual one for such a file, which does not say it" in said
    assert "is shown images of the student's mean [0.485, 0.456, 0.406]" in said
    assert "--objective.teacher.normalization own shows them as it was trained" in said
    caplog.clear()
    with caplog.at_level(logging.INFO, "frugal"):
        openai_teacher(tmp_path, normalization="own")
    assert "is shown images" not in caplog.text


# ------------------------------------------------------------------------------------------------
# What is no teacher


class Harmful:
    """Would run when unpickled without care."""

    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "args": Harmful()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    for name in ("bad.pth", "plain.pt"):
        with pytest.raises(InputError, match="cannot be read as a PyTorch file of tensors"):
            read_encoder(name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "not an image encoder of a known kind"),
        ({"epoch": 3}, "holds no state_dict"),
        ([1, 2], "holds no state_dict"),
        ({n: t for n, t in STATE.items() if n != "visual.positional_embedding"}, "pos_embed"),
        ({n: t for n, t in STATE.items() if "resblocks.0.mlp" not in n}, "fc1.weight"),
        ({n: t for n, t in STATE.items() if n != "visual.ln_post.bias"}, "has no norm.bias"),
        (STATE | {"visual.positional_embedding": torch.zeros(16, 128)}, "16 rows"),
        (STATE | {"visual.proj": torch.zeros(64, 64)}, "does not hold one whole tower"),
    ],
)
def test_a_file_that_is_no_teacher_is_refused_in_words(content, sentence, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(InputError, match=sentence):
        load_teacher(Teacher(source=str(tmp_path / "file.pt")), STUDENT)


def test_a_teacher_whose_heads_know_no_patches_is_refused(tmp_path):
    recipe = demo()
    model = replace(recipe.model, head_width=40)
    run = write_run_of(tmp_path / "run", replace(recipe, model=model))
    with pytest.raises(InputError, match=r"has heads of two layers \(model\.head_width\)"):
        load_teacher(Teacher(source=str(run)), STUDENT)


def test_a_teacher_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"objective\.teacher\.source is not given"):
        load_teacher(Teacher(), STUDENT)
    with pytest.raises(InputError, match=r"the teacher ViT-B-16\.pt is not there"):
        load_teacher(Teacher(source="ViT-B-16.pt"), STUDENT)
    with pytest.raises(InputError, match="there is no file or folder"):
        load_teacher(Teacher(source=str(tmp_path / "nowhere.pt")), STUDENT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        load_teacher(Teacher(source=str(tmp_path / "empty")), STUDENT)


def test_a_name_on_the_hub_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be fetched from the Hugging Face hub"):
        read_encoder("frugal-nobody/no-such-clip")
