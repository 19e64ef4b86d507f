"""CiT's named runs (arXiv:2301.02241): pools of YFCC, ImageNet's names or those of 26 tasks.

Published runs trained in float16 with loss scaling; ours take bfloat16 where there is hardware for
it (``--engine.precision float16`` does as they did). Their processes each curated for themselves;
here one curation serves the whole batch, and is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugal.cit.curated_data import CuratedData
from frugal.cit.metadata import ALL, Metadata
from frugal.cit.objective import LockedContrastive
from frugal.common.data.samples import Fields
from frugal.common.data.tokenizers import HuggingFace
from frugal.common.data.transforms import CenterCrop, RandomResizedCrop
from frugal.common.demo import scenes_recipe, small_encoder
from frugal.common.evaluation.suites import metric_of
from frugal.common.evaluation.task_labels import TASKS
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import image_tower
from frugal.common.models.pretrained import PretrainedDualEncoderConfig, TransformersText
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive_loss import BOTH
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions, RunOptions, model_of
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate

UPDATES = 5_000
BATCH_SIZE = 16 * 1_024
ONE_GPU = 1_536
"""Pairs of a batch on one GPU, as in the published runs on single tasks."""
YFCC = Fields(caption=("json.title", "json.desc", "json.tag"), separate=True)
"""As ``frugal.cit.yfcc`` writes them."""
_CROP = CenterCrop(share=0.875, interpolation="bilinear")


_HALF = (0.5, 0.5, 0.5)


def moco_tower(name: str = "B/16", **options: Any) -> ImageTower:
    """MoCo v3's vision transformer with its projector, whose 256 numbers are what is pooled.

    Source: Chen et al., arXiv:2104.02057. The position table is that of the file, so that a run
    gives the file back bit for bit.
    """
    return image_tower(name, **{"projector_width": 4096, **options})


def augreg_tower(name: str = "B/32", **options: Any) -> ImageTower:
    """The vision transformers of Steiner et al., arXiv:2106.10270: B/32, B/16 and L/16."""
    return image_tower(name, **{"mean": _HALF, "std": _HALF, **options})


def swag_tower(name: str = "B/16", **options: Any) -> ImageTower:
    """The vision transformers of Singh et al., arXiv:2201.08371: B/16, L/16 and H/14."""
    return image_tower(name, **options)


def dual_encoder(image: Any, text: Any = None) -> PretrainedDualEncoderConfig:
    """An image tower beside SimCSE's BERT (or another text tower), meeting in 512 dimensions."""
    return PretrainedDualEncoderConfig(image=image, text=text or TransformersText())


def published_optimizer(**options: Any) -> AdamW:
    """AdamW with its three groups: projections 1.0, matrices and tables 0.2, vectors 0.

    The published runs decay the logit scale too and never clamp it: that is
    ``no_decay=("bias", "norm")`` here, and ``clamp="never"`` of the objective.
    """
    settings: dict[str, Any] = {
        "learning_rate": 5e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.2,
        "projection_weight_decay": 1.0,
        "no_decay": ("vector",),
    }
    return AdamW(**{**settings, **options})


def published_schedule(updates: int, batch_size: int) -> WarmupCosine:
    """Warm-up over a 25th of the updates from 0, then half a cosine down to 1e-5."""
    return WarmupCosine(
        samples=updates * batch_size,
        warmup_samples=updates // 25 * batch_size,
        floor=1e-5,
    )


def _yfcc15m(**options: object) -> CuratedData:
    """The pool of 15 million: everything once, above 0.55, at least 0.3 % of every unit."""
    data = CuratedData(
        train=(),
        tokenizer=HuggingFace(name="google-bert/bert-base-uncased"),
        augmentation=RandomResizedCrop(
            scale=(0.5, 1.0), flip=0.0, fallback="clamp", interpolation="bilinear"
        ),
        fields=YFCC,
        tags=("json.tag",),
        workers=6,
        min_ratio=0.003,
    )
    return replace(data, **options)  # type: ignore[arg-type]


