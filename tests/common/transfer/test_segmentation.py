"""The segmenter: its numbers are those of transformers' UperNet on a BEiT backbone."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import segment_cases as cases
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation

from frugal.common.checkpoint.init_from import init_from
from frugal.common.data.config import ImageData
from frugal.common.errors import InputError
from frugal.common.models.batch_norm import SharedBatchNorm
from frugal.common.models.vit import ImageTower, ImageTransformer, image_table
from frugal.common.models.weight_names import to_timm
from frugal.common.optim.optimizers import learning_rate_scales
from frugal.common.optim.schedules import WarmupLinear
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.transfer.photometric import PhotometricDistortion
from frugal.common.transfer.pixels import normalized
from frugal.common.transfer.segmentation import Segmentation, SegmentationObjective
from frugal.common.transfer.segmenter import (
    PixelClassifier,
    Segmenter,
    SegmenterConfig,
    even_taps,
    segmenter_flops,
)
from frugal.milan.segmentation_recipes import SEGMENTATION

SQUARE = SegmenterConfig(
    image=ImageTower(width=32, depth=6, heads=4, mlp_width=48, patch_size=8, image_size=64),
    taps=(2, 3, 4, 6),
    num_classes=9,
    width=24,
    auxiliary_width=20,
    dropout=0.0,
)
LOG = logging.getLogger("test")


def built(config: SegmenterConfig) -> Segmenter:
    """A model in which every number matters: norms, biases and running statistics are random."""
    model = config.build(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def theirs(ours: Segmenter) -> UperNetForSemanticSegmentation:
    """transformers' model with the same weights."""
    config, tower = ours.config, ours.config.image
    backbone = BeitConfig(
        hidden_size=tower.width, num_hidden_layers=tower.depth, num_attention_heads=tower.heads,
        intermediate_size=tower.mlp_width, image_size=tower.image_size,
        patch_size=tower.patch_size, use_absolute_position_embeddings=True,
        layer_scale_init_value=0.0, layer_norm_eps=tower.norm_epsilon, add_fpn=True,
        drop_path_rate=0.0, out_features=[f"stage{tap}" for tap in config.taps],
    )  # fmt: skip
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            hidden_size=config.width,
            num_labels=config.num_classes,
            auxiliary_channels=config.auxiliary_width,
            auxiliary_loss_weight=0.4,
        )
    )
    state = by_their_names(ours.state_dict(), tower)
    wanted = model.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in wanted.items()}
    model.load_state_dict(state)
    return model


def by_their_names(state: dict[str, Tensor], tower: ImageTower) -> dict[str, Tensor]:
    """Tensors of a segmenter, or their gradients, as transformers calls and cuts them."""
    found = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "neck":
            found[f"backbone.fpn.{rest}"] = tensor
        elif part != "image":
            found[name] = tensor
        elif rest == "patch_embed.weight":
            kernel = tensor.unflatten(1, (3, tower.patch_size, tower.patch_size))
            found["backbone.beit.embeddings.patch_embeddings.projection.weight"] = kernel
        elif "qkv" in rest:
            leaf = rest.rpartition(".")[2]
            for kind, piece in zip("qkv", tensor.chunk(3), strict=True):
                if (kind, leaf) != ("k", "bias"):  # it changes nothing, and BEiT has none
                    found[f"{their_block(rest)}.attention.{kind}_proj.{leaf}"] = piece
        else:
            for mine, their in LEAVES.items():
                if mine in rest:
                    place = rest.replace(mine, their).replace("blocks.", "layers.")
                    found[f"backbone.beit.{place}"] = tensor
    return found


def their_block(name: str) -> str:
    return f"backbone.beit.layers.{name.split('.')[1]}"


