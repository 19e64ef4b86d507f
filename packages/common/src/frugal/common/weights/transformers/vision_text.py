"""Dual encoders of transformers of every kind, called as ours are, and ours as its own mixed ones.

What is written is a folder that ``VisionTextDualEncoderModel.from_pretrained`` loads.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frugal.common.data.tokenizers import HuggingFace
from frugal.common.errors import InputError
from frugal.common.files import read_json_object
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.from_transformers import load_model, no_model_of_transformers
from frugal.common.models.in_words import some
from frugal.common.models.preprocess import Preparation, of_transformers, transformers_file
from frugal.common.models.pretrained import TimmImage, TransformersImage, TransformersText
from frugal.common.models.pretrained_models import text_positions
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import (
    TRANSFORMERS_CLIP,
    Rule,
    State,
    from_transformers_clip,
    pairs,
    with_fixed_table,
    write_names,
)
from frugal.common.quiet_transformers import quietly
from frugal.common.weights.files import check_whole, weights_in
from frugal.common.weights.folding import fold_layer_scales, fold_patch_bias_of_tower
from frugal.common.weights.library import (
    Target,
    UnsupportedOption,
    fill,
    refuse_unknown_ids,
    two_tower_bundle,
)
from frugal.common.weights.transformers import clip
from frugal.common.weights.transformers.config_files import (
    ACTIVATIONS,
    NAME,
    WEIGHT_FILES,
    block_settings,
    embedded,
    image_processor,
    nearest_crop,
)
from frugal.common.weights.transformers.tokenizer import as_transformers, save, with_differences
from frugal.common.weights.wrapped import (
    Wrapped,
    WrappedImage,
    WrappedModel,
    WrappedText,
    as_tensor,
)
from frugal.common.weights.written import (
    TwoTowers,
    embedding_difference,
    unsupported_projector,
)

_MANY_TOKENS = 512
"""No text tower of these takes more."""
_USAGE = """\
```python
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
images = AutoImageProcessor.from_pretrained("FOLDER")
texts = AutoTokenizer.from_pretrained("FOLDER")
```

