"""What of the towers is trained, with which weight decay, and where they start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tower_cases import (
    LOG,
    MOCO,
    PLAIN,
    batch_of,
    moco_file,
    objective_of,
    recipe_of,
    stirred,
    text_of,
    write_run,
)

from frugal.cit.objective import LockedContrastive
from frugal.cit.published_dual import to_released
from frugal.cit.recipes import published_optimizer
from frugal.common.checkpoint.init_from import init_from
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.errors import InputError
from frugal.common.models.pretrained import TimmImage
from frugal.common.models.text import TextTower
from frugal.common.objectives.contrastive_loss import LARGEST_LOG_SCALE
from frugal.common.optim.optimizers import AdamW, set_learning_rate
from frugal.common.recipe import EngineOptions, Recipe, Reductions
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate

TEXT = TextTower(
    width=20, depth=2, heads=2, mlp_width=40, vocabulary=90, length=16, causal=False,
    pad_mask=True, pooling="first",
)  # fmt: skip
ALWAYS = {"model.logit_scale", "model.image.projection.weight", "model.text.projection.weight"}


@pytest.fixture
def recipe(bert_words: Path) -> Recipe:
    """MoCo's tower and BERT, both random, everything trained."""
    text = text_of(bert_words, pretrained=False)
    return recipe_of(MOCO, text, bert_words)


def trained(recipe: Recipe, **objective: str) -> set[str]:
    """Names of what is trained beside what always is."""
    changed = replace(recipe, objective=LockedContrastive(**objective))
    module = objective_of(changed)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert names >= ALWAYS
    return names - ALWAYS


def test_trained_parts_are_those_that_are_named(recipe: Recipe) -> None:
    every = trained(recipe, train_image="all", train_text="all")
    image = {name for name in every if name.startswith("model.image.")}
    head = {name for name in image if name.startswith("model.image.projector.")}
    pool = {name for name in every if name.startswith("model.text.model.pooler.")}
    assert len(head) == 7 and len(pool) == 2 and len(image) > 30
    assert trained(recipe, train_image="head", train_text="all") == every - image | head
    assert trained(recipe, train_image="head", train_text="pool") == head | pool
    assert trained(recipe, train_image="none", train_text="none") == set()
    assert trained(recipe) == trained(recipe, train_image="head", train_text="all")


