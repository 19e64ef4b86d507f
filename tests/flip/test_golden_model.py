"""FLIP's towers against numbers of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.named import flip_encoder
from frugal.common.models.positions import sincos_table
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import RecordedNoise
from frugal.common.reduction.image import KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.flip.published_weights import from_flax, to_flax

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"
MODES = ("eval", "train00", "train50", "train75")
DESCRIPTION = json.loads((GOLDEN / "model_p8w32.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "model_p8w32.safetensors")


def config_of(description) -> DualEncoderConfig:
    image, text = description["image"], description["text"]
    return DualEncoderConfig(
        image=ImageTower(
            width=image["width"],
            depth=image["depth"],
            heads=image["heads"],
            mlp_width=4 * image["width"],
            patch_size=image["patch"],
            image_size=image["size"],
            class_token="without_position",
            positions="sincos",
            activation="gelu_tanh",
            pooling="mean_all",
        ),
        text=TextTower(
            width=text["width"],
            depth=text["depth"],
            heads=text["heads"],
            mlp_width=4 * text["width"],
            vocabulary=text["vocab"],
            length=text["max_len"],
            causal=False,
            activation="gelu_tanh",
            norm_epsilon=1e-6,
            pooling="first",
        ),
        embed_dim=description["head"]["proj_dim_out"],
        initialization="flip",
    )


CONFIG = config_of(DESCRIPTION)


def params_of(golden):
    return {
        name.removeprefix("params/"): value
        for name, value in golden.items()
        if name.startswith("params/")
    }


@pytest.fixture
def model(golden) -> DualEncoder:
    model = CONFIG.build()
    model.load_state_dict(from_flax(params_of(golden), CONFIG))
    return model


def kept_of(golden, mode) -> KeptPatches | None:
    """As the objective does it: training masks, evaluation does not."""
    setting = DESCRIPTION["modes"][mode]
    if not setting["train"]:
        return None
    view = PatchView(golden["image_nhwc"].permute(0, 3, 1, 2), CONFIG.image.patch_size)
    noise = RecordedNoise({"image mask": golden[f"{mode}/noise"]})
    return RandomMasking(mask_ratio=setting["mask_ratio"]).keep(view, noise=noise)


def encode(model, golden, mode):
    images = golden["image_nhwc"].permute(0, 3, 1, 2)
    return model(images, golden["token_ids"].long(), kept=kept_of(golden, mode))


def contrastive_loss(images, texts, logit_scale):
    """Section 4 of the specification, literally."""
    logits = logit_scale.clamp(0, torch.tensor(100.0).log()).exp() * images @ texts.T
    target = torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_equal_the_reference(model, golden, mode):
    images, texts = encode(model, golden, mode)
    torch.testing.assert_close(images, golden[f"{mode}/z_img"], rtol=0, atol=2e-6)
    torch.testing.assert_close(texts, golden[f"{mode}/z_txt"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_equals_the_reference(model, golden, mode):
    loss = contrastive_loss(*encode(model, golden, mode), model.logit_scale)
    torch.testing.assert_close(loss, golden[f"{mode}/loss"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["train50", "train75"])
def test_masking_keeps_the_patches_of_the_reference_in_its_order(golden, mode):
    kept = kept_of(golden, mode)
    order = golden[f"{mode}/ids_restore"].argsort(1)
    assert torch.equal(kept.index, order[:, : DESCRIPTION["modes"][mode]["kept"]])
    assert torch.equal(kept.mask(16), golden[f"{mode}/mask"] == 0)


@pytest.mark.parametrize("mode", ["eval", "train50"])
def test_activations_equal_the_reference(model, golden, mode):
    seen = {}

    def keep_as(name):
        def hook(module, inputs, output):
            seen[name] = output

        return hook

    image, text = model.image, model.text
    image.patch_embed.register_forward_hook(keep_as("patch_embed"))
    image.blocks[0].norm1.register_forward_hook(keep_as("img_block0_ln0"))
    image.blocks[0].attn.register_forward_hook(keep_as("img_block0_attn"))
    image.blocks[0].mlp.register_forward_hook(keep_as("img_block0_mlp"))
    image.blocks[0].register_forward_hook(keep_as("img_block0"))
    image.norm.register_forward_hook(keep_as("img_encoder_out"))
    image.projection.register_forward_hook(keep_as("img_proj"))
    text.token_embedding.register_forward_hook(keep_as("txt_tok"))
    text.blocks[0].register_forward_hook(keep_as("txt_block0"))
    text.projection.register_forward_hook(keep_as("txt_proj"))
    encode(model, golden, mode)
    kept = kept_of(golden, mode)
    patches = golden[f"{mode}/act/patch_embed"].flatten(1, 2)
    expected = {name: golden[f"{mode}/act/{name}"] for name in seen if name != "patch_embed"}
    if kept is None:
        # the reference shuffles the patches even where all of them stay: back into image order
        order = golden["eval/ids_restore"].long() + 1
        order = torch.cat((torch.zeros_like(order[:, :1]), order), dim=1).unsqueeze(2)
        for name in ("block0_ln0", "block0_attn", "block0_mlp", "block0", "encoder_out"):
            shuffled = expected[f"img_{name}"]
            expected[f"img_{name}"] = shuffled.gather(1, order.expand_as(shuffled))
    else:
        patches = patches.gather(1, kept.index.unsqueeze(2).expand(-1, -1, patches.shape[2]))
    expected["patch_embed"] = patches
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("mode", ["train00", "train50", "train75"])
def test_gradients_equal_the_reference(model, golden, mode):
    contrastive_loss(*encode(model, golden, mode), model.logit_scale).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    ours = to_flax(gradients, CONFIG)
    expected = {
        name.removeprefix(f"{mode}/grad/"): value
        for name, value in golden.items()
        if name.startswith(f"{mode}/grad/")
    }
    expected.pop("img_encoder/posembed_encoder/pos_embedding", None)  # fixed: no gradient
    if mode == "train75":
        assert expected.keys() == to_flax(model.state_dict(), CONFIG).keys() - {
            "img_encoder/posembed_encoder/pos_embedding"
        }
    for name, value in expected.items():
        tolerance = 2e-5 * value.abs().max().item() + 2e-7
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)


def test_the_flax_tree_survives_a_round_trip(golden, model):
    there_and_back = to_flax(model.state_dict(), CONFIG)
    params = params_of(golden)
    assert there_and_back.keys() == params.keys()
    for name, value in params.items():
        atol = 2e-6 if name.startswith("img_encoder/posembed") else 0
        torch.testing.assert_close(there_and_back[name], value, rtol=0, atol=atol, msg=name)


def test_weights_of_another_grid_are_refused(golden):
    wider = ImageTower(**{**vars(CONFIG.image), "image_size": (32, 40)})
    other = DualEncoderConfig(**{**vars(CONFIG), "image": wider})
    with pytest.raises(InputError, match="another grid than 4x5"):
        from_flax(params_of(golden), other)


def test_an_unknown_weight_is_refused(golden):
    with pytest.raises(InputError, match="img_encoder/extra"):
        from_flax({**params_of(golden), "img_encoder/extra": torch.zeros(1)}, CONFIG)


def test_base_has_every_weight_of_the_reference_in_its_shape():
    tree = json.loads((GOLDEN / "param_tree_base.json").read_text())
    config = flip_encoder("B/16")
    with torch.device("meta"):
        model = DualEncoder(config)
    assert sum(weight.numel() for weight in model.parameters()) == tree["trainable_params"]
    state = {
        name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()
    }
    state = to_flax(state, config)
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == {name: leaf["shape"] for name, leaf in tree["params"].items()}
    assert sum(value.numel() for value in state.values()) == tree["total_params"]


def test_sincos_tables_equal_the_reference():
    golden = load_file(GOLDEN / "sincos.safetensors")
    grids = {"c16_g7": (16, (7, 7)), "c32_g4": (32, (4, 4)), "c64_g3": (64, (3, 3))}
    grids["c32_h2_w5"] = (32, (2, 5))
    seen = 0
    for name, value in golden.items():
        if not name.startswith("table_"):
            continue
        key = name.removeprefix("table_")
        width, grid = grids[key.removesuffix("_nocls")]
        class_row = not key.endswith("_nocls")
        table = sincos_table(grid, width, "sincos", class_row=class_row)
        torch.testing.assert_close(table, value.reshape(table.shape), rtol=0, atol=2e-6)
        seen += 1
    assert seen >= 3
    for size, width, side in (("base", 768, 14), ("large", 1024, 14), ("huge14", 1280, 16)):
        table = sincos_table((side, side), width, "sincos", class_row=True)
        rows = table[golden[f"{size}_rows"]]
        torch.testing.assert_close(rows, golden[f"{size}_values"], rtol=0, atol=2e-6)


def test_first_weights_are_distributed_as_in_the_reference():
    reference = json.loads((GOLDEN / "init_stats_base.json").read_text())["stats"]
    base = flip_encoder("B/16")
    shallow = DualEncoderConfig(
        **{
            **vars(base),
            "image": ImageTower(**{**vars(base.image), "depth": 1}),
            "text": TextTower(**{**vars(base.text), "depth": 1}),
        }
    )
    model = shallow.build(torch.Generator().manual_seed(3))
    ours = to_flax(model.state_dict(), shallow)
    assert reference.keys() == ours.keys()
    for name, expected in reference.items():
        value = ours[name].double()
        assert list(value.shape) == expected["shape"], name
        if name == "img_encoder/posembed_encoder/pos_embedding":
            continue
        uniform = name.endswith("kernel")
        if value.numel() > 10_000:
            assert value.std().item() == pytest.approx(expected["std"], rel=0.03), name
            assert abs(value.mean().item()) < 5 * expected["std"] / value.numel() ** 0.5, name
        if uniform:
            limit = expected["std"] * 3**0.5  # of a uniform distribution
            assert value.abs().max().item() < 1.01 * limit, name
            assert value.abs().max().item() > 0.99 * limit, name
        if expected["std"] == 0:
            assert torch.all(value == expected["mean"]), name