`model(**images(pictures, return_tensors="pt"), **texts(captions, padding=True, truncation=True,
return_tensors="pt"))` gives `image_embeds`, `text_embeds` and the logits.
"""
_BLOCK = "encoder.layer.{i}."
_DINOV2 = (
    Rule("patch_embed.weight", "embeddings.patch_embeddings.projection.weight", "kernel"),
    Rule("patch_embed.bias", "embeddings.patch_embeddings.projection.bias"),
    Rule("cls_token", "embeddings.cls_token"),
    Rule("pos_embed", "embeddings.position_embeddings"),
    *pairs("", "", {"norm": "layernorm"}),
    *(
        Rule(
            f"blocks.{{i}}.attn.qkv.{leaf}",
            (
                f"{_BLOCK}attention.attention.query.{leaf}",
                f"{_BLOCK}attention.attention.key.{leaf}",
                f"{_BLOCK}attention.attention.value.{leaf}",
            ),
        )
        for leaf in ("weight", "bias")
    ),
    *pairs("blocks.{i}.", _BLOCK, {"attn.proj": "attention.output.dense"}),
    *pairs("blocks.{i}.", _BLOCK, {n: n for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}),
    *(Rule(f"blocks.{{i}}.ls{n}.gamma", f"{_BLOCK}layer_scale{n}.lambda1") for n in (1, 2)),
)
"""By the names of checkpoints, which every version of transformers reads."""


# ------------------------------------------------------------------------------------------------
# Reading


def load(folder: Path) -> ModelBundle:
    """A dual encoder that ``AutoModel.from_pretrained`` takes; no code in it is ever run.

    Raises:
        InputError: if it is another kind of model, incomplete or damaged.
    """
    model = _model(folder)
    config = model.config
    tokenizer = HuggingFace(name=str(folder))
    loaded = tokenizer.load()
    image, prepared = _image(config, folder)
    text = WrappedText(length=_length(config, folder))
    refuse_unknown_ids(loaded, config.text_config.vocab_size, source=folder)
    is_clip = config.model_type == "clip"
    towers = clip.towers_of(config, prepared, loaded, folder) if is_clip else None
    if towers is not None:
        state = from_transformers_clip(model.state_dict(), towers)
        if text.length < towers.text.length:  # as the tokenizer cuts captions
            towers = replace(towers, text=replace(towers.text, length=text.length))
            state["text.pos_embed"] = state["text.pos_embed"][:, : text.length]
        filled = fill(towers, state, source=str(folder))
        return two_tower_bundle(filled, towers, tokenizer, prepared, path=folder, library=NAME)
    _refuse_unpooled(model, folder, image)
    wrapped = WrappedModel(library=NAME, image=image, text=text)
    reads_padding = config.model_type == "siglip"
    whole = Wrapped(
        model,
        wrapped,
        image=lambda model, images: model.get_image_features(pixel_values=images),
        text=_text_with_padding if reads_padding else _text_masked,
    ).eval()
    return two_tower_bundle(whole, wrapped, tokenizer, prepared, path=folder, library=NAME)


def _text_with_padding(model: Any, token_ids: Tensor, lengths: Tensor) -> Any:
    """SigLIP was trained on captions that fill every slot, padding and all."""
    del lengths
    return model.get_text_features(input_ids=token_ids)


def _text_masked(model: Any, token_ids: Tensor, lengths: Tensor) -> Any:
    longest = int(lengths.max())
    places = torch.arange(longest, device=token_ids.device)
    mask = (places < lengths[:, None]).long()  # (B, T)
    return model.get_text_features(input_ids=token_ids[:, :longest], attention_mask=mask)


def _model(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises of all kinds
        raise no_model_of_transformers(folder, error) from None
    check_whole(weights_in(folder, WEIGHT_FILES))
    model, missing = load_model(folder, config=config, way_out="copy them again")
    if missing:
        raise InputError(
            f"the weights of {folder} are not of the model its config.json describes: they lack "
            f"{some(missing)}"
        )
    return model.eval()


def _image(config: Any, folder: Path) -> tuple[WrappedImage, Preparation]:
    """What the image tower takes, and how transformers prepares an image for it."""
    vision = config.vision_config
    size = getattr(vision, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else tuple(size or (0, 0))
    file = transformers_file(folder, model_type=vision.model_type)
    if not file.is_there:
        raise InputError(
            f"{folder} does not say how images are prepared; add the preprocessor_config.json or "
            "processor_config.json that belongs to the model"
        )
    prepared = of_transformers(file, model_type=vision.model_type, size=(height, width))
    pixels = prepared.pixels
    image = WrappedImage(height_width=(height, width), mean=pixels.mean, std=pixels.std)
    return image, prepared


@torch.no_grad()
def _refuse_unpooled(model: Any, folder: Path, image: WrappedImage) -> None:
    """Refuse a tower that makes no vector of what it sees, as transformers itself cannot use it.

    Raises:
        InputError: if there is nothing that its projection could take.
    """
    made = {
        "text": lambda: model.get_text_features(input_ids=torch.zeros(1, 1, dtype=torch.int64)),
        "vision": lambda: model.get_image_features(torch.zeros(1, 3, *image.height_width)),
    }
    for part, seen in (("text", "captions"), ("vision", "images")):
        try:
            vectors = as_tensor(made[part]())
        except (AttributeError, TypeError):
            vectors = None
        if vectors is None:
            kind = getattr(model.config, f"{part}_config").model_type
            raise InputError(
                f"the {part} model of {folder} ({kind}) pools nothing, so that transformers makes "
                f"no vectors of {seen} with it; give a model with a pooler"
            )


def _length(config: Any, folder: Path) -> int:
    """Slots of the text tower, as far as a caption may fill them and its tokenizer lets it."""
    text = config.text_config
    slots = text_positions(text) or _MANY_TOKENS
    about = folder / "tokenizer_config.json"
    longest = read_json_object(about).get("model_max_length") if about.is_file() else None
    return min(slots, _MANY_TOKENS, int(longest) if longest else _MANY_TOKENS)


# ------------------------------------------------------------------------------------------------
# Writing


def target(bundle: ModelBundle, towers: TwoTowers) -> Target | UnsupportedOption:
    """How a dual encoder is written as a ``VisionTextDualEncoderModel``."""
    return _unsupported(towers) or Target(
        usage=with_differences(_USAGE, towers.tokenizer),
        write=lambda folder: _write(towers, folder),
        difference=lambda folder: embedding_difference(bundle, embedded, folder),
        transform=nearest_crop(bundle.transform, bundle.image),
    )


def _unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that ``VisionTextDualEncoderModel`` cannot express."""
    image, text = towers.config.image, towers.config.text
    if isinstance(text, TextTower):
        if not isinstance(image, ImageTower):
            return UnsupportedOption(
                "model.text=TextTower",
                "beside another library's image tower it has only its own texts",
            )
        option = clip.unsupported_text(text) or clip.unsupported_tokenizer(towers)
        if option is not None:
            return option
    if towers.config.initial_logit_bias is not None:
        return UnsupportedOption("model.initial_logit_bias", "its logits have a scale and no bias")
    for part, tower in (("text", text), ("image", image)):
        if getattr(tower, "pooling", None) not in ("pooler", None) and tower.__class__ in (
            TransformersText,
            TransformersImage,
        ):
            return UnsupportedOption(
                f"model.{part}.pooling={tower.pooling}", "it reads the model's pooler"
            )
    return _unsupported_image(image) if isinstance(image, ImageTower) else None