LEAVES = {
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
    "attn.proj.": "attention.o_proj.", "norm1.": "layernorm_before.", "norm2.": "layernorm_after.",
    "mlp.": "mlp.",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Against transformers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_scores_are_those_of_transformers_with_the_same_weights(dtype, tolerance) -> None:
    ours = built(SQUARE)
    other = theirs(ours).to(dtype).eval()
    images = torch.randn(2, 3, 64, 64, dtype=dtype, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, found = other(images).logits, ours.to(dtype).eval()(images)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_a_training_step_has_the_loss_and_gradients_of_transformers() -> None:
    ours = built(SQUARE).double()
    other = theirs(ours).double().train()
    batch = cases.batch(model=SQUARE)
    still = Segmentation(distortion=PhotometricDistortion(probability=0.0))
    objective = SegmentationObjective(ours, still, seed=0).train()
    images = normalized(batch.images, ours.config.image)  # float32, as in training
    expected = other(images.double(), labels=batch.labels.long()).loss
    expected.backward()
    found, metrics = objective(batch)
    found.backward()
    # the number of pixels is divided by in float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)
    both = metrics["main_loss"] + 0.4 * metrics["auxiliary_loss"]
    assert both.item() == pytest.approx(expected.item(), rel=1e-7)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    named = by_their_names(gradients, SQUARE.image)
    wanted = {name: p.grad for name, p in other.named_parameters()}
    assert named.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(named[name], gradient, rtol=1e-6, atol=1e-10), name
    statistics = {n: t for n, t in other.named_buffers() if "running" in n}
    mine = by_their_names(dict(ours.named_buffers()), SQUARE.image)
    for name, tensor in statistics.items():
        assert torch.allclose(mine[name], tensor, rtol=1e-10, atol=1e-12), name


# ------------------------------------------------------------------------------------------------
# Parts


def test_levels_are_raw_outputs_of_the_blocks_at_four_scales_on_grids_that_are_not_square() -> None:
    model = built(cases.CONFIG).eval()
    images = torch.randn(2, 3, 32, 48)
    seen: list[list[Tensor]] = []
    model.neck.register_forward_hook(lambda _, given, put: seen.append([*given[0], *put]))
    with torch.no_grad():
        model(images)
        tokens, layout = model.image.embed(images)
        for number, block in enumerate(model.image.blocks):
            tokens = block(tokens, layout)  # (B, 1 + 24, D)
            for row in range(4):
                for column in range(6):
                    expected = tokens[:, 1 + 6 * row + column]
                    found = seen[0][number][:, :, row, column]
                    assert torch.allclose(found, expected, atol=1e-6)
    shapes = [tuple(level.shape[2:]) for level in seen[0][4:]]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_tower_without_class_token_works_and_a_norm_of_its_own_is_not_there() -> None:
    tower = replace(cases.TOWER, class_token="none", pooling="mean")
    model = built(replace(cases.CONFIG, image=tower)).eval()
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 7, 32, 48)
    assert not [name for name in model.state_dict() if name.startswith("image.norm.")]


def test_every_parameter_gets_a_gradient_so_that_no_process_waits_for_one() -> None:
    objective = cases.recipe().objective.build(cases.recipe())
    loss, _ = objective(cases.batch())
    loss.backward()
    assert [n for n, p in objective.named_parameters() if p.grad is None] == []


def test_first_weights_come_from_the_generator_alone() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(cases.CONFIG.build(torch.Generator().manual_seed(0)).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    other = cases.CONFIG.build(torch.Generator().manual_seed(1)).state_dict()
    random = [n for n, t in other.items() if t.ndim > 1 and n != "image.pos_embed"]
    assert not [name for name in random if torch.equal(other[name], states[0][name])]


def test_first_weights_have_the_deviations_of_mmsegmentations_heads() -> None:
    config = replace(cases.CONFIG, width=64, auxiliary_width=64)
    model = config.build(torch.Generator().manual_seed(0))
    for head in (model.decode_head, model.auxiliary_head):
        assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert not head.classifier.bias.any()
    fused = model.decode_head.fpn_bottleneck.conv.weight  # 64 outputs, 3 x 3 each
    assert fused.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert torch.equal(model.image.pos_embed, image_table(encoder_like(config.image)))


def encoder_like(tower: ImageTower) -> ImageTower:
    """The same with MAE's fixed positions."""
    return replace(tower, positions="sincos")


def test_enlarging_layers_start_as_torch_starts_them() -> None:
    config = replace(cases.CONFIG, image=replace(cases.TOWER, width=64))
    layer = config.build(torch.Generator().manual_seed(0)).neck.fpn2
    torch.manual_seed(0)
    reference = nn.ConvTranspose2d(64, 64, 2, stride=2)
    for mine, their in ((layer.weight, reference.weight), (layer.bias, reference.bias)):
        assert mine.abs().max().item() == pytest.approx(their.abs().max().item(), rel=0.05)
        assert mine.std().item() == pytest.approx(their.std().item(), rel=0.1)


def test_whole_channels_are_dropped_before_the_classifier_in_training_only() -> None:
    layer = PixelClassifier(40, 2, dropout=0.5)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    maps = torch.ones(3, 40, 4, 5)
    torch.manual_seed(0)
    sums = layer.train()(maps)  # (3, 2, 4, 5): twice the number of channels that stay
    assert torch.equal(sums, sums[:, :1, :1, :1].expand_as(sums))
    assert len({value.item() for value in sums[:, 0, 0, 0]} - {40.0}) > 0
    assert torch.equal(layer.eval()(maps), torch.full((3, 2, 4, 5), 40.0))
    heads = cases.CONFIG.build(torch.Generator())
    config = replace(cases.CONFIG, dropout=0.3).build(torch.Generator())
    for part in ("decode_head", "auxiliary_head"):
        assert getattr(heads, part).classifier.dropout == 0.0
        assert getattr(config, part).classifier.dropout == 0.3


def test_flops_are_those_that_torch_counts() -> None:
    config = replace(cases.CONFIG, image=replace(cases.TOWER, image_size=(48, 80)))
    model = config.build(torch.Generator())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.both(torch.zeros(1, 3, 48, 80))
    assert segmenter_flops(config) == counter.get_total_flops()


# ------------------------------------------------------------------------------------------------
# Batch norm


def test_batch_norm_is_torchs_with_gradients_and_running_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 5, 4, 6, dtype=torch.float64, generator=generator) * 3 + 100
    ours, other = SharedBatchNorm(5).double(), nn.BatchNorm2d(5).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(5, generator=generator))
    other.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, other):
        leaf = maps.clone().requires_grad_()
        for _ in range(2):
            layer(leaf).pow(3).mean().backward()
        results.append([leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        results[-1].append(layer.eval()(leaf))
    for mine, their in zip(*results, strict=True):
        assert torch.allclose(mine, their, rtol=1e-9, atol=1e-12)


def test_batch_norm_of_no_image_remembers_nothing_new_that_is_not_finite() -> None:
    layer = SharedBatchNorm(5).train()
    assert layer(torch.zeros(0, 5, 2, 2)).shape == (0, 5, 2, 2)
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())


# ------------------------------------------------------------------------------------------------
# The objective


def objective_of(config: Segmentation | None = None) -> SegmentationObjective:
    model = built(cases.CONFIG)
    return SegmentationObjective(model, config or Segmentation(), seed=3).train()


def test_damaged_samples_count_nowhere() -> None:
    one, other = objective_of(), objective_of()
    whole = cases.batch(3)
    rows = torch.tensor([0, 2])
    clean = replace(
        whole,
        images=whole.images[rows], labels=whole.labels[rows],
        sample_numbers=whole.sample_numbers[rows], valid=whole.valid[rows],
    )  # fmt: skip
    images = whole.images.clone()
    images[1] = 0
    damaged = replace(
        whole, images=images, valid=torch.tensor([True, False, True]), damage={"image": 1}
    )
    losses = [objective(batch)[0] for objective, batch in ((one, clean), (other, damaged))]
    assert losses[0].item() == losses[1].item()
    for mine, their in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, their)


