"""Small policies together, on every method: docs/policies.md."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from frugal.common.recipe_json import load_recipe
from support import ALONE, DDP, TINY, largest_difference, losses, newest, saved_tensors, train

OF_EVERY_METHOD = (
    "--data.max-samples=100", "--schedule.cooldown-samples=48",
    "--schedule=frugal.common.optim.schedules.WarmupConstantCooldown",
)  # fmt: skip
OF_PAIRS = (
    *OF_EVERY_METHOD,
    "--reduction.image=frugal.cluster_masking.pgs.PgsMasking",
    "--reduction.text=frugal.clipa.sub_captions.SubCaption",
    "--objective.positives=equal_captions",
    "--objective.token-loss=0.5",
)


@dataclass(frozen=True)
class Method:
    """Four steps of a demo."""

    module: str
    words: tuple[str, ...] = OF_PAIRS
    small: tuple[str, ...] = TINY
    recipe: str = "demo"

    def train(self, launcher: object, run: Path, scenes: Path, *words: str) -> str:
        given = [word.format(scenes=scenes) for word in self.words]
        return train(
            launcher, run, f"--data.train={scenes / 'train'}", "--schedule.samples=96",  # type: ignore[arg-type]
            "--schedule.warmup-samples=24", "--run.save-every=2", "--run.keep=9", *given, *words,
            module=self.module, small=self.small, recipe=self.recipe,
        )  # fmt: skip


METHODS = {
    "flip": Method("frugal.flip.train"),
    "clipa": Method("frugal.clipa.train"),
    "cluster masking": Method("frugal.cluster_masking.train"),
    "cit": Method(
        "frugal.cit.train",
        (
            *OF_PAIRS, "--data.metadata.sources={scenes}/zero_shot/classnames.txt",
            "--data.period=1", "--data.scan=10", "--data.threshold=0.999", "--data.min-ratio=0.25",
        ),
    ),
    # reads no captions, and its decoder needs equally many patches of every image
    "milan": Method(
        "frugal.milan.pretrain",
        OF_EVERY_METHOD,
        small=(
            "--model.image.width=32", "--model.image.depth=1", "--model.image.heads=2",
            "--model.image.mlp-width=64", "--model.decoder.width=16", "--model.decoder.heads=2",
            "--data.workers=0", "--engine.precision=float32", "--run.log-every=1",
            "--batch-size=24",
        ),
        recipe="demo-pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_all_that_go_with_a_method_go_together(
    method: Method, scenes: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    method.train(ALONE, one, scenes)
    method.train(DDP, two, scenes)
    assert list(losses(one)) == [1, 2, 3, 4]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    whole = saved_tensors(one)
    shutil.rmtree(newest(one))
    assert "from step 2 of 4" in method.train(ALONE, one, scenes)
    kinds = ("weight", "exp_avg", "buffer")
    assert largest_difference(saved_tensors(one), whole, kinds) == 0.0
    counted = {name: tensor for name, tensor in whole.items() if ".with_token" in name}
    assert bool(counted) == ("--objective.token-loss=0.5" in method.words)
    for name, tensor in counted.items():
        assert torch.equal(tensor, saved_tensors(two)[name]) and tensor.any()
    recipe = load_recipe(one / "recipe.json")
    assert type(recipe.schedule).__name__ == "WarmupConstantCooldown"
    assert recipe.data.max_samples == 100  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (OF_PAIRS[3:4], "keeps another number of patches of every image"),
        (OF_PAIRS[4:5], "reads no captions"),
        (OF_PAIRS[5:6], "there is no --objective.positives in this recipe"),
    ],
)
def test_what_does_not_go_with_milan_is_said(
    words: Sequence[str], sentence: str, scenes: Path, tmp_path: Path
) -> None:
    method = METHODS["milan"]
    said = train(
        ALONE, tmp_path / "run", f"--data.train={scenes / 'train'}", *words,
        module=method.module, small=method.small, recipe=method.recipe, expect=2,
    )  # fmt: skip
    assert sentence in said and not (tmp_path / "run").exists()
