"""Tune a model of images and captions on pairs of your own, on one GPU or two cores.

``python -m frugal.common.tune MODEL --data.train SHARDS --evaluation.0.data HELD_OUT``: a recipe is
made for the model and the number of pairs, by the rules below; every flag of a recipe changes it,
and what it decides is in the log and in ``recipe.json``. What runs is an ordinary contrastive run,
which is continued, measured, exported and started from like any other. Behind it,
``python -m frugal.common.interpolate MODEL RUN`` gives back some of what was forgotten.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from frugal.common.cli import command_words, overridden, run_politely, without_local_rank
from frugal.common.data.config import PairData, StoredData
from frugal.common.data.patterns import find_files, is_stream
from frugal.common.data.sources import open_indexed
from frugal.common.data.tokenizers import TokenizerConfig
from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.distributed import launcher_ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.files import read_lines
from frugal.common.models.bundle import ModelBundle
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.vit import ImageTower
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe, Reductions, RunOptions
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import Truncate
from frugal.common.run import make_logger
from frugal.common.train import train_recipe
from frugal.common.weights.load import load_model

PROGRAM = "python -m frugal.common.tune"
BEST = "image_retrieval_recall_at_5"
"""Chooses the best checkpoint, where there are held-out pairs."""
_RATE, _BATCH, _WIDTH, _MOST = 2e-5, 256, 768, 1e-3
"""Peak of the learning rate at a batch and a width of the image tower, and at most."""
_LAYER_DECAY = 0.8
_EPOCHS = ((10_000, 10), (100_000, 5), (1_000_000, 2))
"""Up to how many pairs how many epochs; one beyond."""
_PATIENCE = 3
"""Epochs without a better number of held-out pairs after which tuning ends."""
_SMALLEST, _LARGEST = 64, 1_024
_BATCHES_OF_AN_EPOCH = 40
"""A batch is the largest power of two that leaves an epoch so many, within these bounds, and no
larger than the data."""


def batch_for(pairs: int) -> int:
    """The batch for a number of pairs: larger ones tell apart more, smaller ones step more."""
    wanted = max(pairs // _BATCHES_OF_AN_EPOCH, _SMALLEST)
    # none comes twice in a batch, which would tell it apart from itself
    wanted = max(min(wanted, pairs), 2)
    return min(1 << (wanted.bit_length() - 1), _LARGEST)


def epochs_for(pairs: int) -> int:
    """How often every pair is seen."""
    return next((epochs for most, epochs in _EPOCHS if pairs <= most), 1)


def rate_for(batch_size: int, width: int) -> float:
    """The peak of the learning rate: by the root of the batch, and less for wider models.

    A rule of ours. ``frugal.common.find_learning_rate`` looks what a model stands.
    """
    return min(_RATE * math.sqrt(batch_size / _BATCH) * (_WIDTH / width) ** 2, _MOST)


def recipe_for(
    bundle: ModelBundle,
    *,
    pairs: int,
    batch_size: int,
    held_out: bool,
    samples: int | None = None,
) -> Recipe:
    """The recipe for a model and a number of pairs.

    Args:
        bundle: two towers of this library's kind, whoever trained them.
        pairs: that there are.
        batch_size: of a step.
        held_out: whether there are pairs to choose the best checkpoint with.
        samples: to train on, where that is not for the rule to say.

    Raises:
        InputError: if the model cannot be trained here.
    """
    path, config, tokenizer = bundle.source.path, bundle.config, bundle.tokenizer_source
    if not isinstance(config, DualEncoderConfig) or not isinstance(tokenizer, TokenizerConfig):
        raise InputError(
            f"{path} holds no pair of towers that can be trained here ({bundle.source.library}: "
            f"{type(config).__name__}); give a model of images and captions of open_clip, OpenAI, "
            "transformers (CLIP) or of this library"
        )
    width = config.image.width if isinstance(config.image, ImageTower) else _WIDTH
    steps = max(-(-pairs // batch_size), 1)
    samples = samples or max(-(-epochs_for(pairs) * pairs // batch_size), 1) * batch_size
    return Recipe(
        model=config,
        data=PairData(
            train=(),
            tokenizer=tokenizer,
            augmentation=RandomResizedCrop(scale=(0.7, 1.0), flip=0.0, fallback="clamp"),
        ),
        reduction=Reductions(image=KeepAll(), text=Truncate()),
        # equal captions, which small data are full of, are strangers to the sigmoid loss alone
        objective=Contrastive()
        if config.initial_logit_bias is None
        else Contrastive(loss="sigmoid", positives="equal_captions"),
        optimizer=AdamW(
            learning_rate=rate_for(batch_size, width),
            betas=(0.9, 0.98),
            epsilon=1e-6,
            weight_decay=0.1,
            layer_decay=_LAYER_DECAY,
            no_decay=("bias", "norm", "position", "class_token", "logit_scale"),
            clip_norm=1.0,
        ),
        schedule=WarmupCosine(samples=samples, warmup_samples=samples // 10),
        batch_size=batch_size,
        run=RunOptions(
            start_from=path,
            best=BEST if held_out else None,
            patience=_PATIENCE if held_out else None,
            evaluate_every=steps,
            save_every=steps,
            log_every=max(steps // 10, 1),
        ),
        evaluation=(Retrieval(),),
    )


def count_pairs(data: StoredData) -> int:
    """Samples that a run would read in an epoch, damaged ones included.

    Raises:
        InputError: if there are none, or they cannot be counted.
    """
    if not data.train:
        raise InputError(
            "say what to tune on with --data.train, such as --data.train "
            "'path/to/{00000..00010}.tar'"
        )
    if stream := next((pattern for pattern in data.train if is_stream(pattern)), None):
        raise InputError(f"{stream} cannot be counted; copy its shards here")
    if data.subset is not None:
        found = sum(1 for line in read_lines(data.subset) if line)
    else:
        found = 0
        for path in (path for pattern in data.train for path in find_files(pattern)):
            found += open_indexed(path, data.sample_fields)[0].num_samples
    return min(found, data.max_samples or found)


def tuned_recipe(words: list[str]) -> Recipe:
    """The recipe that a command line asks for: a model, and flags of a recipe.

    Raises:
        InputError: if either cannot be used.
    """
    if not words or words[0].startswith("-"):
        raise InputError(
            "give the model to tune first: a run directory, or a folder of open_clip or "
            "transformers (CLIP), or a file of OpenAI's"
        )
    path, flags = Path(words[0]), words[1:]
    bundle = load_model(path)
    program = f"{PROGRAM} {path}"
    # once to see what the flags say of data and batch, once with what follows from that
    any_recipe = recipe_for(bundle, pairs=_SMALLEST, batch_size=_SMALLEST, held_out=False)
    assert isinstance(any_recipe.schedule, WarmupCosine)
    first = overridden(
        replace(any_recipe, schedule=replace(any_recipe.schedule, warmup_samples=0)),
        list(flags),
        program=program,
        about="What is not given is chosen for the number of pairs.",
    )
    if not isinstance(first.data, StoredData):
        raise InputError(
            f"--data is a {type(first.data).__name__}, which holds no pairs; leave it out"
        )
    pairs = count_pairs(first.data)
    given = {word.partition("=")[0].replace("_", "-") for word in flags}
    recipe = recipe_for(
        bundle,
        pairs=pairs,
        batch_size=first.batch_size if "--batch-size" in given else batch_for(pairs),
        samples=first.schedule.samples if "--schedule.samples" in given else None,
        held_out=first.evaluation[0].data is not None,
    )
    recipe = overridden(recipe, list(flags), program=program)
    folder = recipe.run.dir or Path("runs") / "tuned"
    recipe = replace(recipe, run=replace(recipe.run, dir=folder))
    _tell(recipe, pairs)
    return recipe


def _tell(recipe: Recipe, pairs: int) -> None:
    log = make_logger(launcher_ranks().rank)
    decay = recipe.optimizer.layer_decay if isinstance(recipe.optimizer, AdamW) else None
    log.info(
        "%s pairs: batches of %d, %.1f epochs, learning rate %.2g at its peak, %s",
        f"{pairs:,}",
        recipe.batch_size,
        recipe.schedule.samples / pairs,
        recipe.optimizer.peak(recipe.batch_size),
        "the same in all layers" if decay is None else f"{decay:g} times as much per layer down",
    )
    if recipe.evaluation and recipe.evaluation[0].data is None:
        log.warning(
            "nothing is held out, so that nobody will see when tuning does harm; give pairs that "
            "are not trained on as --evaluation.0.data"
        )


def main() -> None:
    """The body of ``python -m frugal.common.tune``."""
    run_politely(lambda: train_recipe(tuned_recipe(without_local_rank(command_words()))))


if __name__ == "__main__":
    main()
