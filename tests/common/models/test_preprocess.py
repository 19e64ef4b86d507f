"""How images are prepared for models of other libraries: as those libraries do it themselves."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm.data
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from frugal.common.errors import InputError
from frugal.common.models.named import image_tower
from frugal.common.models.preprocess import (
    Preparation,
    describe,
    of_open_clip,
    of_timm,
    of_transformers,
    pixels_of_transformers,
    timm_settings,
    transformers_file,
)
from frugal.common.models.pretrained import TimmImage, TransformersImage
from frugal.common.models.vit import CLIP_MEAN, IMAGENET_MEAN

SHAPES = [(61, 47), (40, 91), (7, 100), (33, 33), (130, 77), (1, 1)]


def pictures() -> list[Image.Image]:
    """Smooth ones of odd sizes, one of them gray."""
    made = []
    for height, width in SHAPES:
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / 7 + 1) * np.cos(y / 5), np.sin(x / 4), np.cos(y / 6)]
        levels = np.stack([(wave + 1) * 127 for wave in waves], axis=-1).astype(np.uint8)
        made.append(Image.fromarray(levels))
    return [*made, made[0].convert("L").convert("RGB")]


def prepared(preparation: Preparation, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """(3, height, width) numbers that a tower sees."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    levels = preparation.crop.gray_levels(buffer.getvalue(), size=size) / 255
    mean, std = (np.array(v)[:, None, None] for v in vars(preparation.pixels).values())
    return (levels - mean) / std


def assert_alike(
    preparation: Preparation, theirs, size: tuple[int, int], *, levels: float = 2.01
) -> None:
    """Within so many gray levels of what a library makes."""
    step = levels / 255 / min(preparation.pixels.std)
    for image in pictures():
        difference = np.abs(prepared(preparation, image, size) - theirs(image)).max()
        assert difference <= step, (image.size, difference * 255 * min(preparation.pixels.std))


def write(folder: Path, content: object, name: str = "preprocessor_config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def of_folder(folder: Path, size=(32, 32), model_type="vit") -> Preparation:
    file = transformers_file(folder, model_type=model_type)
    return of_transformers(file, model_type=model_type, size=size)


CLIP = {"image_processor_type": "CLIPImageProcessor"}
VIT = {"image_processor_type": "ViTImageProcessor"}
SQUARE = {"size": {"shortest_edge": 32}, "crop_size": 32}
STRETCHED = {"size": {"height": 32, "width": 32}}
OPTIONS = {
    "CLIP, a margin": {**CLIP, "size": {"shortest_edge": 37}, "crop_size": 32},
    "CLIP, sizes as numbers": {**CLIP, "size": 35, "crop_size": 32, "resample": 2},
    "CLIP, crop as an object": {**CLIP, **SQUARE, "crop_size": {"height": 32, "width": 32}},
    "CLIP, stretched": {**CLIP, **STRETCHED, "do_center_crop": False},
    "CLIP, stretched with a margin": {
        **CLIP, "size": {"height": 40, "width": 40}, "crop_size": [32, 32],
    },
    "an old name, an old form": {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32,
        "do_center_crop": True, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.2, 0.3, 0.25],
    },
    "a fast one": {"image_processor_type": "CLIPImageProcessorFast", **SQUARE},
    "ViT, a size as a number": {**VIT, "size": 32},
    "ViT, a size as a pair": {**VIT, "size": [32, 32], "resample": 3},
    "ViT that cuts": {**VIT, "size": {"shortest_edge": 40}, "crop_size": 32,
                      "do_center_crop": True},
    "not normalized": {**VIT, **STRETCHED, "do_normalize": False},
    "not rescaled": {**VIT, **STRETCHED, "do_rescale": False, "image_mean": 127.5,
                     "image_std": [60.0]},
    "neither": {**VIT, **STRETCHED, "do_rescale": False, "do_normalize": False},
    "another factor": {**VIT, **STRETCHED, "rescale_factor": 1 / 127.5, "image_mean": [1.0]},
    "a factor that was rounded": {**VIT, **STRETCHED, "rescale_factor": 0.0039},
    "a step that is null": {**VIT, **STRETCHED, "do_normalize": None},
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", **STRETCHED},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": [36, 36], "crop_size": 32},
    "BiT": {"image_processor_type": "BitImageProcessor", **SQUARE},
    "BEiT": {"image_processor_type": "BeitImageProcessor", **STRETCHED},
    **{f"kernel {n}": {**VIT, **STRETCHED, "resample": n} for n in (0, 1, 2, 3, 4, 5)},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_transformers_gives_its_numbers(options: dict, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", options)
    # torchvision has box and hamming for Pillow's images only
    backend = "pil" if options.get("resample") in (4, 5) else "torchvision"
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    assert_alike(
        of_folder(folder, model_type="clip"),
        lambda image: theirs(image, return_tensors="np").pixel_values[0],
        (32, 32),
    )


@pytest.mark.parametrize("kind", ["CLIP", "ViT", "Siglip", "DeiT", "Bit", "Beit", "ChineseCLIP"])
def test_what_a_file_leaves_out_is_what_transformers_puts_there(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"image_processor_type": f"{kind}ImageProcessor"})
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    assert_alike(
        of_folder(folder, (224, 224)),
        lambda image: theirs(image, return_tensors="np").pixel_values[0],
        (224, 224),
    )


