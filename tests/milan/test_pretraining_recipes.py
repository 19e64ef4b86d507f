"""Sizes, weight decay, learning rates and first weights of the published pretraining runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file

from frugal.common.errors import InputError
from frugal.common.models.vit import image_table
from frugal.common.recipe import Reductions
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate
from frugal.milan.decoders import DecoderConfig
from frugal.milan.model import MaskedImageModel, MaskedModel, build, encoder
from frugal.milan.objective import ReconstructFeatures, ReconstructPixels
from frugal.milan.published_weights import to_published
from frugal.milan.recipes import RECIPES
from frugal.milan.semantic_sampling import SemanticSampling
from support import run_code


def read(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def on_meta(config: MaskedModel, outputs: int) -> MaskedImageModel:
    with torch.device("meta"):
        return MaskedImageModel(config, outputs=outputs)


SIZES = {  # with a target of 512 numbers: whole model, without the two fixed tables
    "vit-s16": (47_446_912, 47_270_400), "vit-b16": (111_776_512, 111_524_352),
    "vit-l16": (329_410_560, 329_107_968), "vit-h14": (657_035_520, 656_574_976),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_has_the_published_parameters(name):
    recipe = RECIPES[name]()
    model = on_meta(recipe.model, 512)
    trained = sum(p.numel() for p in model.parameters())
    tables = image_table(model.config.image).numel() + image_table(model.decoder.tower).numel()
    assert (trained + tables, trained) == SIZES[name]
    assert all(p.requires_grad for p in model.parameters())


def folded(name: str) -> str:
    parts = name.split(".")
    return ".".join("{i}" if part.isdecimal() else part for part in parts)


@pytest.mark.parametrize(
    ("name", "golden"), [("vit-b16", "vit_base_patch16"), ("vit-l16", "vit_large_patch16")]
)
def test_names_order_and_shapes_are_those_of_published_files(name, golden):
    recorded = read("state_dict_shapes")["pretraining"][golden]
    config = RECIPES[name]().model
    state = {n: torch.empty(p.shape) for n, p in on_meta(config, 512).state_dict().items()}
    theirs = to_published(state, config)
    found: dict[str, dict] = {}
    for key, tensor in theirs.items():
        entry = found.setdefault(folded(key), {"shape": list(tensor.shape), "count": 0})
        entry["count"] += 1
    assert list(found) == list(recorded["keys_in_order_with_blocks_folded"])
    assert found == recorded["keys_in_order_with_blocks_folded"]
    assert len(theirs) == recorded["total_keys"]


def test_weight_decay_acts_on_the_recorded_tensors_of_vit_b():
    recorded = read("wd_groups_pretrain_vit_b")
    recipe = RECIPES["vit-b16"]()
    model = on_meta(recipe.model, 512)
    decayed = recipe.optimizer.decayed_names(model)
    names = {name for name, _ in model.named_parameters()}
    for group, ours in zip(recorded["groups"], (names - decayed, decayed), strict=True):
        # a number per tensor of ours tells the recorded names apart; those stacked appear as one
        state = {n: torch.full(p.shape, float(n in ours)) for n, p in model.state_dict().items()}
        theirs = to_published(state, recipe.model)
        assert {n for n, t in theirs.items() if n not in recorded["frozen"] and t.all()} == set(
            group["names"]
        )
        assert recipe.optimizer.weight_decay == max(g["weight_decay"] for g in recorded["groups"])
    assert {"image.cls_token", "decoder.mask_token"} <= decayed


def test_the_learning_rate_is_the_recorded_one_after_as_many_samples():
    recorded = read("lr_schedule")["schedules"]["pretrain_vit_b"]
    recipe = RECIPES["vit-b16"]()
    peak = recipe.optimizer.peak(recipe.batch_size)
    assert peak == pytest.approx(recorded["lr"], rel=1e-12)
    per_micro_step = recipe.batch_size // recorded["accum"]
    for value in recorded["values"]:
        micro_steps = value["epoch"] * recorded["steps_per_epoch"] + value["micro_step"]
        rate = recipe.schedule.learning_rate(micro_steps * per_micro_step, peak=peak)
        assert rate == pytest.approx(value["lr"], rel=1e-9, abs=1e-18)
    assert recipe.schedule.learning_rate(0, peak=peak) == 0
    assert recipe.engine.accumulate == recorded["accum"]


def test_the_large_run_has_its_own_epochs():
    recipe = RECIPES["vit-l16"]()
    assert recipe.engine.accumulate == 4
    assert recipe.schedule.samples == 400 * 1_251 * 128 * 8
    assert recipe.schedule.warmup_samples * 10 == recipe.schedule.samples
    assert recipe.optimizer.peak(recipe.batch_size) == pytest.approx(2.4e-3)


def test_position_tables_are_the_recorded_ones():
    recorded = load_file(GOLDEN / "sincos.safetensors")
    about = read("sincos")
    for key, table in recorded.items():
        kind, _, name = key.partition("/")
        width, side = (int(part.lstrip("dimgr")) for part in name.split("_"))
        tower = encoder("S/16", image_size=16 * side, width=width, heads=1)
        ours = image_table(tower)[0]
        if kind == "full":
            torch.testing.assert_close(ours, table, rtol=0, atol=1e-6)
            continue
        known = about["partial"][name]
        torch.testing.assert_close(ours[known["rows"]], table, rtol=0, atol=1e-6)
        assert list(ours.shape) == known["shape"]
        assert ours.double().sum().item() == pytest.approx(known["sum"], rel=1e-7)
        assert ours.double().square().sum().item() == pytest.approx(known["sum_sq"], rel=1e-7)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_first_weights_are_drawn_as_published(kind):
    config = MaskedModel(
        image=encoder("S/8", image_size=32, width=64, depth=2, heads=2, mlp_width=256),
        decoder=DecoderConfig(kind=kind, width=48, depth=2, heads=3),
    )
    model = build(config, torch.Generator().manual_seed(1), outputs=40)
    again = build(config, torch.Generator().manual_seed(1), outputs=40)
    state, theirs = model.state_dict(), to_published(model.state_dict(), config)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in theirs.items():
        if name.endswith("pos_embed"):
            continue
        if name in ("cls_token", "mask_token"):
            assert 0.005 < tensor.std() < 0.04 and tensor.abs().max() < 0.1
        elif name == "patch_embed.proj.bias":
            limit = 1 / math.sqrt(3 * 8 * 8)
            assert 0.8 * limit < tensor.abs().max() <= limit
        elif "norm" in name:
            assert tensor.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            matrix = tensor.flatten(1)
            limit = math.sqrt(6 / sum(matrix.shape))
            assert 0.9 * limit < matrix.abs().max() <= limit, name
            assert matrix.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_own_json(name):
    recipe = RECIPES[name]()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    image, masking = recipe.model.image, recipe.reduction.image
    assert masking.num_kept(image.num_patches) == image.num_patches // 4
    assert recipe.model.decoder.heads * 32 == recipe.model.decoder.width or "demo" in name


def test_the_variants_differ_in_what_their_names_say():
    whole = RECIPES["vit-b16"]()
    assert isinstance(whole.reduction.image, SemanticSampling)
    assert whole.model.decoder.kind == "prompting"
    uniform = RECIPES["vit-b16-uniform"]()
    assert uniform == replace(whole, reduction=Reductions(image=RandomMasking(mask_ratio=0.75)))
    pixels = RECIPES["vit-b16-pixels"]()
    assert pixels == replace(uniform, objective=ReconstructPixels(normalize_patches=True))
    plain = RECIPES["vit-b16-plain-decoder"]()
    assert plain == replace(whole, model=replace(whole.model, decoder=DecoderConfig(kind="plain")))
    mae = RECIPES["mae-b16-800ep"]()
    assert mae.model == plain.model and mae.objective == pixels.objective
    assert mae.schedule.samples == 2 * whole.schedule.samples
    assert mae.schedule.warmup_samples == whole.schedule.warmup_samples
    teachers = {n: RECIPES[n]().objective.teacher for n in ("vit-b16-slip", "vit-b16-dino")}
    assert len({teacher.source for teacher in teachers.values()}) == 2


# Cost per image in 10**9 multiply-adds, as published for 224 pixels and a quarter of the patches
@pytest.mark.parametrize(
    ("kind", "name", "total"),
    [
        ("prompting", "S/16", 1.08 + 4.22), ("prompting", "B/16", 4.29 + 4.22),
        ("plain", "B/16", 4.29 + 5.35), ("prompting", "L/16", 15.2 + 4.22),
    ],
)  # fmt: skip
def test_a_step_costs_what_the_paper_counts(kind, name, total):
    model = on_meta(MaskedModel(image=encoder(name), decoder=DecoderConfig(kind=kind)), 512)
    assert model.flops(49) / 2e9 == pytest.approx(total, rel=0.01)


# ------------------------------------------------------------------------------------------------
# Mistakes


def test_settings_without_effect_are_refused():
    recipe = RECIPES["demo"]()
    with pytest.raises(InputError, match="hides nothing"):
        replace(recipe, reduction=Reductions(image=SemanticSampling(mask_ratio=0.0)))
    with pytest.raises(InputError, match="reads no captions"):
        replace(recipe, reduction=replace(recipe.reduction, text=Truncate()))
    with pytest.raises(InputError, match="cache_chunk"):
        replace(recipe, engine=replace(recipe.engine, cache_chunk=4))
    with pytest.raises(InputError, match="keeps none of 16 patches"):
        replace(recipe, reduction=Reductions(image=SemanticSampling(mask_ratio=0.95)))
    with pytest.raises(InputError, match=r"model\.decoder\.width 50"):
        DecoderConfig(width=50).tower(recipe.model.image)
    with pytest.raises(InputError, match="class token"):
        MaskedModel(image=replace(recipe.model.image, class_token="none", pooling="mean"))


def test_a_model_without_decoder_is_refused():
    from frugal.flip.recipes import demo

    with pytest.raises(InputError, match="needs a model with a decoder"):
        replace(demo(), objective=ReconstructFeatures())


def test_a_reduction_that_keeps_all_is_refused_when_it_does():
    recipe = replace(RECIPES["demo-pixels"](), reduction=Reductions(image=KeepAll()))
    objective = recipe.objective.build(recipe)
    from frugal.common.contracts import Batch

    batch = Batch(
        images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        sample_numbers=torch.arange(2),
        valid=torch.ones(2, dtype=torch.bool),
    )
    with pytest.raises(InputError, match="KeepAll keeps every patch"):
        objective(batch)


def test_recipes_and_help_need_nothing_slower_than_torch():
    check = (
        "import sys, frugal.milan.pretrain as m; [make() for make in m.RECIPES.values()];"
        "heavy = {'deepspeed', 'transformers', 'accelerate', 'open_clip', 'matplotlib'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