def _published(
    data: CuratedData, *, batch_size: int, evaluation: ZeroShot, best: str = "zero_shot_top1"
) -> Recipe:
    """5,000 updates of MoCo v3's ViT-B/16 with a trained projector, and SimCSE's BERT."""
    return Recipe(
        model=dual_encoder(moco_tower("B/16")),
        data=data,
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        objective=LockedContrastive(image_weights="vit-b-300ep.pth.tar"),
        optimizer=published_optimizer(),
        schedule=published_schedule(UPDATES, batch_size),
        batch_size=batch_size,
        run=RunOptions(evaluate_every=500, best=best, save_every=500),
        evaluation=(evaluation,),
    )


# ------------------------------------------------------------------------------------------------
# ImageNet-1k


def yfcc15m_in1k_moco_b16() -> Recipe:
    """MoCo v3 ViT-B/16 on YFCC15M for ImageNet-1k: the published run, 16 GPUs."""
    return _published(
        _yfcc15m(), batch_size=BATCH_SIZE, evaluation=ZeroShot(templates="imagenet_9", crop=_CROP)
    )


def yfcc100m_in1k_moco_b16() -> Recipe:
    """``yfcc15m-in1k-moco-b16`` on all of YFCC100M, above 0.7 or the nearest 1 %: published."""
    recipe = yfcc15m_in1k_moco_b16()
    data = _yfcc15m(threshold=0.7, min_ratio=0.01, keep="list")
    return replace(recipe, data=data)