def test_a_batch_that_is_damaged_throughout_changes_nothing() -> None:
    objective = objective_of()
    batch = replace(cases.batch(2), valid=torch.zeros(2, dtype=torch.bool), damage={"image": 2})
    loss, metrics = objective(batch)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(not p.grad.any() for p in objective.parameters() if p.grad is not None)


def test_what_lies_under_padding_is_never_seen_and_never_asked_about() -> None:
    batch = cases.batch(2)
    labels = batch.labels.clone()
    labels[:, 20:] = 254
    images = batch.images.clone()
    images[:, :, 20:] = 7
    losses = [
        objective_of()(replace(batch, images=pixels, labels=labels))[0].item()
        for pixels in (batch.images, images)
    ]
    assert losses[0] == losses[1]
    ignored = replace(batch, labels=torch.where(labels == 254, 255, labels))
    assert objective_of()(ignored)[0].item() != losses[0]  # there the pixels are seen
    still = SegmentationObjective(
        built(cases.CONFIG), Segmentation(distortion=PhotometricDistortion(probability=0.0)), seed=0
    ).eval()
    seen: list[Tensor] = []
    still.model.image.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    still(replace(batch, labels=labels))
    assert not seen[0][:, :, 20:].any()
    assert torch.allclose(
        seen[0][:, :, :20], normalized(batch.images, still.model.config.image)[:, :, :20]
    )


