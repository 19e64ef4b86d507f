"""What a run will take, before anything is trained: ``python -m frugal.common.plan RECIPE ...``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from frugal.common.cli import command_words, overridden, run_politely, without_local_rank
from frugal.common.plan.partition import Zero
from frugal.common.plan.report import (
    Cost,
    Plan,
    cost_of,
    facts,
    known_files,
    lines,
    memory_table,
    published_shares,
)
from frugal.common.programs import recipe_named, recipes_of
from frugal.common.ranges import Count, OpenShare, Positive, check_ranges
from frugal.common.run import make_logger

Gpu = Literal["h100-80", "h200-141", "a100-40", "a100-80", "l40s", "rtx4090"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parameters, memory, speed, communication and accuracy of a recipe, before it is trained.

    Flags of the recipe change it as they do in its entry script, such as --batch-size 4096 or
    --engine.checkpoint-activations. Every line says how its number is known.
    """

    recipe: tyro.conf.Positional[str]
    """PROGRAM:NAME, such as flip.train:large or milan.finetune:vit-b16 (flip:large is the same as
    flip.train:large); or a run directory or recipe.json. A PROGRAM alone is shown as a table of
    the time that each of its recipes takes."""
    gpus: Count = 8
    """Processes, one on each."""
    gpu: Gpu = "h100-80"
    deepspeed_config: Path | None = None
    """A file of ds_configs/; by default the recipe's, or none, which is Accelerate."""
    deepspeed_files: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Also show memory by part, and the largest micro-batch, for every DeepSpeed file of a folder,
    plain and with recomputed activations: ds_configs. Takes a minute."""
    share: OpenShare | None = None
    """Of the peak that is reached; by default the median of published runs, with their spread."""
    price: Positive | None = None
    """Of a GPU for an hour, in any currency."""
    text_tokens: Count | None = None
    """Mean tokens of a caption, for text towers that leave the padding out; by default the most
    that there may be."""

    def __post_init__(self) -> None:
        check_ranges(self)


def plan(options: Options, words: list[str]) -> None:
    """Print a plan."""
    make_logger(0)
    is_program = ":" not in options.recipe and not Path(options.recipe).exists()
    if is_program and not options.recipe.endswith(".json"):
        _print(table(options.recipe, gpus=options.gpus, gpu=options.gpu, share=options.share))
        return
    recipe, about = recipe_named(options.recipe)
    program = f"python -m frugal.common.plan {options.recipe}"
    recipe = overridden(recipe, words, program=program)
    config = options.deepspeed_config or recipe.engine.deepspeed_config
    zero = None if config is None else Zero.read(config)
    engine = replace(recipe.engine, deepspeed_config=config)
    recipe = replace(recipe, engine=engine)
    planned = Plan(
        recipe,
        gpus=options.gpus,
        gpu=options.gpu,
        text_tokens=options.text_tokens,
        share=options.share,
    )
    _ = planned.local_batch  # refuses what does not divide
    others = None if options.deepspeed_files is None else known_files(options.deepspeed_files)
    _print([f"{options.recipe} on {options.gpus} x {options.gpu}", ""])
    named = "Accelerate" if config is None else config.name
    for line in lines(planned, zero, engine=named, about=about, price=options.price):
        _print([f"{line.name:24}{line.text}  [{line.known}]"])
    if others is not None:
        _print(["", *memory_table(planned, others)])
        _print(["", "[a step on fake tensors; largest micro-batches are extrapolated from two]"])


def table(program: str, *, gpus: int, gpu: str, share: float | None = None) -> Iterator[str]:
    """The time of every recipe of a program but demos, as rows of a table; alike ones share one."""
    shares = sorted(published_shares().values())
    low, high = (share, share) if share else (shares[0], shares[-1])
    middle = share or shares[len(shares) // 2]
    yield f"| recipe | hours on {gpus} {gpu} | GPU-hours | FLOPs of whole samples |"
    yield "|---|---|---|---|"
    rows: dict[str, list[str]] = {}
    known: dict[str, Cost] = {}
    for name, make in recipes_of(program).items():
        if name.startswith("demo"):
            continue
        recipe = make()
        # recipes that differ in their length alone have the same towers
        key = str((recipe.model, recipe.objective, recipe.reduction))
        known[key] = known.get(key) or cost_of(recipe)
        cost = replace(known[key], samples=recipe.schedule.samples)
        hours = [cost.gpu_hours(gpu, one) for one in (high, middle, low)]
        spread = "" if low == high else f" ({_rounded(hours[0])} to {_rounded(hours[2])})"
        row = (
            f"{_rounded(hours[1] / gpus)} | {_rounded(hours[1])}{spread} | "
            f"{cost.flops / cost.dense_flops:.2f} |"
        )
        rows.setdefault(row, []).append(f"`{name}`")
    for row, names in rows.items():
        yield f"| {', '.join(names)} | {row}"


def _rounded(value: float) -> str:
    """Three digits at most."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _print(rows: Iterator[str] | list[str]) -> None:
    for row in rows:
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()


def main() -> None:
    """The body of ``python -m frugal.common.plan``."""

    def command() -> None:
        words = without_local_rank(command_words())
        options, rest = tyro.cli(
            Options, args=words, prog="python -m frugal.common.plan", return_unknown_args=True
        )
        assert options.gpu in facts()["gpus"]
        plan(options, rest)

    run_politely(command, alone=True)


if __name__ == "__main__":
    main()
