"""Writes small run directories of every method as the commit that is checked out writes them.

    python tests/golden/runs_before/make.py OUT     # from the root of the repository

Each run is interrupted: its newest checkpoint is that of step 2 of 4. ``final.safetensors`` holds
the weights that the uninterrupted run ended with.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from frugal.cit.recipes import demo as cit
from frugal.clipa.recipes import demo as clipa
from frugal.cluster_masking.recipes import demo as cluster_masking
from frugal.common.data.tokenizers import WordPiece
from frugal.common.recipe import EngineOptions, Recipe, RunOptions
from frugal.common.train import train_recipe
from frugal.flip.recipes import demo as flip
from frugal.milan.recipes import demo as milan
from frugal.milan.transfer_recipes import demo_fine_tuning

out = Path(sys.argv[1])
data = out / "data"
subprocess.run(
    [
        sys.executable,
        "-m",
        "frugal.common.scenes",
        "--out",
        str(data),
        "--image-size",
        "32",
        "--train-samples",
        "24",
        "--zero-shot-samples",
        "8",
        "--probe-samples",
        "16",
        "--retrieval-samples",
        "0",
        "--compositional-samples",
        "0",
        "--irrelevant",
        "0.5",
    ],
    check=True,
)
words = ["[PAD]", "[UNK]", "[CLS]", *"abcdefghijklmnopqrstuvwxyz.,"]
words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
(out / "vocab.txt").write_text("\n".join([*words, "red", "blue", "circle", "left", "of", ""]))


def small(recipe: Recipe, name: str, **parts: object) -> Recipe:
    image = replace(recipe.model.image, width=16, depth=1, heads=2, mlp_width=16)
    model = replace(recipe.model, image=image)
    changes = {"train": (str(data / "train"),)}
    if hasattr(recipe.model, "text"):
        text = replace(model.text, width=8, depth=1, heads=2, mlp_width=8, vocabulary=64)
        model = replace(model, text=text, embed_dim=8)
        changes["tokenizer"] = WordPiece(vocab=out / "vocab.txt")
    run = RunOptions(dir=out / name, log_every=1, save_every=2, picture_every=1000, keep=2)
    return replace(
        recipe,
        model=model,
        data=replace(recipe.data, **changes),
        run=run,
        batch_size=8,
        engine=EngineOptions(precision="float32", threads=1),
        evaluation=(),
        schedule=replace(recipe.schedule, samples=32, warmup_samples=8),
        **parts,
    )


recipes = {
    "flip": small(flip(), "flip"),
    "clipa": small(clipa(), "clipa"),
    "cluster_masking": small(cluster_masking(), "cluster_masking"),
}
made = cit()
metadata = replace(made.data.metadata, sources=(str(data / "zero_shot/classnames.txt"),))
pool = replace(made.data, metadata=metadata, period=1, scan=2, min_ratio=0.5)
recipes["cit"] = small(replace(made, data=pool), "cit")
made = milan()
decoder = replace(made.model.decoder, width=8, depth=1, heads=2)
teacher = replace(made.objective.teacher, source=out / "flip")
recipes["milan"] = small(
    replace(made, model=replace(made.model, decoder=decoder)),
    "milan",
    objective=replace(made.objective, teacher=teacher),
)
made = demo_fine_tuning()
recipes["milan_finetune"] = small(made, "milan_finetune")
recipes["milan_finetune"] = replace(
    recipes["milan_finetune"],
    data=replace(recipes["milan_finetune"].data, train=(str(data / "zero_shot/train"),)),
    run=replace(recipes["milan_finetune"].run, best=None, start_from=out / "milan"),
)
if len(sys.argv) > 2:
    name = sys.argv[2]
    train_recipe(recipes[name])
    run = out / name
    last = sorted((run / "checkpoints").glob("step_*"))
    weights = {}
    for file in last[-1].glob("*.safetensors"):
        weights |= {k: v for k, v in load_file(file).items() if k.startswith("weight/")}
    save_file(weights, run / "final.safetensors")
    shutil.rmtree(last[-1])
    (run / "checkpoints/latest").write_text(last[0].name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    for file in sorted((run / "curation").glob("*.parquet"))[2:]:
        file.unlink()
    shutil.rmtree(run / "tensorboard")
    sys.exit()
for name in recipes:
    subprocess.run([sys.executable, __file__, str(out), name], check=True)