def test_every_pixel_with_a_class_counts_alike_whatever_image_it_is_of() -> None:
    still = Segmentation(distortion=PhotometricDistortion(probability=0.0), auxiliary_weight=0.3)
    objective = SegmentationObjective(built(cases.CONFIG), still, seed=0).eval()
    batch = cases.batch(2)
    labels = batch.labels.clone()
    labels[0, 3:] = 255
    labels[1, :, 40:] = 254
    batch = replace(batch, labels=labels)
    images = normalized(batch.images, objective.model.config.image)
    images[1, :, :, 40:] = 0
    loss, metrics = objective(batch)
    total, known, right = [0.0, 0.0], 0, 0
    with torch.no_grad():
        heads = objective.model.both(images)
        for head, scores in enumerate(heads):
            scores = F.interpolate(scores, (32, 48), mode="bilinear", align_corners=False)
            probabilities = scores.double().softmax(1)
            for image, row, column in (labels < 254).nonzero().tolist():
                truth = int(labels[image, row, column])
                total[head] -= probabilities[image, truth, row, column].log().item()
                known += head == 0
                best = int(probabilities[image, :, row, column].argmax())
                right += head == 0 and best == truth
    assert loss.item() == pytest.approx((total[0] + 0.3 * total[1]) / known, rel=1e-5)
    assert metrics["pixel_accuracy"].item() == pytest.approx(right / known)
    assert metrics["image_tokens"] == 25


def test_pictures_show_images_above_their_classes() -> None:
    picture = objective_of(Segmentation(distortion=PhotometricDistortion(probability=0.0))).draw(
        cases.batch(2)
    )
    assert picture.shape == (3, 64, 96)
    assert abs(picture[:, :32, :48].astype(int) - cases.batch(2).images[0].numpy()).max() <= 1


# ------------------------------------------------------------------------------------------------
# Where the encoder comes from


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """An encoder for images of 32 x 32 pixels with fixed positions, in the published layout."""
    tower = replace(encoder_like(cases.TOWER), image_size=32)
    module = ImageTransformer(tower)
    module.initialize(torch.Generator().manual_seed(9), "flip")
    state = to_timm(module.state_dict(), tower)
    state.setdefault("pos_embed", image_table(tower))
    file = tmp_path / "encoder.safetensors"
    save_file({**state, "decoder_embed.bias": torch.zeros(3)}, file)
    return file


