"""A folder that ``VisionTextDualEncoderModel.from_pretrained`` loads, and ``AutoModel``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name everyone knows
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.models.pretrained import TimmImage, TransformersImage, TransformersText
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import (
    TRANSFORMERS_CLIP,
    Rule,
    State,
    pairs,
    with_fixed_table,
    write_names,
)
from frugal.common.quiet_transformers import quietly
from frugal.common.weights.folding import fold_layer_scales, fold_patch_bias_of_tower
from frugal.common.weights.transformers_folder import (
    ACTIVATIONS,
    image_processor,
    text_config,
    token_ids,
    unsupported_text,
    unsupported_tokenizer,
)
from frugal.common.weights.transformers_tokenizer import as_transformers, save
from frugal.common.weights.written import (
    Embedded,
    TwoTowers,
    UnsupportedOption,
    unsupported_projector,
)

USAGE = """\
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


def unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that ``VisionTextDualEncoderModel`` cannot express."""
    image, text = towers.config.image, towers.config.text
    if isinstance(text, TextTower):
        if not isinstance(image, ImageTower):
            return UnsupportedOption(
                "model.text=TextTower",
                "beside another library's image tower it has only its own texts",
            )
        if (found := unsupported_text(text) or unsupported_tokenizer(towers)) is not None:
            return found
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
    return unsupported_image(image) if isinstance(image, ImageTower) else None


def unsupported_image(tower: ImageTower) -> UnsupportedOption | None:
    """The first option of one of our towers that ``Dinov2Model`` and ``CLIPVisionModel`` lack."""
    if (found := unsupported_projector(tower)) is not None:
        return found
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


def write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration, image processor and tokenizer."""
    assemble(towers).save_pretrained(folder)
    image_processor(towers.transform, towers.config.image).save_pretrained(folder)
    save(as_transformers(towers.tokenizer, length=towers.config.text.length), folder)


@torch.no_grad()
def assemble(towers: TwoTowers) -> Any:
    """The transformers model with these weights."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    model, image = towers.model, towers.config.image
    vision: Any = model.image.model if not isinstance(image, ImageTower) else None
    if isinstance(image, TimmImage):
        vision = _wrapped_timm(image, model.image.model)
    elif vision is None:
        vision = as_transformers_image(model.image.state_dict(), image)
    text = model.text.model if isinstance(towers.config.text, TransformersText) else _text(towers)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=towers.config.embed_dim
    )
    theirs = VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text)
    theirs.visual_projection.weight.copy_(model.image.projection.weight)
    theirs.text_projection.weight.copy_(model.text.projection.weight)
    theirs.logit_scale.copy_(model.logit_scale.squeeze())
    return theirs.eval()


def _text(towers: TwoTowers) -> Any:
    """Our text tower as a ``CLIPTextModel``; its projection is left."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = text_config(
        towers.config.text, towers.config.embed_dim, **token_ids(towers.tokenizer)
    )
    state = fold_layer_scales(towers.model.text.state_dict())
    named = {f"text.{n}": t for n, t in state.items() if not n.startswith("projection.")}
    theirs = write_names(named, TRANSFORMERS_CLIP, target="CLIPTextModel")
    return _filled(CLIPTextModel, CLIPTextConfig(**settings), theirs)


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


def as_transformers_image(state: State, tower: ImageTower) -> Any:
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
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        intermediate_size=tower.mlp_width,
        hidden_act=ACTIVATIONS[tower.activation],
        layer_norm_eps=tower.norm_epsilon,
        image_size=tower.height_width[0],
        patch_size=tower.patch_size,
    )
    named = {f"image.{name}": tensor for name, tensor in state.items()}
    theirs = write_names(named, TRANSFORMERS_CLIP, target="CLIPVisionModel")
    return _filled(CLIPVisionModel, config, theirs)


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


def embed(folder: Path, pictures: Tensor, captions: list[str]) -> Embedded:
    """What transformers makes of (B, 3, H, W) uint8 pictures and of captions with this folder."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(
        list(pictures), return_tensors="pt", do_resize=False, do_center_crop=False
    ).pixel_values
    texts = AutoTokenizer.from_pretrained(folder)(
        captions, padding=True, truncation=True, return_tensors="pt"
    )
    made = model(pixel_values=pixels, **texts)
    return Embedded(
        F.normalize(made.image_embeds, dim=-1),
        F.normalize(made.text_embeds, dim=-1),
        model.logit_scale.reshape(1),
    )
