"""A folder that transformers loads as a ``BeitModel``, a ``BeitBackbone`` or a BEiT classifier.

BEiT without relative positions is a plain vision transformer with two differences: its last norm
may act on the mean of the patches, as it does in fine-tuned masked autoencoders, and keys have no
bias. One would change nothing: it adds the same number to all scores of a query.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugal.common.models.vit import ImageTower
from frugal.common.models.weight_names import State, to_vit_mae
from frugal.common.weights.trained import Misfit, TrainedTower
from frugal.common.weights.transformers_folder import image_processor
from frugal.common.weights.vit_folder import (
    labels,
    misfit_of_tower,
    plain_state,
    transformer_settings,
)


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


def misfit(trained: TrainedTower) -> Misfit | None:
    """The first option that ``BeitModel`` or ``BeitForImageClassification`` cannot express."""
    found = misfit_of_blocks(trained.tower)
    if found is not None:
        return found
    tower = trained.tower
    if not trained.has_norm:
        return Misfit("model.image.norm", "BeitModel has a norm behind its last block")
    of_mean = tower.pooling == "mean" and tower.norm_after_pooling
    if tower.norm_after_pooling and not of_mean:
        return Misfit(
            f"model.image.pooling={tower.pooling}",
            "a norm behind the pooling of BeitModel acts on the mean of the patches",
        )
    if trained.head is not None and not of_mean and tower.pooling != "class":
        return Misfit(
            f"model.image.pooling={tower.pooling}",
            "BeitForImageClassification reads the class token or the norm of the patches' mean",
        )
    return None


def misfit_of_blocks(tower: ImageTower) -> Misfit | None:
    """The first option of what comes before the last norm that BEiT cannot express."""
    if tower.grid[0] != tower.grid[1]:
        return Misfit(
            f"model.image.image_size={tower.image_size}",
            "a BEiT with one position for every patch takes square images",
        )
    return misfit_of_tower(tower)


def write(trained: TrainedTower, folder: Path) -> None:
    """Weights, configuration and image processor."""
    from transformers import BeitConfig, BeitForImageClassification, BeitModel

    tower, state = trained.tower, block_state(trained)
    settings = beit_settings(tower, use_mean_pooling=tower.norm_after_pooling)
    if tower.norm_after_pooling:
        for leaf in ("weight", "bias"):
            state[f"pooler.layernorm.{leaf}"] = state.pop(f"layernorm.{leaf}")
    if trained.head is None:
        model: Any = BeitModel(BeitConfig(**settings))
    else:
        weight, bias = trained.head
        state = {f"beit.{name}": tensor for name, tensor in state.items()}
        state |= {"classifier.weight": weight, "classifier.bias": bias}
        settings |= labels(len(bias))
        model = BeitForImageClassification(BeitConfig(**settings))
    model.load_state_dict(state)
    model.save_pretrained(folder)
    image_processor(trained, tower).save_pretrained(folder)


def block_state(trained: TrainedTower) -> State:
    """The tower by the names of ``BeitModel``'s modules, its last norm called ``layernorm``."""
    state = to_vit_mae(plain_state(trained), trained.tower)
    return {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}


def beit_settings(tower: ImageTower, **more: Any) -> dict[str, Any]:
    """The fields of a ``BeitConfig`` that say what the tower is like up to its last block."""
    return transformer_settings(tower) | {
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
        **more,
    }