def test_the_tower_starts_from_a_file_its_positions_brought_to_the_crop(official: Path) -> None:
    tower = replace(cases.TOWER, heads=1)  # a file says no heads: one per 64 channels
    recipe = cases.recipe(model=replace(cases.CONFIG, image=tower))
    objective = recipe.objective.build(recipe)
    before = copy.deepcopy(objective.model.state_dict())
    init_from(objective, official, interpolate=True, log=LOG)
    small = replace(encoder_like(tower), image_size=32)
    reference = ImageTransformer(small)
    reference.initialize(torch.Generator().manual_seed(9), "flip")
    table = image_table(small)
    patches = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    patches = F.interpolate(patches, (4, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    assert torch.allclose(objective.model.image.pos_embed, expected, atol=1e-6)
    for name, tensor in reference.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(objective.model.image.state_dict()[name], tensor)
    for name, tensor in objective.model.state_dict().items():
        assert name.startswith("image.") or torch.equal(tensor, before[name])


def test_without_an_encoder_or_with_what_is_none_a_sentence_says_so(
    official: Path, tmp_path: Path
) -> None:
    recipe = cases.recipe()
    recipe = replace(recipe, objective=Segmentation())
    objective = recipe.objective.build(recipe)
    with pytest.raises(InputError, match="needs an encoder: give a pretraining run"):
        init_from(objective, None, interpolate=True, log=LOG)
    other = tmp_path / "other.safetensors"
    save_file({"layer.weight": torch.zeros(3)}, other)
    with pytest.raises(InputError, match="not an image encoder"):
        init_from(objective, other, interpolate=True, log=LOG)
    wide = cases.recipe(model=replace(cases.CONFIG, image=replace(cases.TOWER, mlp_width=40)))
    with pytest.raises(InputError, match=r"mlp_width 32, but model\.image\.mlp_width is 40"):
        init_from(wide.objective.build(wide), official, interpolate=True, log=LOG)
    with pytest.raises(InputError, match="no file or folder"):
        init_from(objective, tmp_path / "nowhere.pth", interpolate=True, log=LOG)


# ------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("name", SEGMENTATION)
def test_recipes_are_those_of_the_published_comparison(name: str) -> None:
    recipe = SEGMENTATION[name]()
    assert recipe.model.taps[-1] == recipe.model.image.depth
    assert recipe.run.interpolate
    assert recipe.run.best == "segmentation_miou"
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    if name == "demo":
        return
    assert recipe.batch_size == 16
    assert recipe.steps == 160_000
    assert recipe.model.num_classes == 150
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.optimizer.weight_decay == 0.05
    rate, peak = recipe.schedule.learning_rate, recipe.optimizer.peak(16)
    assert rate(0, peak=peak) == pytest.approx(1e-6 * peak)
    assert rate(750 * 16, peak=peak) == pytest.approx(peak / 2, rel=1e-5)
    assert rate(1500 * 16, peak=peak) == peak
    half = (1500 + 160_000) // 2
    assert rate(half * 16, peak=peak) == pytest.approx(peak / 2)
    assert rate(159_999 * 16, peak=peak) == pytest.approx(peak / 158_500)


def test_taps_lie_at_thirds() -> None:
    assert even_taps(12) == (4, 6, 8, 12)
    assert even_taps(24) == (8, 12, 16, 24)
    assert even_taps(32) == (11, 16, 21, 32)


def test_a_warm_up_that_fills_the_run_never_falls() -> None:
    schedule = WarmupLinear(samples=10, warmup_samples=10)
    rates = [schedule.learning_rate(seen, peak=1.0) for seen in range(10)]
    assert rates == pytest.approx([seen / 10 for seen in range(10)])


def test_layer_decay_leaves_neck_and_heads_their_whole_rate() -> None:
    recipe = SEGMENTATION["vit-b16"]()
    with torch.device("meta"):
        model = Segmenter(recipe.model)
    objective = SegmentationObjective(model, recipe.objective, seed=0)
    scales = learning_rate_scales(objective, recipe.optimizer.layer_decay)
    assert scales["model.image.pos_embed"] == scales["model.image.patch_embed.bias"] == 0.65**13
    assert scales["model.image.blocks.0.norm1.weight"] == 0.65**12
    assert scales["model.image.blocks.11.mlp.fc2.bias"] == 0.65
    rest = {scale for name, scale in scales.items() if not name.startswith("model.image.")}
    assert rest == {1.0}


CONFIGS = {
    "four blocks": {"taps": (1, 2, 4)},
    "ascending": {"taps": (2, 1, 3, 4)},
    "counted from 1": {"taps": (0, 1, 2, 4)},
    "model.taps end at block 5": {"taps": (1, 2, 4, 5)},
    "num_classes is 1,": {"num_classes": 1},
    "num_classes is 254": {"num_classes": 254},
    "model.width is 0": {"width": 0},
    "auxiliary_width is 0": {"auxiliary_width": 0},
    "pool_scales": {"pool_scales": ()},
    "model.dropout is 1.0": {"dropout": 1.0},
    "too few for the coarsest": {"image": replace(cases.TOWER, image_size=(8, 48))},
}


@pytest.mark.parametrize("words", CONFIGS)
def test_models_that_cannot_be_are_refused(words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(cases.CONFIG, **CONFIGS[words])


def test_recipes_that_cannot_be_are_refused() -> None:
    recipe = cases.recipe()
    changes = {
        "leaves one picture at a time": {"batch_size": 1},
        "choose SegmentationData": {"data": ImageData(train=())},
        "needs a model with classes for pixels": {"model": ClassifierConfig(image=cases.TOWER)},
        "positions is 'sincos'": {"model": replace(cases.CONFIG, image=encoder_like(cases.TOWER))},
        "sees every patch": {
            "reduction": replace(recipe.reduction, image=RandomMasking(mask_ratio=0.5))
        },
        "engine.cache_chunk": {"engine": replace(recipe.engine, cache_chunk=2)},
        "choose one of them": {"run": replace(recipe.run, start_from=Path("x"))},
    }
    for words, change in changes.items():
        with pytest.raises(InputError, match=words):
            replace(recipe, **change)