REFUSED = {
    "do_resize=False": {"do_resize": False},
    "do_pad=true": {"do_pad": True},
    "offset=True": {"offset": True},
    "crop_pct=0.9": {"crop_pct": 0.9},
    "size={'shortest_edge': 32, 'longest_edge': 40}": {
        "size": {"shortest_edge": 32, "longest_edge": 40}
    },
    "size={'shortest_edge': 32} and no crop": {
        "size": {"shortest_edge": 32}, "do_center_crop": False,
    },
    "images of 48x48, the image tower takes 32x32": {"size": 48},
    "resample=9": {"resample": 9},
    "rescale_factor=0": {"rescale_factor": 0},
    "image_mean=None": {"image_mean": None},
    "image_mean=[0.5, 0.5]": {"image_mean": [0.5, 0.5]},
    "image_std=[0.0, 0.0, 0.0]": {"image_std": [0]},
    "do_normalize=1": {"do_normalize": 1},
    "size=big": {"size": "big"},
    "the processor ConvNextImageProcessor": {"image_processor_type": "ConvNextImageProcessor"},
    "resized to 24 and 32x32 cut out": {
        "size": {"shortest_edge": 24}, "crop_size": 32, "do_center_crop": True,
    },
    "resized to 40x64 and 32x32 cut out": {
        "size": [40, 64], "crop_size": 32, "do_center_crop": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(("words", "options"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_known_is_refused_by_its_name(words: str, options: dict, tmp_path) -> None:
    folder = write(tmp_path / "model", {**VIT, **STRETCHED, **options})
    with pytest.raises(InputError) as caught:
        of_folder(folder)
    assert words.replace("=False", "=false") in str(caught.value).replace("=False", "=false")


def test_the_newer_file_goes_first_as_in_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {**VIT, **STRETCHED, "image_mean": [0.1, 0.2, 0.3]})
    # an older processor_config.json has no section for images
    write(folder, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert of_folder(folder).pixels.mean == (0.1, 0.2, 0.3)
    nested = {"image_processor": {**VIT, **STRETCHED, "image_mean": [0.4, 0.5, 0.6]}}
    write(folder, nested, "processor_config.json")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    assert of_folder(folder).pixels.mean == tuple(theirs.image_mean) == (0.4, 0.5, 0.6)
    assert of_folder(folder).told_by == str(folder / "processor_config.json")
    (folder / "preprocessor_config.json").unlink()
    assert of_folder(folder).pixels.mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("model_type", "mean"),
    [("vit", (0.5, 0.5, 0.5)), ("vit_mae", IMAGENET_MEAN), ("clip_vision_model", CLIP_MEAN)],
)
def test_a_folder_without_a_file_has_what_is_usual_and_says_so(tmp_path, model_type, mean) -> None:
    found = of_folder(tmp_path, (48, 48), model_type)
    assert found.pixels.mean == mean and found.is_default
    assert model_type in found.told_by and "has no preprocessor_config.json" in found.told_by


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (41, 23)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "random"])
def test_every_option_of_open_clip_gives_its_numbers(size, mode, kernel) -> None:
    given = {"resize_mode": mode, "interpolation": kernel, "mean": [0.4, 0.5, 0.6], "std": 0.3}
    merged = merge_preprocess_dict(PreprocessCfg(), {**given, "size": size})
    theirs = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    found = of_open_clip(given, size=size, source="open_clip_config.json")
    assert_alike(found, lambda image: theirs(image).numpy(), size)


def test_what_open_clip_leaves_out_and_what_it_pads() -> None:
    found = of_open_clip({}, size=(32, 32), source="x.json")
    assert found.pixels.mean == CLIP_MEAN and found.is_default
    assert "open_clip's defaults, as x.json has no preprocess_cfg" in found.told_by
    for option, value in (("resize_mode", "longest"), ("interpolation", "area"), ("mode", "L")):
        with pytest.raises(InputError, match=f"x.json prepares images with {option}={value}"):
            of_open_clip({option: value}, size=(32, 32), source="x.json")


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (41, 23)])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("share", [0.875, 0.9, 0.77, 1.0, 0.56, None])
def test_every_option_of_timm_gives_its_numbers(size, mode, share) -> None:
    for kernel in ("bicubic", "bilinear", "lanczos", "hamming"):
        given = {"mean": [0.3], "std": [0.2, 0.3, 0.4], "interpolation": kernel,
                 "crop_pct": share, "crop_mode": mode, "input_size": [3, *size]}  # fmt: skip
        about = timm.data.resolve_data_config({}, pretrained_cfg=given)
        theirs = timm.data.create_transform(**about)
        found = of_timm(given, size=size, source="config.json")
        assert_alike(found, lambda image, theirs=theirs: theirs(image).numpy(), size)


