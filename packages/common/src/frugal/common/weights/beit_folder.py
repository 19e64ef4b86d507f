"""A folder that transformers loads as a ``BeitModel``, a ``BeitBackbone`` or a BEiT classifier.

BEiT without relative positions is a plain vision transformer with two differences: its last norm
may act on the mean of the patches, as it does in fine-tuned masked autoencoders, and keys have no
bias. One would change nothing: it adds the same number to all scores of a query.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import State, to_vit_mae
from frugal.common.weights.transformers_folder import image_processor
from frugal.common.weights.vit_folder import (
    labels,
    plain_state,
    transformer_settings,
    unsupported_tower,
)
from frugal.common.weights.written import UnsupportedOption


def usage(tower: ImageTower) -> str:
    """How to load FOLDER, in Markdown."""
    return f"""\
```python
from transformers import AutoImageProcessor, AutoModel, BeitBackbone

model = AutoModel.from_pretrained("FOLDER")
backbone = BeitBackbone.from_pretrained("FOLDER", out_indices=[{tower.depth}])  # outputs of blocks
processor = AutoImageProcessor.from_pretrained("FOLDER")
tokens = model(**processor(images, return_tensors="pt")).last_hidden_state
```
"""


def unsupported(encoder: ImageEncoder) -> UnsupportedOption | None:
    """The first option that ``BeitModel`` or ``BeitForImageClassification`` cannot express."""
    found = unsupported_blocks(encoder.tower)
    if found is not None:
        return found
    tower = encoder.tower
    if not encoder.has_norm:
        return UnsupportedOption("model.image.norm", "BeitModel has a norm behind its last block")
    of_mean = tower.pooling == "mean" and tower.norm_after_pooling
    if tower.norm_after_pooling and not of_mean:
        return UnsupportedOption(
            f"model.image.pooling={tower.pooling}",
            "a norm behind the pooling of BeitModel acts on the mean of the patches",
        )
    if encoder.head is not None and not of_mean and tower.pooling != "class":
        return UnsupportedOption(
            f"model.image.pooling={tower.pooling}",
            "BeitForImageClassification reads the class token or the norm of the patches' mean",
        )
    return None


def unsupported_blocks(tower: ImageTower) -> UnsupportedOption | None:
    """The first option of what comes before the last norm that BEiT cannot express."""
    if tower.grid[0] != tower.grid[1]:
        return UnsupportedOption(
            f"model.image.image_size={tower.image_size}",
            "a BEiT with one position for every patch takes square images",
        )
    return unsupported_tower(tower)


def write(encoder: ImageEncoder, folder: Path) -> None:
    """Weights, configuration and image processor."""
    from transformers import BeitConfig, BeitForImageClassification, BeitModel

    tower, state = encoder.tower, block_state(encoder)
    settings = beit_settings(tower, use_mean_pooling=tower.norm_after_pooling)
    if tower.norm_after_pooling:
        for leaf in ("weight", "bias"):
            state[f"pooler.layernorm.{leaf}"] = state.pop(f"layernorm.{leaf}")
    if encoder.head is None:
        model: Any = BeitModel(BeitConfig(**settings))
    else:
        weight, bias = encoder.head
        state = {f"beit.{name}": tensor for name, tensor in state.items()}
        state |= {"classifier.weight": weight, "classifier.bias": bias}
        settings |= labels(len(bias))
        model = BeitForImageClassification(BeitConfig(**settings))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    image_processor(encoder.transform, tower).save_pretrained(folder)


def block_state(encoder: ImageEncoder) -> State:
    """The tower by the names of ``BeitModel``'s modules, its last norm called ``layernorm``."""
    state = to_vit_mae(plain_state(encoder), encoder.tower)
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


def beit_settings(tower: ImageTower, **more: Any) -> dict[str, Any]:
    """The fields of a ``BeitConfig`` that say what the tower is like up to its last block."""
    return transformer_settings(tower) | {
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
        **more,
    }
