"""Every way for a trained model to leave, by the name that the command line has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from frugal.common.weights import (
    beit_folder,
    dual_encoder_folder,
    open_clip_folder,
    run_directory,
    timm_folder,
    transformers_folder,
    upernet_folder,
    vit_folder,
    vit_mae_folder,
)
from frugal.common.weights.trained import Misfit, TrainedModel, TrainedRun, TrainedTower
from frugal.common.weights.transformers_tokenizer import differences


@dataclass(frozen=True)
class Target:
    """One way for a trained model to leave."""

    usage: str
    """How to load FOLDER, in Markdown."""
    misfit: Callable[[], Misfit | None]
    """The first option of the model that the library has no place for."""
    write: Callable[[Path], None]
    """Fills an empty folder."""
    difference: Callable[[Path], float]
    """The largest one between what the library reads out of the folder and the model."""
    is_whole: bool = True
    """A text tower is not left behind."""


def targets(trained: TrainedRun) -> dict[str, Target]:
    """Every way for this kind of model to leave, by the name on the command line."""
    own = Target(
        usage=run_directory.USAGE if trained.reads_captions else run_directory.USAGE_OF_A_TOWER,
        misfit=lambda: None,
        write=lambda folder: run_directory.write(trained, folder),
        difference=lambda folder: run_directory.difference(trained, folder),
    )
    if isinstance(trained, TrainedModel):
        return {"frugal": own} | _targets_of_two_towers(trained)
    if isinstance(trained, TrainedTower):
        return {"frugal": own} | _targets_of_a_tower(trained)
    return {"frugal": own}


def _targets_of_two_towers(trained: TrainedModel) -> dict[str, Target]:
    is_own = trained.has_own_towers
    timm = {"timm": replace(_timm(trained.image), is_whole=False)} if is_own.image else {}
    mixed = Target(
        usage=_with_differences(dual_encoder_folder.USAGE, trained),
        misfit=lambda: dual_encoder_folder.misfit(trained),
        write=lambda folder: dual_encoder_folder.write(trained, folder),
        difference=lambda folder: trained.difference(dual_encoder_folder.embed, folder),
    )
    if not all(is_own):
        return {"huggingface": mixed, **timm}
    clip = Target(
        usage=_with_differences(transformers_folder.USAGE, trained),
        misfit=lambda: transformers_folder.misfit(trained),
        write=lambda folder: transformers_folder.write(trained, folder),
        difference=lambda folder: trained.difference(transformers_folder.embed, folder),
    )
    return {
        "open_clip": Target(
            usage=open_clip_folder.usage(trained),
            misfit=lambda: open_clip_folder.misfit(trained),
            write=lambda folder: open_clip_folder.write(trained, folder),
            difference=lambda folder: trained.difference(open_clip_folder.embed, folder),
        ),
        # not every image tower is CLIP's, and transformers joins others to CLIP's text tower
        "huggingface": mixed if clip.misfit() and not mixed.misfit() else clip,
        **timm,
    }


def _with_differences(usage: str, trained: TrainedModel) -> str:
    return f"{usage.rstrip()}\n\n{differences(trained.tokenizer)}".rstrip()


def _targets_of_a_tower(trained: TrainedTower) -> dict[str, Target]:
    has_head = trained.head is not None
    plain = Target(
        usage=vit_folder.CLASSIFIER_USAGE if has_head else vit_folder.USAGE,
        misfit=lambda: vit_folder.misfit(trained),
        write=lambda folder: vit_folder.write(trained, folder),
        difference=lambda folder: trained.difference(vit_folder.see, folder),
    )
    beit = Target(
        usage=vit_folder.CLASSIFIER_USAGE if has_head else beit_folder.usage(trained.tower),
        misfit=lambda: beit_folder.misfit(trained),
        write=lambda folder: beit_folder.write(trained, folder),
        difference=lambda folder: trained.difference(vit_folder.see, folder),
    )
    segmenter = Target(
        usage=upernet_folder.USAGE,
        misfit=lambda: upernet_folder.misfit(trained),
        write=lambda folder: upernet_folder.write(trained, folder),
        difference=lambda folder: upernet_folder.difference(trained, folder),
    )
    if upernet_folder.is_segmenter(trained):
        best = segmenter
    else:
        best = beit if plain.misfit() and not beit.misfit() else plain
    return {
        "huggingface": best,
        "huggingface_beit": beit,
        "huggingface_mae": Target(
            usage=vit_mae_folder.USAGE,
            misfit=lambda: vit_mae_folder.misfit(trained),
            write=lambda folder: vit_mae_folder.write(trained, folder),
            difference=lambda folder: vit_mae_folder.difference(trained, folder),
        ),
        "timm": _timm(trained),
    }


def _timm(tower: TrainedTower) -> Target:
    return Target(
        usage=timm_folder.USAGE,
        misfit=lambda: timm_folder.misfit(tower),
        write=lambda folder: timm_folder.write(tower, folder),
        difference=lambda folder: tower.difference(timm_folder.see, folder),
    )
