"""What every training script calls: build the parts in the order data flows, then run the loop."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal.common.cli import Recipes, read_command_line, run_politely
from frugal.common.contracts import Batch, Objective
from frugal.common.distributed import (
    Ranks,
    barrier,
    gather_objects,
    init_process_group,
    launcher_ranks,
    resolve_ranks,
)
from frugal.common.errors import InputError
from frugal.common.files import raise_open_files_limit, read_json_object, write_json
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.recipe import (
    Recipe,
    difference,
    from_json,
    load_recipe,
    to_json,
    with_calibrated,
)
from frugal.common.run import Run, lock_run_dir, make_logger
from frugal.common.weights.runs import bundle_of, write_description

if TYPE_CHECKING:
    from io import TextIOWrapper

    import torch

    from frugal.common.checkpoint.store import Checkpoint, CheckpointStore
    from frugal.common.contracts import EvaluationTask
    from frugal.common.engine.engine import Engine
    from frugal.common.engine.logger import MetricsLogger
    from frugal.common.engine.saving import WeightAverage


def main(recipes: Recipes, *, method: str, script: str = "train") -> None:
    """The body of ``python -m frugal.<method>.<script>``."""

    def command() -> None:
        name, recipe = read_command_line(recipes, program=f"python -m frugal.{method}.{script}")
        words = (method, name) if script == "train" else (method, script, name)
        folder = recipe.run.dir or Path("runs") / "-".join(words)
        train_recipe(replace(recipe, run=replace(recipe.run, dir=folder)))

    run_politely(command)


def train_recipe(recipe: Recipe) -> None:
    """Train a recipe to its end, from the start or from where its run directory left off.

    Raises:
        InputError: if the recipe, the data or the run directory cannot be used.
        RunStopped: if the run ended early for a reason that is no bug.
    """
    assert recipe.run.dir is not None
    make_logger(launcher_ranks().rank)
    recipe = _check_run_dir(recipe)
    from frugal.common.checkpoint.init_from import init_from
    from frugal.common.checkpoint.store import CheckpointStore
    from frugal.common.data.contents import keep_contents
    from frugal.common.data.damage import DamageCounter
    from frugal.common.engine.logger import MetricsLogger
    from frugal.common.engine.loop import Training, measure_what_was_missed, train
    from frugal.common.engine.rehearsal import rehearse
    from frugal.common.engine.saving import WeightAverage, restore

    run = open_run(recipe)
    recipe.local_batch(run.world_size)  # refuse before anything is written
    _check_strangers(recipe)
    store = CheckpointStore(run, keep=recipe.run.keep)
    objective = recipe.objective.build(recipe)
    if not store.whole():
        source, interpolate = recipe.run.start_from, recipe.run.interpolate
        init_from(objective, source, interpolate=interpolate, log=run.log)
    _check_best(recipe)
    engine = make_engine(objective, recipe, run)
    average = None
    if recipe.engine.ema_decay is not None:
        average = WeightAverage(engine, recipe.engine.ema_decay)
    lock, checkpoint = _claim(run, store)
    if checkpoint is not None:
        restore(engine, checkpoint, average)
    recipe = _prepared(recipe, run, engine, checkpoint)
    if checkpoint is None:
        rehearse(engine, recipe, run)
    state: dict[str, Any] = checkpoint.state if checkpoint else {"step": 0}
    first_step = state["step"]
    stream = recipe.data.build(
        recipe,
        run,
        first_sample=first_step * recipe.batch_size,
        state=_stream_state(recipe, run, state.get("stream", [])),
        engine=engine,
    )
    _warn_of_twins(recipe, run, stream.epoch_samples)
    evaluated = gather_objects(_last_evaluated(recipe, run))[0]
    if first_step < recipe.steps:
        keep_contents(
            run,
            stream.contents,
            goes_on=checkpoint is not None,
            allowed=recipe.run.allow_changed_data,
        )
    damage = DamageCounter(
        recipe.data.max_damaged,
        # a small data set is judged after one epoch
        patience=min(DamageCounter.patience, stream.epoch_samples),
    )
    damage.load_state(state.get("damage", {}))
    _write_run_files(recipe, run, engine, begins=checkpoint is None)
    if run.is_main and lock is None:
        lock = lock_run_dir(run.dir, patience=0.0, log=run.log)
    watch = MetricsLogger(run, first_step=first_step, steps=recipe.steps)
    watch.text("recipe", "```json\n" + json.dumps(to_json(recipe), indent=2) + "\n```")
    training = Training(
        recipe=recipe,
        run=run,
        engine=engine,
        stream=stream,
        store=store,
        watch=watch,
        average=average,
        evaluate=lambda step: evaluate_all(recipe, run, engine, average, watch, step),
        evaluated=evaluated,
        draw=lambda batch, step: _draw(batch, step, engine, watch),
        first_step=first_step,
        seconds=state.get("seconds", 0.0),
        skipped_steps=state.get("skipped_steps", 0),
        skipped_in_row=state.get("skipped_in_row", 0),
        damage=damage,
        unshared=DamageCounter(recipe.data.max_damaged),
    )
    _announce(recipe, run, engine, checkpoint)
    if first_step < recipe.steps:
        train(training)
    elif damage.was_too_much:
        raise InputError(damage.sentence())
    else:
        measure_what_was_missed(training)
    watch.close()
    engine.close()
    if lock is not None:
        lock.close()


def _check_best(recipe: Recipe) -> None:
    """Refuse evaluation data that are not there, and a ``run.best`` that nothing will measure."""
    measured = [task for task in recipe.evaluation if task.has_data]
    scores = [name for task in measured or recipe.evaluation for name in task.scores]
    best = recipe.run.best
    if best is None or best in scores:
        return
    for task in recipe.evaluation:
        if best in task.scores:
            raise InputError(
                f"run.best is {best!r}, but the evaluation {task.name!r} was given no data; give "
                f"it some, or choose from {', '.join(scores)}"
            )
    raise InputError(
        f"run.best is {best!r}, which is nothing that the evaluations of this run measure and of "
        f"which higher is better; choose from {', '.join(scores)}"
    )


def _check_strangers(recipe: Recipe) -> None:
    """Refuse to train where no pair has another to be told apart from.

    Such a recipe can still be read: it may describe a model that was trained elsewhere.
    """
    if isinstance(recipe.objective, Contrastive) and recipe.batch_size == recipe.engine.accumulate:
        raise InputError(
            f"a batch_size of {recipe.batch_size} with engine.accumulate = "
            f"{recipe.engine.accumulate} compares one pair with itself, whose loss teaches "
            "nothing; make micro-batches larger, or use --engine.cache-chunk instead"
        )


def _warn_of_twins(recipe: Recipe, run: Run, samples: int) -> None:
    """Tell where a pair is bound to meet itself among the pairs it is told apart from."""
    micro_batch = recipe.batch_size // recipe.engine.accumulate
    if isinstance(recipe.objective, Contrastive) and samples < micro_batch:
        run.log.warning(
            "the data has %s pairs, fewer than the %s that are told apart at a time: some are "
            "compared with themselves as if they were others; lower batch_size, or give more data",
            f"{samples:,}",
            f"{micro_batch:,}",
        )


def _claim(run: Run, store: CheckpointStore) -> tuple[TextIOWrapper | None, Checkpoint | None]:
    """Wait until nobody else writes to the run directory; the checkpoint to continue from.

    Every process gets the same one.
    """
    from frugal.common.checkpoint.store import open_checkpoint

    lock = None
    if run.is_main and run.dir.exists():
        lock = lock_run_dir(run.dir, patience=120.0, log=run.log)
    barrier()
    newest = store.newest() if run.is_main else None
    name = gather_objects(newest.folder.name if newest else None)[0]
    if name is not None and newest is None:
        newest = open_checkpoint(store.folder / name)
    return lock, newest


def _stream_state(recipe: Recipe, run: Run, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stream of this process continues from, of what each process of a run saved."""
    if recipe.data.shared_state and saved:
        return saved[0]
    return saved[run.rank] if len(saved) == run.world_size else {}


