"""BERT as a text tower against recorded embeddings of the reference."""

import json

import torch
from cit_cases import case

from frugal.cit.published_dual import Heads, from_released
from frugal.common.models.pretrained import TransformersText
from frugal.common.models.pretrained_towers import TransformersTextModule

NEAR = {"rtol": 0, "atol": 1e-5}


@torch.inference_mode()
def test_pooled_and_projected_captions_are_the_recorded_ones() -> None:
    golden = case("text_tower")
    about, tensors = golden.about["bert"], golden.tensors
    config = {
        "model_type": "bert",
        "vocab_size": about["vocab"],
        "hidden_size": about["hidden"],
        "num_hidden_layers": about["layers"],
        "num_attention_heads": about["heads"],
        "intermediate_size": about["intermediate"],
        "max_position_embeddings": about["max_pos"],
        "layer_norm_eps": about["ln_eps"],
    }
    facts = json.dumps({"name": "golden", "config": config})
    tower = TransformersTextModule(TransformersText(name="golden", length=12, facts=facts), 20)
    tower.initialize(torch.Generator())
    bert = "sd.text_model."
    state = {f"model.{n.removeprefix(bert)}": t for n, t in tensors.items() if n.startswith(bert)}
    tower.load_state_dict(state | {"projection.weight": tensors["sd.text_projection.weight"]})
    tower.eval()
    lengths = tensors["attention_mask"].sum(1)
    ids = tensors["input_ids"].long()
    torch.testing.assert_close(tower.forward_pooled(ids, lengths), tensors["pooled_text"], **NEAR)
    torch.testing.assert_close(tower(ids, lengths), tensors["projected_text"], **NEAR)
    # padding costs time and changes nothing: each caption at its own length
    for row, length in enumerate(lengths.tolist()):
        alone = tower.forward_pooled(ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], tensors["pooled_text"][row], **NEAR)


def test_a_released_state_gives_the_recorded_captions_and_scale() -> None:
    """Its sizes are read from the shapes; only the heads of so narrow a BERT are not to be seen."""
    tensors = case("text_tower").tensors
    state = {n.removeprefix("sd."): t for n, t in tensors.items() if n.startswith("sd.")}
    moco = case("moco_tiny").tensors
    state |= {f"vision_model.moco.{n[3:]}": t for n, t in moco.items() if n.startswith("sd.")}
    state["visual_projection.weight"] = torch.ones(20, 12)  # the recorded one is of another tower
    released = from_released(state, source="golden", heads=Heads(4, 4), length=12)
    model = released.model.build()
    model.load_state_dict(released.state)
    model.eval()
    with torch.inference_mode():
        lengths = tensors["attention_mask"].sum(1)
        pooled = model.text.forward_pooled(tensors["input_ids"].long(), lengths)
        images = model.image.forward_pooled(moco["images"])
    torch.testing.assert_close(pooled, tensors["pooled_text"], **NEAR)
    torch.testing.assert_close(images, moco["output_eval"], **NEAR)
    torch.testing.assert_close(model.logit_scale.detach().exp()[0], tensors["logit_scale"])