def _unsupported_image(tower: ImageTower) -> UnsupportedOption | None:
    """The first option of one of our towers that ``Dinov2Model`` and ``CLIPVisionModel`` lack."""
    if (option := unsupported_projector(tower)) is not None:
        return option
    if tower.class_token == "none" or tower.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={tower.pooling}", "its image towers pool a class token"
        )
    if tower.grid[0] != tower.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={tower.image_size}", "it takes square images"
        )
    if not tower.pre_norm and tower.mlp_width % tower.width:
        return UnsupportedOption(
            f"model.image.mlp_width={tower.mlp_width}", "there it is a multiple of the width"
        )
    return None


def _write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration, image processor and tokenizer."""
    _assemble(towers).save_pretrained(folder)
    image_processor(towers.transform, towers.config.image).save_pretrained(folder)
    save(as_transformers(towers.tokenizer, length=towers.config.text.length), folder)


@torch.no_grad()
def _assemble(towers: TwoTowers) -> Any:
    """The transformers model with these weights."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    model, image = towers.model, towers.config.image
    vision: Any = model.image.model if not isinstance(image, ImageTower) else None
    if isinstance(image, TimmImage):
        vision = _wrapped_timm(image, model.image.model)
    elif vision is None:
        vision = _as_transformers_image(model.image.state_dict(), image)
    text = model.text.model if isinstance(towers.config.text, TransformersText) else _text(towers)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=towers.config.embed_dim
    )
    whole = VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text)
    whole.visual_projection.weight.copy_(model.image.projection.weight)
    whole.text_projection.weight.copy_(model.text.projection.weight)
    whole.logit_scale.copy_(model.logit_scale.squeeze())
    return whole.eval()


def _text(towers: TwoTowers) -> Any:
    """Our text tower as a ``CLIPTextModel``; its projection is left."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = clip.token_ids(towers.tokenizer)
    settings = clip.text_config(towers.config.text, towers.config.embed_dim, **ids)
    state = fold_layer_scales(towers.model.text.state_dict())
    named = {f"text.{n}": t for n, t in state.items() if not n.startswith("projection.")}
    stored = write_names(named, TRANSFORMERS_CLIP, target="CLIPTextModel")
    return _filled(CLIPTextModel, CLIPTextConfig(**settings), stored)


def _wrapped_timm(image: TimmImage, model: nn.Module) -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    about = image.about
    args = dict(about["model_args"])
    if hasattr(model, "patch_embed"):
        args["img_size"] = image.image_size
    settings: dict[str, Any] = {
        "architecture": about["architecture"].partition(".")[0],
        "model_args": args,
        "num_labels": 0,
        "hidden_size": image.pooled_width,
    }
    config = TimmWrapperConfig(**settings)
    wrapped = TimmWrapperModel(config)
    wrapped.timm_model.load_state_dict(model.state_dict())
    return wrapped


def _as_transformers_image(state: State, tower: ImageTower) -> Any:
    """One of our towers that pool a class token as a model of transformers.

    A norm before the blocks makes it a ``CLIPVisionModel``, else it is a ``Dinov2Model``, with
    layer scales of 1 where ours has none.
    """
    state = {n: t for n, t in state.items() if not n.startswith("projection.")}
    return _clip(state, tower) if tower.pre_norm else _dinov2(state, tower)


def _dinov2(state: State, tower: ImageTower) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        mlp_ratio=tower.mlp_width // tower.width,
        hidden_act=ACTIVATIONS[tower.activation],
        layer_norm_eps=tower.norm_epsilon,
        image_size=tower.height_width[0],
        patch_size=tower.patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_mask_token=False,
    )
    state = with_fixed_table(state, "pos_embed", tower)
    state.setdefault("patch_embed.bias", torch.zeros(tower.width))
    for number in range(tower.depth):
        for scale in ("ls1", "ls2"):
            state.setdefault(f"blocks.{number}.{scale}.gamma", torch.ones(tower.width))
    return _filled(Dinov2Model, config, write_names(state, _DINOV2, target="Dinov2Model"))


def _clip(state: State, tower: ImageTower) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state, tower = fold_patch_bias_of_tower(fold_layer_scales(state), tower)
    state = with_fixed_table(state, "pos_embed", replace(tower, layer_scale=None))
    config = CLIPVisionConfig(
        **block_settings(tower),
        image_size=tower.height_width[0],
        patch_size=tower.patch_size,
    )
    named = {f"image.{name}": tensor for name, tensor in state.items()}
    stored = write_names(named, TRANSFORMERS_CLIP, target="CLIPVisionModel")
    return _filled(CLIPVisionModel, config, stored)


def _filled(kind: Any, config: Any, state: State) -> Any:
    """A model of transformers with weights by the names of its checkpoints.

    Raises:
        InputError: if this version does not know all of them.
    """
    with quietly():
        model, report = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    if odd := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise InputError(
            f"this version of transformers has other weights in its {kind.__name__} ({odd[0]}); "
            "install another one"
        )
    return model