def _on_one_gpu(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        large = make()
        return replace(
            large,
            data=replace(large.data, scan=2 * ONE_GPU),  # type: ignore[type-var]
            schedule=published_schedule(UPDATES, ONE_GPU),
            batch_size=ONE_GPU,
        )

    name = make.__name__.replace("_", "-")
    recipe.__doc__ = f"``{name}`` with a batch of {ONE_GPU:,} for a single GPU; no published run."
    return recipe


def _with_tower(tower: ImageTower, file: str, name: str) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        moco = yfcc15m_in1k_moco_b16()
        return replace(
            moco,
            model=dual_encoder(tower),
            objective=LockedContrastive(train_image="none", image_weights=file),
        )

    recipe.__doc__ = f"``yfcc15m-in1k-moco-b16`` with a frozen {name}, as the paper also has it."
    return recipe


# ------------------------------------------------------------------------------------------------
# One of the 26 tasks, or all of them


def _for_task(task: str) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        data = _yfcc15m(
            metadata=Metadata(sources=(task,)),
            threshold=0.45,
            min_ratio=0.05,
            keep="list",
            scan=2 * ONE_GPU,
        )
        evaluation = ZeroShot(class_names=task, templates=task, metric=metric_of(task), crop=_CROP)
        return _published(data, batch_size=ONE_GPU, evaluation=evaluation, best="zero_shot_score")

    recipe.__doc__ = f"One GPU, YFCC15M for {task} alone, the nearest 5 % at least: published."
    return recipe


def yfcc15m_all_moco_b16() -> Recipe:
    """``yfcc15m-in1k-moco-b16`` for the 3,422 names of all 26 tasks together."""
    recipe = yfcc15m_in1k_moco_b16()
    data = _yfcc15m(metadata=Metadata(sources=(ALL,), flatten=True))
    return replace(recipe, data=data)


# ------------------------------------------------------------------------------------------------
# A small model for two cores


def demo() -> Recipe:
    """A small CLIP that picks its pairs from scenes of which four in five are irrelevant; minutes.

    Its image tower is that of FLIP's demo: ``--objective.image-weights`` takes such a run, with
    ``--objective.train-image none`` to leave it as it is. Otherwise it is trained from scratch.
    """
    scenes = scenes_recipe(
        small_encoder(patch_size=8, image_size=32, text_length=24), image=KeepAll()
    )
    pool = "data/scenes_pool"
    data = CuratedData(
        train=(f"{pool}/train",),
        tokenizer=scenes.data.tokenizer,  # type: ignore[attr-defined]
        augmentation=scenes.data.augmentation,  # type: ignore[attr-defined]
        workers=0,  # two training processes keep two cores busy
        metadata=Metadata(
            sources=(f"{pool}/zero_shot/classnames.txt",),
            templates=("a {c}", "a picture of a {c}", "there is a {c}"),
        ),
        period=20,
        threshold=1.0,  # the features of a tower from scratch are all alike: the share decides
        min_ratio=0.15,
        scan=512,
    )
    return replace(
        scenes,
        data=data,
        objective=LockedContrastive(train_image="all"),
        schedule=WarmupCosine(samples=120_000, warmup_samples=6_000),
    )


def demo_milan() -> Recipe:
    """``demo`` on top of an encoder of MILAN's demo; give its run with --objective.image-weights.

    The encoder stays as it is.
    """
    recipe = demo()
    image = image_tower(
        "S/8", image_size=32, width=128, depth=4, heads=4, mlp_width=512, positions="sincos"
    )
    return replace(
        recipe,
        model=replace(model_of(DualEncoderConfig, recipe.model), image=image),
        objective=LockedContrastive(train_image="none", image_weights="runs/milan-demo"),
    )


def demo_stored() -> Recipe:
    """``demo`` on stored vectors of FLIP's demo, whose tower stays as it is.

    Store them first: ``python -m frugal.common.embed --checkpoint runs/flip-demo --output pooled
    --data data/scenes_pool/train --out data/scenes_pool_vectors``.
    """
    recipe = demo()
    data: Any = recipe.data
    return replace(
        recipe,
        data=replace(data, stored=Path("data/scenes_pool_vectors")),
        objective=LockedContrastive(train_image="none", image_weights="runs/flip-demo"),
    )


def demo_lit() -> Recipe:
    """Locked-image tuning (LiT): ``demo-stored`` on all pairs of the scenes, in both directions.

    Store them first, as for ``demo-stored``, with ``--data data/scenes/train --out
    data/scenes_vectors``.
    """
    recipe = scenes_recipe(
        small_encoder(patch_size=8, image_size=32, text_length=24), image=KeepAll()
    )
    objective = LockedContrastive(
        directions=BOTH, train_image="none", image_weights="runs/flip-demo"
    )
    data: Any = recipe.data
    data = replace(data, stored=Path("data/scenes_vectors"))
    return replace(recipe, data=data, objective=objective)


def demo_align() -> Recipe:
    """Both towers of FLIP's demo stored, and new heads alone trained, on all pairs of the scenes.

    Store them first: ``python -m frugal.common.embed --checkpoint runs/flip-demo --texts --output
    pooled --data data/scenes/train --out data/scenes_both_vectors``. As SAIL does it with towers
    that were trained apart (arXiv:2412.04616); ``--model.head-width`` makes a head of two layers.
    """
    recipe = demo_lit()
    data: Any = recipe.data
    stored = Path("data/scenes_both_vectors")
    return replace(
        recipe,
        data=replace(data, stored=stored, stored_texts=stored),
        objective=replace(
            recipe.objective,  # type: ignore[type-var]
            train_text="none",
            text_weights="runs/flip-demo",
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "demo-stored": demo_stored,
    "demo-lit": demo_lit,
    "demo-align": demo_align,
    "demo-milan": demo_milan,
    "yfcc15m-in1k-moco-b16": yfcc15m_in1k_moco_b16,
    "yfcc100m-in1k-moco-b16": yfcc100m_in1k_moco_b16,
    "yfcc15m-in1k-moco-b16-one-gpu": _on_one_gpu(yfcc15m_in1k_moco_b16),
    "yfcc100m-in1k-moco-b16-one-gpu": _on_one_gpu(yfcc100m_in1k_moco_b16),
    "yfcc15m-all-moco-b16": yfcc15m_all_moco_b16,
    **{
        f"yfcc15m-in1k-{source}-{size[0].lower()}{size[2:]}": _with_tower(
            tower(size), file.format(size=size[0].lower(), patch=size[2:]), f"{name} ViT-{size}"
        )
        for source, tower, name, file, sizes in (
            ("augreg", augreg_tower, "AugReg", "vit_{size}_patch{patch}.npz", ("B/32", "B/16")),
            ("swag", swag_tower, "SWAG", "vit_{size}{patch}.torch", ("B/16", "L/16", "H/14")),
        )
        for size in sizes
    },
    **{f"yfcc15m-{task.replace('_', '-')}-moco-b16": _for_task(task) for task in TASKS},
}