def _prepared(recipe: Recipe, run: Run, engine: Engine, checkpoint: Checkpoint | None) -> Recipe:
    """The recipe with what its image reduction finds out before the first step.

    Every process calls this; a run that is continued goes on with what it found at its start.
    """
    if checkpoint is not None:
        source = str(checkpoint.folder / "state.json")
        recipe = with_calibrated(recipe, from_json(checkpoint.state["recipe"], source=source))
    image = recipe.reduction.image
    if not image.calibrated:
        return recipe
    if image.calibration_images:
        # curated data writes what it chose, here for nobody
        with tempfile.TemporaryDirectory() as folder:
            elsewhere = replace(run, dir=Path(folder))
            seen = _first_views(recipe, elsewhere, engine, images=image.calibration_images)
            image = image.calibrate(seen, gather=gather_objects, log=run.log)
    engine.objective.reduction = image
    return replace(recipe, reduction=replace(recipe.reduction, image=image))


def _first_views(recipe: Recipe, run: Run, engine: Engine, *, images: int) -> Iterator[Any]:
    """The first images that this process will train on, damaged ones left out, and their noise.

    Raises:
        InputError: if the objective shows none.
    """
    stream = recipe.data.build(recipe, run, first_sample=0, state={}, engine=engine)
    micro_batch = recipe.batch_size // recipe.engine.accumulate
    missing = math.ceil(images / micro_batch)
    for batch in islice(stream, missing):
        missing -= 1
        stays = batch.valid
        whole = Batch(
            images=batch.images[stays],
            sample_numbers=batch.sample_numbers[stays],
            valid=stays[stays],
        )
        view = engine.objective.patch_view(whole.to(run.device))
        if view is None:
            raise InputError(
                "reduction.image looks for its settings on the first images of a run, which this "
                "objective does not show; give them on the command line"
            )
        yield view
    if missing > 0:
        run.log.warning(
            "reduction.image wants to look at %s images, of which the run does not have the last "
            "%s",
            f"{images:,}",
            f"{missing * micro_batch:,}",
        )


