"""Named runs of Cluster Masking (arXiv:2405.08815) and of CLIP-PGS (arXiv:2503.17080).

ViT-B/16 on CC12M, ablations, a larger one; CLIP-PGS, which builds on it, has a recipe of its own.
The published code counts 10,968,539 samples to an epoch and rounds each up to whole batches of 8
loader processes on every GPU. It searched no threshold, although it was meant to; ours do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pgs import PgsMasking
from frugal.common.data.config import PairData
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.demo import scenes_recipe, small_encoder
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.named import clip_encoder
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions, RunOptions
from frugal.common.reduction.image import ImageReduction
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.reduction.text import Truncate

BATCH_SIZE = 8 * 256
STEPS_PER_EPOCH = 5_360
"""10,968,539 samples over 8 GPUs of 8 loader processes, each with whole batches of 256."""
EPOCHS = 32
WARMUP_STEPS = 2_000
LEARNING_RATE = 5e-4


def _published(
    masking: ImageReduction,
    *,
    size: str = "B/16",
    batch_size: int = BATCH_SIZE,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    warmup_steps: int = WARMUP_STEPS,
    learning_rate: float = LEARNING_RATE,
) -> Recipe:
    """32 epochs of CC12M, without more at a batch of 2,048.

    The published runs multiplied in float16; ours take bfloat16 where there is hardware for it
    (``--engine.precision float16`` does as they did). Captions are computed without their padding,
    which no number depends on.
    """
    model = clip_encoder(size)
    return Recipe(
        model=replace(model, text=replace(model.text, packed=True)),
        data=PairData(
            train=(),
            tokenizer=ClipBpe(),
            augmentation=RandomResizedCrop(scale=(0.9, 1.0), flip=0.0, fallback="clamp"),
            workers=8,
        ),
        reduction=Reductions(image=masking, text=Truncate()),
        objective=Contrastive(),
        optimizer=AdamW(
            learning_rate=learning_rate,
            betas=(0.9, 0.98),
            epsilon=1e-6,
            weight_decay=0.2,
            # matrices decay, position tables among them; the class token is none, but ours is kept
            # in three dimensions
            no_decay=("vector", "class_token"),
        ),
        schedule=WarmupCosine(
            samples=EPOCHS * steps_per_epoch * batch_size,
            warmup_samples=warmup_steps * batch_size,
            start=learning_rate / warmup_steps,
        ),
        batch_size=batch_size,
        run=RunOptions(evaluate_every=2 * steps_per_epoch),
        evaluation=(ZeroShot(templates="imagenet_80"), Retrieval()),
    )


def vit_b16_cc12m() -> Recipe:
    """ViT-B/16 on CC12M, half of the patches removed in clusters: the published run."""
    return _published(ClusterMasking())


def vit_l16_cc12m() -> Recipe:
    """ViT-L/16 on CC12M with everything else as in ``vit-b16-cc12m``; no published run."""
    return _published(ClusterMasking(), size="L/16")


def vit_b16_cc12m_random() -> Recipe:
    """The baseline of ``vit-b16-cc12m``: half of the patches removed at random, as FLIP does."""
    return _published(RandomMasking(mask_ratio=0.5))


def vit_b16_cc12m_embeddings() -> Recipe:
    """``vit-b16-cc12m`` with the similarity of patch embeddings mixed in as training goes on."""
    return _published(ClusterMasking(use_embeddings=True))


def _with_anchors(share: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return _published(ClusterMasking(anchor_ratio=share))

    recipe.__doc__ = f"``vit-b16-cc12m`` with {share:.0%} of the patches as anchors, not 3 %."
    return recipe


def _with_threshold(threshold: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return _published(ClusterMasking(threshold=threshold, target_mask_ratio=None))

    recipe.__doc__ = f"``vit-b16-cc12m`` at a threshold of {threshold:g}, whatever it masks."
    return recipe


def _with_minimum(share: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return _published(ClusterMasking(min_mask_ratio=share))

    recipe.__doc__ = (
        f"``vit-b16-cc12m`` where at least {share:.0%} of every image is masked, not 30 %."
    )
    return recipe


# ------------------------------------------------------------------------------------------------
# CLIP-PGS (arXiv:2503.17080)


def _of_pgs(masking: ImageReduction) -> Recipe:
    """The recipe of the released scripts: a larger batch, rate and warm-up than cluster masking."""
    return _published(
        masking,
        batch_size=8 * 512,
        steps_per_epoch=2_680,
        warmup_steps=10_000,
        learning_rate=1e-3,
    )


def _pgs(share: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return _of_pgs(PgsMasking(min_mask_ratio=share))

    recipe.__doc__ = (
        f"CLIP-PGS as it is meant: seeds off edges, at least {share:.0%} of every image masked."
    )
    return recipe


def _pgs_published(share: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        masking = PgsMasking(
            min_mask_ratio=share, seeds="published", edge_border="zero",
            transport="published", use_embeddings=True,
        )  # fmt: skip
        return _of_pgs(masking)

    recipe.__doc__ = (
        f"``pgs-{share:g}`` as the released code computes it: seeds by rounding noise, a transport "
        "that does not converge, embeddings mixed in."
    )
    return recipe


def _pgs_clusters(share: float) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        masking = ClusterMasking(
            anchor_ratio=0.05, threshold=0.5, target_mask_ratio=None, min_mask_ratio=share
        )
        return _of_pgs(masking)

    recipe.__doc__ = (
        f"What ``pgs-{share:g}`` is to be compared with: cluster masking with as many anchors, the "
        "same threshold and the same recipe."
    )
    return recipe


# ------------------------------------------------------------------------------------------------
# A small model for two cores


def demo() -> Recipe:
    """A small CLIP on the scenes data set, half of the patches removed in clusters; minutes."""
    model = small_encoder(patch_size=4, image_size=32, text_length=24)
    return scenes_recipe(model, image=ClusterMasking())


def demo_random() -> Recipe:
    """``demo`` with half of the patches removed at random."""
    clusters = demo()
    return replace(
        clusters, reduction=replace(clusters.reduction, image=RandomMasking(mask_ratio=0.5))
    )


def demo_pgs() -> Recipe:
    """``demo`` with clusters that grow around patches on no edge, as CLIP-PGS has them."""
    clusters = demo()
    masking = PgsMasking(threshold=None, target_mask_ratio=0.5, min_mask_ratio=0.3)
    return replace(clusters, reduction=replace(clusters.reduction, image=masking))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "demo-random": demo_random,
    "demo-pgs": demo_pgs,
    "vit-b16-cc12m": vit_b16_cc12m,
    "vit-l16-cc12m": vit_l16_cc12m,
    "vit-b16-cc12m-random": vit_b16_cc12m_random,
    "vit-b16-cc12m-embeddings": vit_b16_cc12m_embeddings,
    **{f"vit-b16-cc12m-anchors{100 * s:.0f}": _with_anchors(s) for s in (0.01, 0.05, 0.1)},
    **{
        f"vit-b16-cc12m-threshold{100 * t:.0f}": _with_threshold(t)
        for t in (0.3, 0.4, 0.5, 0.6, 0.7)
    },
    **{f"vit-b16-cc12m-min{100 * s:.0f}": _with_minimum(s) for s in (0.0, 0.15, 0.4, 0.5)},
    **{f"pgs-{s:g}": _pgs(s) for s in (0.5, 0.3)},
    **{f"pgs-{s:g}-published": _pgs_published(s) for s in (0.5, 0.3)},
    **{f"pgs-{s:g}-clusters": _pgs_clusters(s) for s in (0.5, 0.3)},
}
