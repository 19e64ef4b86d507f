"""Folders of transformers: ``CLIPModel``, ``SiglipModel``, ``VisionTextDualEncoderModel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.data.tokenizers import HuggingFace, Tokenizer
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, reason_of
from frugal.common.models.blocks import Activation
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.from_transformers import load_model
from frugal.common.models.in_words import some
from frugal.common.models.preprocess import Preparation, of_transformers, transformers_file
from frugal.common.models.pretrained_models import text_positions
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import from_transformers_clip
from frugal.common.weights.files import check_whole, weights_in
from frugal.common.weights.libraries import Foreign, fill, refuse_unknown_ids
from frugal.common.weights.transformers_folder import ACTIVATIONS
from frugal.common.weights.wrapped import (
    Wrapped,
    WrappedImage,
    WrappedModel,
    WrappedText,
    as_tensor,
)

LIBRARY = "transformers"
_KINDS = ("clip", "siglip", "vision-text-dual-encoder")
_OURS: dict[str, Activation] = {theirs: ours for ours, theirs in ACTIVATIONS.items()}  # type: ignore[misc]
_HIGHEST = 2
"""As the end-of-text token of a CLIP configuration: the highest id of the caption."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_MANY_TOKENS = 512
"""No text tower of these takes more."""


def load(folder: Path) -> Foreign:
    """The model of a folder that ``AutoModel.from_pretrained`` takes; no code in it is ever run.

    Raises:
        InputError: if it is another kind of model, incomplete or damaged.
    """
    theirs = _model(folder)
    config = theirs.config
    tokenizer = HuggingFace(name=str(folder))
    loaded = tokenizer.load()
    image, prepared = _image(config, folder)
    text = WrappedText(length=_length(config, folder))
    refuse_unknown_ids(loaded, config.text_config.vocab_size, source=folder)
    ours = _towers(config, image, loaded) if config.model_type == "clip" else None
    if ours is not None:
        state = from_transformers_clip(theirs.state_dict(), ours)
        model: Any = fill(ours, state, source=str(folder))
        return _foreign(model, ours, tokenizer, prepared)
    _refuse_unpooled(theirs, folder, image)
    wrapped = WrappedModel(library=LIBRARY, image=image, text=text)
    sees_padding = config.model_type == "siglip"
    model = Wrapped(
        theirs,
        wrapped,
        image=lambda model, images: model.get_image_features(pixel_values=images),
        text=_text_with_padding if sees_padding else _text_masked,
    ).eval()
    return _foreign(model, wrapped, tokenizer, prepared)


def _foreign(
    model: Any,
    config: DualEncoderConfig | WrappedModel,
    tokenizer: HuggingFace,
    prepared: Preparation,
) -> Foreign:
    return Foreign(
        model=model,
        config=config,
        tokenizer=tokenizer,
        crop=prepared.crop,
        told_by=prepared.told_by,
        library=LIBRARY,
    )


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
        reason = reason_of(error, last_line=True)
        raise InputError(
            f"{folder} is no folder of a model that transformers has ({reason}); models that bring "
            "their own code are not run"
        ) from None
    if config.model_type not in _KINDS:
        raise InputError(
            f"{folder} holds a {config.model_type!r} of transformers; {', '.join(_KINDS)} can be "
            "measured, and clip_vision_model, vit and vit_mae by linear-probe"
        )
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


def _towers(config: Any, image: WrappedImage, tokenizer: Tokenizer) -> DualEncoderConfig | None:
    """The towers of a ``CLIPModel`` as ours; None where it pools or computes otherwise."""
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act not in _OURS or text.hidden_act not in _OURS:
        return None
    end = tokenizer.end_id
    if end is None or end in tokenizer.prefix:
        return None
    # in the oldest configurations 2 stands for "the first of the highest id", padding included,
    # whatever the end of a caption is
    highest = end == tokenizer.vocab_size - 1 and tokenizer.pad_id <= end
    if not (highest if text.eos_token_id == _HIGHEST else text.eos_token_id == end):
        return None
    return DualEncoderConfig(
        image=ImageTower(
            **_transformer(vision),
            patch_size=vision.patch_size,
            image_size=image.height_width,
            mean=image.mean,  # type: ignore[arg-type]
            std=image.std,  # type: ignore[arg-type]
            patch_bias=False,
            pre_norm=True,
        ),
        text=TextTower(
            **_transformer(text),
            vocabulary=text.vocab_size,
            length=text.max_position_embeddings,
            pad_id=min(tokenizer.pad_id, text.vocab_size - 1),
        ),
        embed_dim=config.projection_dim,
    )


def _transformer(part: Any) -> dict[str, Any]:
    return {
        "width": part.hidden_size,
        "depth": part.num_hidden_layers,
        "heads": part.num_attention_heads,
        "mlp_width": part.intermediate_size,
        "activation": _OURS[part.hidden_act],
        "norm_epsilon": part.layer_norm_eps,
    }
