"""FLIP as a plain loop of PyTorch: ``python examples/flip_in_one_file.py SHARDS OUT``.

The recipe, data, towers and loss of ``frugal.flip``, without its entry script, checkpoints and
engines: to read, to change, and to take parts from. OUT is written for open_clip.
"""

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from frugal.common import save_model
from frugal.common.run import open_run
from frugal.common.weights.runs import bundle_of
from frugal.flip.recipes import demo

shards, out = sys.argv[1:]
recipe = demo()
recipe = replace(
    recipe,
    data=replace(recipe.data, train=(shards,)),
    schedule=replace(recipe.schedule, samples=20 * 64, warmup_samples=5 * 64),
    batch_size=64,
)
run = open_run(Path(out), "cpu")
objective = recipe.objective.build(recipe)  # both towers, the masking and the contrastive loss
optimizer = recipe.optimizer.build(objective)
stream = recipe.data.build(recipe, run, first_sample=0, state={}, engine=None)
for step, batch in enumerate(islice(stream, recipe.steps)):
    rate = recipe.schedule.learning_rate(step * 64, peak=recipe.optimizer.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    loss, metrics = objective(batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), recipe.optimizer.clip_norm)
    optimizer.step()
    print(f"step {step + 1}: loss {loss:.4f}, {metrics['image_tokens']:.0f} image tokens")
save_model(bundle_of(objective.model, recipe), Path(out), to="open_clip")