def test_what_timm_leaves_out_and_what_it_pads() -> None:
    found = of_timm({}, size=(32, 32), source="x.json")
    assert found.pixels.mean == IMAGENET_MEAN and found.crop.share == 0.875 and found.is_default
    for option, value in (("crop_mode", "border"), ("interpolation", "random"), ("crop_pct", 1.2)):
        with pytest.raises(InputError, match=f"x.json prepares images with {option}={value}"):
            of_timm({option: value}, size=(32, 32), source="x.json")
    old = {"architecture": "vit_tiny_patch16_224", "mean": [0.1, 0.2, 0.3]}
    assert timm_settings(old)["mean"] == [0.1, 0.2, 0.3]
    assert timm_settings({"pretrained_cfg": old})["mean"] == [0.1, 0.2, 0.3]


VIT_MODEL = {
    "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def test_towers_of_other_libraries_normalize_as_their_files_say(tmp_path: Path, caplog) -> None:
    folder = write(tmp_path / "vit", VIT_MODEL, "config.json")
    with caplog.at_level(logging.WARNING, "frugal"):
        assert TransformersImage(name=str(folder), image_size=32).mean == (0.5, 0.5, 0.5)
    assert "does not say how images are prepared" in caplog.text
    nested = {"image_processor": {**VIT, "do_normalize": False, "rescale_factor": 1 / 127.5}}
    write(folder, nested, "processor_config.json")
    tower = TransformersImage(name=str(folder), image_size=32)
    np.testing.assert_allclose(tower.mean, 0.0)
    np.testing.assert_allclose(tower.std, 0.5)  # 255 becomes 2
    write(folder, {"image_processor": {"rescale_offset": True}}, "processor_config.json")
    with pytest.raises(InputError, match="rescale_offset=True, which is not known here"):
        TransformersImage(name=str(folder), image_size=32)
    old = {"architecture": "vit_tiny_patch16_224", "mean": [0.1, 0.2, 0.3], "std": [0.5]}
    tower = TimmImage(name=str(write(tmp_path / "timm", old, "config.json")), image_size=32)
    assert tower.mean == (0.1, 0.2, 0.3) and tower.std == (0.5, 0.5, 0.5)


def test_other_processors_still_say_what_gray_levels_become(tmp_path: Path) -> None:
    about = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.9}
    file = transformers_file(write(tmp_path / "model", about))
    assert pixels_of_transformers(file, model_type="convnext").mean == IMAGENET_MEAN


def test_one_line_says_what_weights_do_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {**CLIP, "size": {"shortest_edge": 40}, "crop_size": 32})
    found = of_folder(folder)
    line = describe(image_tower("S/16", image_size=32), found.crop, told_by=found.told_by)
    words = ["heads 6", "activation gelu", "epsilon 1e-06", "pooled by class", "0.485 0.456 0.406",
             "the shorter side resized to 40 (bicubic), the middle 32x32 pixels",
             str(folder / "preprocessor_config.json")]  # fmt: skip
    assert all(word in line for word in words), line
