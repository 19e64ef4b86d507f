"""transformers' ``CLIPModel`` and ``CLIPVisionModel`` as our towers, ours as a ``CLIPModel``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.preprocess import Pixels, Preparation
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import TRANSFORMERS_CLIP, read_names, to_transformers_clip
from frugal.common.weights.files import part_with, without_prefix
from frugal.common.weights.folding import fold_layer_scale, fold_patch_bias
from frugal.common.weights.library import Target, UnsupportedOption
from frugal.common.weights.transformers.config_files import (
    ACTIVATION_OF,
    block_settings,
    blocks_of,
    configured,
    embedded,
    height_width,
    image_processor,
    nearest_crop,
    patch_size,
    preparation_of,
    weights_of,
)
from frugal.common.weights.transformers.tokenizer import as_transformers, save, with_differences
from frugal.common.weights.written import (
    TwoTowers,
    embedding_difference,
    unsupported_projector,
)

_USAGE = """\
```python
from transformers import CLIPModel, CLIPProcessor

model = CLIPModel.from_pretrained("FOLDER")
processor = CLIPProcessor.from_pretrained("FOLDER")
```

Its crop lies one pixel beside that of the numbers below where the margin is an odd number of
pixels: transformers rounds half a pixel down.
"""
_ARGMAX = 2
"""An end-of-text id that CLIPModel takes for "the highest id", for its oldest configurations."""


# ------------------------------------------------------------------------------------------------
# Reading


def towers_of(
    config: Any, prepared: Preparation, tokenizer: Tokenizer, folder: Path
) -> DualEncoderConfig | None:
    """The towers of a ``CLIPModel`` as ours; None where it pools or computes otherwise."""
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act not in ACTIVATION_OF or text.hidden_act not in ACTIVATION_OF:
        return None
    end = tokenizer.end_id
    if end is None or end in tokenizer.prefix:
        return None
    # in the oldest configurations 2 stands for "the first of the highest id", padding included,
    # whatever the end of a caption is
    highest = end == tokenizer.vocab_size - 1 and tokenizer.pad_id <= end
    if not (highest if text.eos_token_id == _ARGMAX else text.eos_token_id == end):
        return None
    return DualEncoderConfig(
        image=_image_tower(vision, height_width(vision, folder), prepared.pixels, folder),
        text=TextTower(
            **blocks_of(text, folder),
            vocabulary=text.vocab_size,
            length=text.max_position_embeddings,
            pad_id=min(tokenizer.pad_id, text.vocab_size - 1),
        ),
        embed_dim=config.projection_dim,
    )


def load_image_tower(folder: Path, settings: Mapping[str, Any]) -> ImageEncoder:
    """The image tower of a ``CLIPModel`` or ``CLIPVisionModel``.

    Args:
        folder: that holds it.
        settings: its config.json.

    Raises:
        InputError: if it is incomplete or damaged, or ours cannot be such a tower.
    """
    from transformers import CLIPConfig, CLIPVisionConfig

    # a whole CLIP's may say it twice, in vision_config_dict too
    is_whole = not {"vision_config", "vision_config_dict"}.isdisjoint(settings)
    made = configured(CLIPConfig if is_whole else CLIPVisionConfig, settings, folder)
    vision: Any = made.vision_config if is_whole else made
    size = height_width(vision, folder)
    prepared = preparation_of(folder, "clip", size)
    tower = _image_tower(vision, size[0] if size[0] == size[1] else size, prepared.pixels, folder)
    state = weights_of(folder)
    state = part_with(state, "vision_model.embeddings.class_embedding", source=folder)
    if "embeddings.class_embedding" in state:  # CLIPVisionModel, as transformers 5 saves it
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    kept = ("vision_model.", "visual_projection.")
    visual = {
        name: tensor.float()
        for name, tensor in state.items()
        if name.startswith(kept) and not name.endswith("position_ids")
    }
    named = without_prefix(read_names(visual, TRANSFORMERS_CLIP, source=str(folder)), "image.")
    guessed = ("mean", "std") if prepared.is_default else ()
    return ImageEncoder(tower, named, str(folder), preparation=prepared, guessed=guessed)


def _image_tower(
    vision: Any, image_size: int | tuple[int, int], pixels: Pixels, folder: Path
) -> ImageTower:
    return ImageTower(
        **blocks_of(vision, folder),
        patch_size=patch_size(vision, folder),
        image_size=image_size,
        mean=pixels.mean,
        std=pixels.std,
        patch_bias=False,
        pre_norm=True,
    )


# ------------------------------------------------------------------------------------------------
# Writing


def target(bundle: ModelBundle, towers: TwoTowers) -> Target | UnsupportedOption:
    """How a dual encoder is written as a ``CLIPModel``."""
    return _unsupported(towers) or Target(
        usage=with_differences(_USAGE, towers.tokenizer),
        write=lambda folder: write(towers, folder),
        difference=lambda folder: embedding_difference(bundle, embedded, folder),
        transform=nearest_crop(bundle.transform, bundle.image),
    )


def _unsupported(towers: TwoTowers) -> UnsupportedOption | None:
    """The first option that ``CLIPModel`` cannot express."""
    config, image, text = towers.config, towers.config.image, towers.config.text
    if (option := unsupported_projector(image)) is not None:
        return option
    if image.class_token == "none":
        return UnsupportedOption("model.image.class_token=none", "CLIPModel always has one")
    if image.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={image.pooling}", "CLIPModel pools the class token"
        )
    if not image.pre_norm:
        return UnsupportedOption(
            "model.image.pre_norm=False", "CLIPModel has a norm before the blocks"
        )
    if image.grid[0] != image.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={image.image_size}", "CLIPModel takes square images"
        )
    if (option := unsupported_text(text)) is not None:
        return option
    if config.initial_logit_bias is not None:
        return UnsupportedOption(
            "model.initial_logit_bias", "CLIPModel's logits have a scale and no bias"
        )
    return unsupported_tokenizer(towers)


def unsupported_text(text: TextTower) -> UnsupportedOption | None:
    """The first option of a text tower that ``CLIPTextModel`` cannot express."""
    if not text.causal:
        return UnsupportedOption("model.text.causal=False", "CLIPModel's text tower is causal")
    if text.pooling != "end_of_text":
        return UnsupportedOption(
            f"model.text.pooling={text.pooling}", "CLIPModel pools the end-of-text token"
        )
    return None


def unsupported_tokenizer(towers: TwoTowers) -> UnsupportedOption | None:
    """Captions whose end ``CLIPTextModel`` cannot find."""
    if not towers.captions_end or towers.tokenizer.end_id == _ARGMAX:
        return UnsupportedOption(
            "data.tokenizer",
            "CLIPModel needs a token that ends every caption, stands nowhere else and has not the "
            f"number {_ARGMAX}; here it is {towers.tokenizer.end_id}",
        )
    return None


def _model_config(config: DualEncoderConfig, **token_ids: Any) -> Any:
    """The ``CLIPConfig`` for towers that it has no unsupported option of.

    Args:
        config: without a bias of the patch projection and layer scales.
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.
    """
    from transformers import CLIPConfig

    image, text = config.image, config.text
    return CLIPConfig(
        vision_config={
            **block_settings(image),
            "projection_dim": config.embed_dim,
            "image_size": image.height_width[0],
            "patch_size": image.patch_size,
        },
        text_config=text_config(text, config.embed_dim, **token_ids),
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.initial_logit_scale,
        architectures=["CLIPModel"],
    )


def text_config(text: TextTower, embed_dim: int, **token_ids: Any) -> dict[str, Any]:
    """The fields of a ``CLIPTextConfig``."""
    return {
        **block_settings(text),
        "projection_dim": embed_dim,
        "vocab_size": text.vocabulary,
        "max_position_embeddings": text.length,
        **token_ids,
    }


def write(towers: TwoTowers, folder: Path) -> None:
    """Weights, configuration, and a processor with its tokenizer."""
    from transformers import CLIPProcessor

    state, config = fold_patch_bias(towers.model.state_dict(), towers.config)
    state, config = fold_layer_scale(state, config)
    save_file(
        to_transformers_clip(state, config), folder / "model.safetensors", metadata={"format": "pt"}
    )
    tokenizer = as_transformers(towers.tokenizer, length=config.text.length)
    _model_config(config, **token_ids(towers.tokenizer)).save_pretrained(folder)
    pixels = image_processor(towers.transform, config.image)
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    save(tokenizer, folder)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a ``CLIPTextConfig`` says of a tokenizer."""
    ids = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    return ids | ({"bos_token_id": tokenizer.prefix[0]} if tokenizer.prefix else {})