def _check_run_dir(recipe: Recipe) -> Recipe:
    """The recipe, completed from the run that is in its directory; refuses another run's."""
    from frugal.common.checkpoint.store import recipe_of_run

    folder = recipe.run.dir
    assert folder is not None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir {folder} is a file; give a folder")
    before = recipe_of_run(folder)
    if before is None:
        if (folder / "recipe.json").exists():
            logging.getLogger("frugal").info(
                "%s holds what a run left that never wrote a checkpoint; it is replaced", folder
            )
        return recipe
    recipe = with_calibrated(recipe, before)
    changes = difference(before, recipe)
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        remedy = "or give the same recipe to continue that run"
        if changes[0].startswith("schedule."):
            remedy = f"with --run.start-from {folder} to train on from its weights"
        raise InputError(
            f"{folder} holds a run of another recipe ({changes[0]}{more}); choose another "
            f"--run.dir, {remedy}"
        )
    return recipe


def open_run(recipe: Recipe) -> Run:
    """Rank, device, threads and log of this process.

    Raises:
        InputError: if the recipe wants a device that is not there.
    """
    assert recipe.run.dir is not None
    return open_process(recipe.run.dir, recipe.engine.device, threads=recipe.engine.threads)


def open_process(folder: Path, device: str, *, threads: int | None = None) -> Run:
    """Rank, device, threads and log of this process, whose files go into a folder.

    Raises:
        InputError: if the device is not there.
    """
    import torch

    log = make_logger(launcher_ranks().rank)
    rank, world_size, local_rank = resolve_ranks(log)
    raise_open_files_limit()  # what loader processes hand over takes a file each
    chosen = _device(device, local_rank)
    if chosen.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        torch.set_num_threads(threads or _threads(on_this_machine))
    return Run(folder, rank, world_size, local_rank, chosen, log)


