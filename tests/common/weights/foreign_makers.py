"""Small untrained models of other libraries, as those libraries make and save them."""

from __future__ import annotations

import copy
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def shaken(model: nn.Module) -> nn.Module:
    """Fresh weights with norms that are not 1 and biases that are not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def openai_model(*, resnet: bool) -> nn.Module:
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
    if resnet:
        vision = {"layers": (1, 1, 1, 1), "width": 64, "image_size": 64}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT | {"width": 64, "heads": 1}}
    model = shaken(open_clip.CLIP(**config, quick_gelu=True))
    return model.half().float()  # published in half precision


class Archived(nn.Module):
    """What OpenAI traced: the parts of a model with the numbers that describe it as buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, part in copy.deepcopy(model).named_children():
            setattr(self, name, part)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, nn.Parameter(getattr(model, name).detach().clone()))
        for name, value in (("input_resolution", 32), ("context_length", 12)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


def save_with(folder: Path, model: nn.Module, bert: Path, processor) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert, model_max_length=16).save_pretrained(folder)
    processor.save_pretrained(folder)


SMALL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
TEXTS = {**SMALL, "vocab_size": 90, "max_position_embeddings": 16, "bos_token_id": 2,
         "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip


def transformers_model(kind: str) -> nn.Module:
    import transformers as t

    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=TEXTS, vision_config=vision, projection_dim=12))
    if kind == "siglip":
        return t.SiglipModel(t.SiglipConfig(text_config=TEXTS, vision_config=vision))
    config = t.VisionTextDualEncoderConfig.from_vision_text_configs(
        t.ViTConfig(**vision), t.BertConfig(**TEXTS), projection_dim=12
    )
    return t.VisionTextDualEncoderModel(config)


def image_processor(kind: str):
    import transformers as t

    if kind == "clip":
        return t.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32)
    size = {"height": 32, "width": 32}
    half = [0.5, 0.5, 0.5]
    return t.ViTImageProcessor(size=size, resample=2, image_mean=half, image_std=half)