@pytest.mark.parametrize(
    "parts", [("head", "all"), ("none", "pool"), ("none", "none")], ids="-".join
)
def test_what_is_frozen_is_bit_for_bit_what_it_was(recipe: Recipe, parts) -> None:
    image, text = parts
    chosen = LockedContrastive(train_image=image, train_text=text)
    module = objective_of(replace(recipe, objective=chosen))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    free = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    optimizer = published_optimizer().build(module)
    set_learning_rate(optimizer, 1e-3)
    for seed in range(2):
        loss, _ = module(batch_of(seed=seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, t in module.state_dict().items() if not t.equal(before[n])}
    statistics = {n for n in before if "running_" in n or "num_batches" in n}
    biases_of_keys = {n for n in free if ".attention.self.key.bias" in n}  # no gradient, no decay
    # the token of a second sentence and far positions are only decayed, which moves them too
    assert moved == (free - biases_of_keys) | (statistics if image == "head" else set())


def test_the_frozen_trunk_runs_without_autograd_and_as_in_evaluation(recipe: Recipe) -> None:
    module = objective_of(replace(recipe, objective=LockedContrastive()))
    tower = module.model.image
    seen = []
    tower.projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(batch_of())
    assert not seen[0].requires_grad and seen[0].grad_fn is None
    assert not tower.blocks.training and tower.projector.training
    module.eval()
    module.train()  # as evaluations leave it
    assert not tower.blocks.training and tower.projector[7].training
    frozen = objective_of(replace(recipe, objective=LockedContrastive(train_text="pool")))
    encoder = frozen.model.text.model.encoder
    assert not any(part.training for part in encoder.modules())  # no dropout


def test_there_are_three_groups_of_weight_decay(recipe: Recipe) -> None:
    module = objective_of(recipe)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decays = {
        names[id(parameter)]: group["weight_decay"]
        for group in published_optimizer().build(module).param_groups
        for parameter in group["params"]
    }
    assert decays.keys() == set(names.values())
    for name, parameter in module.named_parameters():
        if name in ALWAYS - {"model.logit_scale"}:
            assert decays[name] == 1.0
        else:
            assert decays[name] == (0.0 if parameter.ndim == 1 else 0.2), name
    assert decays["model.image.pos_embed"] == decays["model.image.cls_token"] == 0.2
    assert decays["model.logit_scale"] == 0.0
    published = published_optimizer(no_decay=("bias", "norm")).build(module)
    held = {names[id(p)]: g["weight_decay"] for g in published.param_groups for p in g["params"]}
    assert {name for name in names.values() if held[name] != decays[name]} == {"model.logit_scale"}
    with pytest.raises(InputError, match="projects into no shared space"):
        published_optimizer().build(torch.nn.Linear(2, 2))
    assert AdamW(learning_rate=1.0).projection_weight_decay is None


def test_the_logit_scale_is_clamped_unless_the_release_is_repeated(recipe: Recipe) -> None:
    assert objective_of(recipe).bounds() == {"model.logit_scale": (0.0, LARGEST_LOG_SCALE)}
    free = LockedContrastive(clamp="never")
    module = objective_of(replace(recipe, objective=free))
    assert module.bounds() == {}
    with torch.no_grad():
        module.model.logit_scale.fill_(6.0)
    assert module(batch_of())[1]["logit_scale"] == pytest.approx(403.43, abs=0.01)


def test_damaged_samples_count_in_no_statistic(recipe: Recipe) -> None:
    recipe = replace(recipe, objective=LockedContrastive())
    # in float64: batch norms of so few samples make rounding a thousand times larger
    whole = batch_of(8, invalid=3)
    whole = replace(whole, images=whole.images.double() / 100)
    results = []
    for batch in (whole, whole.rows(0, 5)):
        module = objective_of(replace(recipe, model=replace(recipe.model, text=TEXT))).double()
        loss, _ = module(batch)
        loss.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([loss.detach(), *module.buffers(), *gradients])
    for with_damage, without in zip(*results, strict=True):
        torch.testing.assert_close(with_damage, without, rtol=1e-4, atol=1e-5)


def test_flops_of_frozen_parts_are_those_of_one_pass(recipe: Recipe) -> None:
    flops = {}
    for image in ("none", "head", "all"):
        module = objective_of(replace(recipe, objective=LockedContrastive(train_image=image)))
        flops[image] = module.step_flops({"image_tokens": 17.0, "text_tokens": 8.0})
    projector = 2 * 20 * (24 + 20 + 12)
    assert flops["head"] - flops["none"] == 2 * projector
    assert flops["all"] > 1.5 * flops["head"]


# ------------------------------------------------------------------------------------------------
# Where the towers start


def started(recipe: Recipe, source: Path | None = None, **objective: str):
    chosen = LockedContrastive(**objective)
    module = objective_of(replace(recipe, objective=chosen))
    init_from(module, source, interpolate=False, log=LOG)
    return module


def published_moco(folder: Path, image=MOCO) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file of MoCo v3 and the tower that it is of."""
    generator = torch.Generator().manual_seed(9)
    state = {n: stirred(t, generator) for n, t in image.module().state_dict().items()}
    dummies = {"image.projection.weight": torch.zeros(1), "text.projection.weight": torch.zeros(1)}
    named = {f"image.{n}": t for n, t in state.items()} | dummies
    model = type("Model", (), {"image": image})()
    names = to_released(named | {"logit_scale": torch.zeros(1)}, model, kind="moco")
    prefix = "vision_model.moco."
    theirs = {n.removeprefix(prefix): t for n, t in names.items() if n.startswith(prefix)}
    return moco_file(folder / "moco.pth.tar", theirs), state


def test_towers_start_from_what_the_recipe_names(recipe, bert_words, tmp_path) -> None:
    file, state = published_moco(tmp_path)
    recipe = replace(recipe, model=replace(recipe.model, text=text_of(bert_words)))
    fresh = objective_of(recipe).state_dict()
    module = started(recipe, image_weights=str(file))
    found = module.model.image.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in state.items())
    for part in ("image", "text"):  # projections are new
        name = f"model.{part}.projection.weight"
        assert module.state_dict()[name].equal(fresh[name])
    name = "model.text.model.pooler.dense.weight"
    assert not module.state_dict()[name].equal(fresh[name])


def test_a_run_gives_all_weights(recipe, bert_words, tmp_path) -> None:
    run = write_run(tmp_path / "run", recipe)
    module = started(recipe, source=run, image_weights="not-read.pth")
    assert not module.model.logit_scale.equal(torch.full((1,), 2.6592))
    again = started(recipe, source=run, train_image="none", train_text="none")
    assert all(again.state_dict()[n].equal(t) for n, t in module.state_dict().items())


def test_towers_of_ours_start_from_runs(recipe, bert_words, tmp_path) -> None:
    source = replace(recipe, model=replace(recipe.model, image=PLAIN, text=TEXT))
    run = write_run(tmp_path / "run", replace(source, objective=LockedContrastive(
        train_image="all")))  # fmt: skip
    module = started(source, train_image="none", train_text="none", image_weights=str(run),
                     text_weights=str(run))  # fmt: skip
    again = started(source, run, train_image="none")
    for name, tensor in module.state_dict().items():
        same = tensor.equal(again.state_dict()[name])
        assert same is (".projection." not in name and name != "model.logit_scale"), name
    other = replace(source, model=replace(source.model, text=replace(TEXT, pooling="mean")))
    with pytest.raises(
        InputError, match=r"has pooling first, but model.text.pooling is mean; give"
    ):
        started(other, train_image="all", text_weights=str(run))
    for part, change, flag in (
        ("image", {"mean": (0.5, 0.4, 0.3)}, "--model.image.mean 0.485 0.456 0.406"),
        ("image", {"norm_epsilon": 1e-5}, "--model.image.norm-epsilon 1e-06"),
        ("text", {"activation": "quick_gelu"}, "--model.text.activation gelu"),
        ("text", {"causal": True}, "--model.text.no-causal"),
    ):
        tower = replace(getattr(source.model, part), **change)
        other = replace(source, model=replace(source.model, **{part: tower}))
        weights = {f"{part}_weights": str(run)}
        with pytest.raises(InputError, match=f"; give {flag}$"):
            started(other, train_image="all", **weights)
    words = replace(source, data=replace(source.data, tokenizer=ClipBpe()))
    with pytest.raises(InputError, match=r"tokenizer that the text tower of .*recipe\.json in the"):
        started(words, train_image="all", text_weights=str(run))
    longer = replace(source, model=replace(source.model, text=replace(TEXT, length=24)))
    with pytest.raises(InputError, match=r"has 16 slots, here are 24; add --run.interpolate"):
        started(longer, train_image="all", text_weights=str(run))


def test_a_random_tower_is_not_frozen(recipe, bert_words) -> None:
    with pytest.raises(InputError, match="train_image is head, which would keep random weights"):
        started(recipe)
    with pytest.raises(InputError, match=r"train_text is pool, but model.text.pretrained is off"):
        started(recipe, train_image="all", train_text="pool")
    own = replace(recipe, model=replace(recipe.model, text=TEXT))
    with pytest.raises(InputError, match="train_text is none, which would keep random weights"):
        started(own, train_image="all", train_text="none")
    started(recipe, train_image="all")


@pytest.mark.parametrize(
    ("model", "objective", "sentence"),
    [
        ({"image": PLAIN}, {}, "train_image is head, but model.image has no projector"),
        ({"text": TEXT}, {"train_text": "pool"}, "train_text is pool, but model.text has no pool"),
        ({}, {"text_weights": "run"}, "text_weights is run, but model.text names its weights"),
        (
            {"image": TimmImage(name="resnet18", image_size=32)},
            {"train_image": "none", "image_weights": "file"},
            "image_weights is file, but model.image names its weights",
        ),
    ],
)
def test_what_the_towers_do_not_have_is_refused(recipe, model, objective, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(
            recipe,
            model=replace(recipe.model, **model),
            objective=LockedContrastive(**objective),
        )


def test_impossible_combinations_are_refused(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="cache_chunk encodes a batch in parts"):
        replace(recipe, engine=EngineOptions(cache_chunk=4))
    masked = Reductions(image=RandomMasking(mask_ratio=0.5), text=Truncate())
    replace(recipe, reduction=masked)  # one of our own towers follows
    foreign = replace(recipe.model, image=TimmImage(name="resnet18", image_size=32))
    whole = replace(recipe, model=foreign, objective=LockedContrastive(train_image="none"))
    with pytest.raises(InputError, match="RandomMasking leaves patches out, but the tower resnet"):
        replace(whole, reduction=masked)


def test_masked_images_train_the_projector(recipe: Recipe) -> None:
    masked = Reductions(image=RandomMasking(mask_ratio=0.5), text=Truncate())
    module = objective_of(replace(recipe, reduction=masked, objective=LockedContrastive()))
    loss, metrics = module(batch_of())
    loss.backward()
    assert metrics["image_tokens"] == 9  # half of sixteen, and the class token
    assert module.model.image.projector[0].weight.grad.abs().sum() > 0