def _threads(processes: int) -> int:
    """The cores divided among the processes of this machine; alone, what OMP_NUM_THREADS says.

    Launchers set that variable to 1 for their processes, which would leave cores idle.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if processes == 1 and chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _device(wanted: str, local_rank: int) -> torch.device:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "engine.device is cuda, but torch finds no CUDA device; use --engine.device cpu"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join(run: Run) -> None:
    """Meet the other processes of a run, where there are any.

    Raises:
        InputError: if some do not come.
    """
    backend = "nccl" if run.device.type == "cuda" else "gloo"
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if run.device.type == "cuda" and shards:
        backend = "cuda:nccl,cpu:gloo"  # as Accelerate has it, where parts may be on the host
    init_process_group(Ranks(run.rank, run.world_size, run.local_rank), backend, run.log)


def make_engine(objective: Objective, recipe: Recipe, run: Run) -> Engine:
    """DeepSpeed if the recipe names a file for it, else Accelerate; all processes have met then.

    Raises:
        InputError: if some processes do not come.
    """
    join(run)
    if recipe.engine.deepspeed_config is not None:
        from frugal.common.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(objective, recipe, run)
    from frugal.common.engine.accelerate import AccelerateEngine

    return AccelerateEngine(objective, recipe, run)


def _write_run_files(recipe: Recipe, run: Run, engine: Engine, *, begins: bool) -> None:
    """recipe.json, model.json, environment.json and the tokenizer.

    A run that goes on keeps its recipe; what one left that never wrote a checkpoint is replaced.
    """
    if not run.is_main:
        return
    environment = _environment(run, engine)
    write_json(run.dir / "environment.json", environment)
    recipe.data.save_tokenizer(run.dir / "tokenizer")
    path = run.dir / "recipe.json"
    if begins or not _is_recipe(path):
        write_json(path, to_json(recipe))
        write_description(bundle_of(engine.objective.model, recipe), run.dir)


def _is_recipe(path: Path) -> bool:
    try:
        load_recipe(path)
    except InputError:
        return False
    return True


def _environment(run: Run, engine: Engine) -> dict[str, Any]:
    import importlib.metadata

    import torch

    packages = ("torch", "deepspeed", "accelerate", "transformers", "timm", "open_clip_torch")
    versions: dict[str, str | None] = {}
    for package in (*packages, "xformers", "webdataset", "safetensors", "frugal-common"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = run.device
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads_per_process": torch.get_num_threads(),
        "world_size": run.world_size,
        "engine": engine.name,
        "compute_dtype": str(engine.dtype).removeprefix("torch."),
    }


def _announce(recipe: Recipe, run: Run, engine: Engine, checkpoint: Checkpoint | None) -> None:
    from frugal.common.models.attention import attention_kernel

    parameters = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.trainable())
    run.log.info(
        "%s, %d %s on %s, %s products, attention by %s; %.1f M trained parameters",
        engine.name,
        run.world_size,
        "process" if run.world_size == 1 else "processes",
        run.device.type,
        str(engine.dtype).removeprefix("torch."),
        attention_kernel(run.device),
        parameters / 1e6,
    )
    if checkpoint is None:
        run.log.info(
            "training %d steps of %d samples into %s", recipe.steps, recipe.batch_size, run.dir
        )
    elif checkpoint.step < recipe.steps:
        run.log.info("continuing %s from step %d of %d", run.dir, checkpoint.step, recipe.steps)
    else:
        run.log.info("%s is complete (%d steps); nothing left to train", run.dir, recipe.steps)


def evaluate_all(
    recipe: Recipe,
    run: Run,
    engine: Engine,
    average: WeightAverage | None,
    watch: MetricsLogger,
    step: int,
) -> dict[str, Any]:
    """Run the recipe's evaluations and write ``evaluation/<name>.json``.

    Returns:
        All numbers by name, the same on every process.
    """
    import contextlib

    import torch

    if not recipe.evaluation:
        return {}

    def picture(name: str, image: Any) -> None:
        watch.picture(f"evaluation/{name}", image, step)

    show = picture if run.is_main else None
    model = engine.objective.model
    averaged = average.applied() if average else contextlib.nullcontext()
    model.eval()
    bundle = bundle_of(model, recipe)
    with engine.whole_weights(), averaged, torch.inference_mode():
        results = {task.name: task.evaluate(bundle, run, show=show) for task in recipe.evaluation}
    model.train()
    together = {name: value for numbers in results.values() for name, value in numbers.items()}
    if not run.is_main:
        return together
    for task in recipe.evaluation:
        if not (numbers := results[task.name]):
            continue  # this evaluation was given no data
        head = {"step": step, "samples": step * recipe.batch_size, "data": _data_of(task)}
        try:
            write_json(run.dir / "evaluation" / f"{task.name}.json", {**head, **numbers})
        except InputError as error:
            if step == recipe.steps:
                raise
            run.log.warning("%s; training goes on", error)
        watch.numbers(step, numbers)
    return together


def _last_evaluated(recipe: Recipe, run: Run) -> float:
    """The step after which every evaluation that is given data has run on it; -1 before the first.

    Raises:
        InputError: if the numbers of a finished run would be replaced by those of other data.
    """
    steps: list[float] = [math.inf]  # none is given data: nothing is missed
    saved = run.dir / "recipe.json"
    first = load_recipe(saved).evaluation if _is_recipe(saved) else ()
    trained_on = {task.name: _data_of(task) for task in first}
    for number, task in enumerate(recipe.evaluation):
        if not task.has_data:
            continue
        file, data = run.dir / "evaluation" / f"{task.name}.json", _data_of(task)
        try:
            before = read_json_object(file) if file.exists() else {}
        except InputError:
            before = {}  # cut in two by a crash
        step = before.get("step", -1)
        known = before.get("data", trained_on.get(task.name, data))
        if step == recipe.steps and Path(known).resolve() != Path(data).resolve():
            raise InputError(
                f"{file} holds what this run was measured at on {known}, which {data} would "
                f"replace; give the evaluation a name of its own with --evaluation.{number}.name"
            )
        steps.append(step)
    return min(steps)


def _data_of(task: EvaluationTask) -> str:
    return str(task.data)


def _draw(batch: Batch, step: int, engine: Engine, watch: MetricsLogger) -> None:
    """A picture of a batch with its masks, where the objective can draw one."""
    few = batch.rows(0, 8)
    pictures = {
        "batch": engine.objective.draw(few),
        "reduction": engine.objective.draw_reduction(few),
    }
    for name, picture in pictures.items():
        if picture is not None:
            watch.picture(name, picture, step)
