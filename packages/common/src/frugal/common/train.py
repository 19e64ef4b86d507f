"""What every training script calls: build the parts in the order data flows, then run the loop."""

from __future__ import annotations

import json
import logging
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch

from frugal.common.checkpoint.commit import checkpoint_folders, whole_checkpoints
from frugal.common.checkpoint.init_from import init_from
from frugal.common.checkpoint.manifest import data_of, digest_file, digest_json
from frugal.common.checkpoint.store import (
    Checkpoint,
    CheckpointStore,
    open_checkpoint,
    recipe_of_run,
)
from frugal.common.cli import Recipes, read_command_line, run_politely
from frugal.common.contracts import Objective, Stream
from frugal.common.data.contents import (
    Contents,
    check_contents,
    is_known_by_content,
    note_contents,
    noted,
)
from frugal.common.data.jpeg import jpeg_decoder
from frugal.common.data.tokenizers import load_tokenizer, token_difference
from frugal.common.distributed import barrier, gather_objects, launcher_ranks, require_same
from frugal.common.engine.calibration import calibrate_reduction
from frugal.common.engine.deterministic import deterministic_kernels
from frugal.common.engine.digests import current_weight_digests, digest_all
from frugal.common.engine.engine import Engine
from frugal.common.engine.evaluator import Evaluator, last_evaluated
from frugal.common.engine.logger import MetricsLogger, last_line
from frugal.common.engine.loop import evaluate_if_missed, train
from frugal.common.engine.rehearsal import rehearse
from frugal.common.engine.saving import WeightAverage, restore
from frugal.common.engine.training import Training
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError
from frugal.common.evaluation.provenance import weights_digest
from frugal.common.files import cannot_write, write_json
from frugal.common.history import note, read_history, saved_step
from frugal.common.installed import code_version, package_versions
from frugal.common.models.attention import attention_kernel
from frugal.common.models.bundle import ModelBundle
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import (
    computed_otherwise,
    difference,
    recipe_if_whole,
    to_json,
    with_calibrated,
)
from frugal.common.run import (
    Run,
    join,
    lock_run_dir,
    make_logger,
    open_run,
    process_began,
)
from frugal.common.weights.runs import bundle_of, write_description


def main(recipes: Recipes, *, method: str, script: str = "train") -> None:
    """The body of ``python -m frugal.<method>.<script>``."""

    def command() -> None:
        name, recipe = read_command_line(recipes, program=f"python -m frugal.{method}.{script}")
        words = (method, name) if script == "train" else (method, script, name)
        folder = recipe.run.dir or Path("runs") / "-".join(words)
        train_recipe(replace(recipe, run=replace(recipe.run, dir=folder)))

    run_politely(command)


def train_recipe(recipe: Recipe, *, start: ModelBundle | None = None) -> None:
    """Train a recipe to its end, from the start or from where its run directory left off.

    Args:
        recipe: names its run directory.
        start: what a new run starts from, where it was loaded already: the model of
            ``run.start_from``.

    Raises:
        InputError: if the recipe, the data or the run directory cannot be used.
        RunStopped: if the run ended early for a reason that is no bug.
    """
    folder = recipe.run.dir
    assert folder is not None
    make_logger(launcher_ranks().rank)
    recipe = continued_recipe(recipe)
    run = open_run(folder, recipe.engine.device, threads=_threads(recipe))
    recipe.local_batch(run.world_size)  # refuse before anything is written
    recipe.virtual_per_process(run.world_size)
    with deterministic_kernels(run.log, wanted=recipe.engine.deterministic):
        _build_and_train(recipe, run, start)


def _build_and_train(recipe: Recipe, run: Run, start: ModelBundle | None) -> None:
    """Build the parts in the order data flows, and train; as :func:`train_recipe`."""
    recipe.check_trainable()
    store = CheckpointStore(run, keep=recipe.run.keep)
    objective = recipe.objective.build(recipe)
    if not store.whole():
        source = start or recipe.run.start_from
        init_from(objective, source, interpolate=recipe.run.interpolate, log=run.log)
    engine = make_engine(objective, recipe, run)
    watchdog = Watchdog(run, minutes=recipe.run.stall_minutes, remedy=_STALLED)
    try:
        _train_watched(recipe, run, start, store, engine, watchdog)
    finally:  # what it asks of the first process would fail once that one has ended
        watchdog.close()


def _train_watched(
    recipe: Recipe,
    run: Run,
    start: ModelBundle | None,
    store: CheckpointStore,
    engine: Engine,
    watchdog: Watchdog,
) -> None:
    """Train a model that is built, from its newest checkpoint or its first weights on."""
    objective = engine.objective
    _require_same_run(recipe)
    average = None
    if recipe.engine.ema_decay is not None:
        average = WeightAverage(engine, recipe.engine.ema_decay)

    watchdog.note("waiting for the run directory", may_stand=True)
    lock = _lock_existing(run)
    watchdog.note("starting")
    checkpoint = _newest_of_all(store)
    if checkpoint is not None:
        continued_recipe(recipe)  # once more: another process may have begun it meanwhile
        restore(engine, checkpoint, average)
    recipe = calibrate_reduction(recipe, run, engine, checkpoint)
    if checkpoint is None:
        # while nothing is written yet, so that the corrected command finds an empty directory
        rehearse(engine, recipe, run)

    state: dict[str, Any] = checkpoint.state if checkpoint else {}
    first_step = state.get("step", 0)
    is_complete = first_step >= recipe.steps
    stream = _open_stream(recipe, run, engine, checkpoint)
    _warn_of_repeated_samples(recipe, run, stream.epoch_samples)
    # the recipe that is there tells on which data it was evaluated, until it is replaced below
    last_step = last_evaluated(recipe, run)
    also, changes = dict[str, str](), list[str]()
    if not is_complete:
        also = _also_read(recipe, objective, start) if run.is_main else {}
    if not is_complete and checkpoint is not None:
        changes = check_contents(
            run,
            stream.contents,
            told=data_of(checkpoint.folder),
            allowed=recipe.run.allow_changed_data,
            also=also,
            changes=_changes_besides(recipe, run, checkpoint) if run.is_main else (),
        )

    if run.is_main and lock is None:  # of a new run, which is to be written from here on
        lock = _lock_new(store, begins=checkpoint is None)
    weights = ""
    if recipe.run.digests and checkpoint is None:
        weights = digest_all(current_weight_digests(engine))
    if run.is_main and not is_complete:
        _note_start(recipe, run, engine, checkpoint, changes, weights)
        # behind the history: who is killed in between is asked about a change once more
        note_contents(run, stream.contents, also)
    _write_run_files(recipe, run, engine, begins=checkpoint is None, trains=not is_complete)
    if run.is_main and not is_complete:
        store.about = _about(stream.contents, also, run)
    barrier()  # what the history says is read by all
    logger = MetricsLogger(run, first_step=first_step, steps=recipe.steps)
    logger.text("recipe", "```json\n" + json.dumps(to_json(recipe), indent=2) + "\n```")
    evaluator = Evaluator(
        recipe=recipe, run=run, engine=engine, average=average, logger=logger, last_step=last_step
    )
    training = Training(
        recipe=recipe,
        run=run,
        engine=engine,
        stream=stream,
        store=store,
        logger=logger,
        average=average,
        evaluator=evaluator,
        first_step=first_step,
        watchdog=watchdog,
        reopen=partial(_open_stream, recipe, run, engine),
    )
    training.load_state(state)
    training.saves.lock = lock.fileno() if lock is not None else None
    _announce(recipe, run, engine, checkpoint)
    if not is_complete:
        training.prepare_saves()
        train(training)
    elif training.damage.was_too_much:
        raise InputError(training.damage.sentence())
    else:
        evaluate_if_missed(training)
    watchdog.note("writing the last checkpoint", may_stand=True)
    training.saves.close()
    barrier()  # what the first process wrote last, such as which checkpoint is best, is there
    logger.close()
    engine.close()
    if lock is not None:
        lock.close()


def _also_read(recipe: Recipe, objective: Objective, start: ModelBundle | None) -> dict[str, str]:
    """Digests of what decides about a run beside its data, by the field that names it."""
    handed = {} if start is None else {START_FROM: weights_digest(start.model)}
    return recipe.data.also_read() | objective.also_read() | handed


_STALLED = "--run.stall-minutes; the same command continues from the last checkpoint"

START_FROM = "run.start_from"
"""What the weights that a run was handed to start from are noted as, where they were."""


def continued_recipe(recipe: Recipe) -> Recipe:
    """A recipe, completed from the run that is in its directory.

    Raises:
        InputError: if that run has another recipe.
    """
    folder = recipe.run.dir
    assert folder is not None
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.dir {folder} is a file; give a folder")
    _refuse_lost_checkpoints(folder)
    before = recipe_of_run(folder)
    if before is None:
        if (folder / "recipe.json").exists() or read_history(folder):
            logging.getLogger("frugal").info(
                "%s holds what a run left that never wrote a checkpoint; it is replaced", folder
            )
        return recipe
    recipe = with_calibrated(recipe, before)
    # by content data are compared wherever they lie now, and a change that is allowed is noted
    is_compared = recipe.run.allow_changed_data or any(
        is_known_by_content(folder, data_of(checkpoint))
        for checkpoint in whole_checkpoints(folder / "checkpoints")
    )
    changes = difference(before, recipe, compared=_WHERE if is_compared else ())
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


def _refuse_lost_checkpoints(folder: Path) -> None:
    """Refuse to begin anew in place of a run that has saved something, and whose files are gone.

    Raises:
        InputError: naming what is not there.
    """
    checkpoints = folder / "checkpoints"
    remedy = "restore it, or choose another --run.dir"
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise InputError(
            f"{checkpoints} leads to {checkpoints.readlink()}, which is not there (a disk that is "
            f"not mounted?); {remedy}"
        )
    was_begun = (folder / "recipe.json").exists()
    if was_begun and checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints} is no folder; {remedy}")
    if checkpoint_folders(checkpoints):
        return
    if saved := saved_step(folder):
        raise InputError(
            f"{folder} holds a run that had a checkpoint of step {saved}, as its history says, "
            f"but none is in {checkpoints}; restore them, choose another folder, or remove "
            f"{folder} to begin anew"
        )


def _threads(recipe: Recipe) -> int | None:
    """CPU threads of each process, where it is not the machine that decides."""
    if recipe.engine.virtual_processes is not None:
        # matrix products add up otherwise on another number of threads
        return recipe.engine.threads or 1
    return recipe.engine.threads


def make_engine(objective: Objective, recipe: Recipe, run: Run) -> Engine:
    """DeepSpeed if the recipe names a file for it, else Accelerate; all processes have met then.

    Raises:
        InputError: if some processes do not come.
    """
    join(run, minutes=recipe.run.rendezvous_minutes)
    # each takes longer to import than torch, and only one is used
    if recipe.engine.deepspeed_config is not None:
        from frugal.common.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(objective, recipe, run)
    from frugal.common.engine.accelerate import AccelerateEngine

    return AccelerateEngine(objective, recipe, run)


def _require_same_run(recipe: Recipe) -> None:
    """Refuse processes that were started with other words, or that run other code."""
    require_same(
        digest_json(to_json(recipe)), "recipe", remedy="start all of them with the same command"
    )
    require_same(
        code_version()["sha256"],
        "code of Frugal",
        remedy="install the same version of its packages on every machine",
    )


def _lock_existing(run: Run) -> TextIOWrapper | None:
    """Wait until nobody else writes to a run directory that is there; every process calls this."""
    lock = None
    if run.is_main and run.dir.exists():
        lock = lock_run_dir(run.dir, patience=120.0, log=run.log)
    barrier()
    return lock


def _lock_new(store: CheckpointStore, *, begins: bool) -> TextIOWrapper | None:
    """Make the directory of a new run, and keep others out of it before anything is written.

    Raises:
        InputError: if it cannot be made, or if another process has begun a run there meanwhile.
    """
    folder, log = store.run.dir, store.run.log
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    lock = lock_run_dir(folder, patience=0.0, log=log)
    if begins and store.whole():
        raise InputError(
            f"another process has trained a run in {folder} while this one was starting; choose "
            "another --run.dir, or give the same command again to continue that run"
        )
    return lock


def _newest_of_all(store: CheckpointStore) -> Checkpoint | None:
    """The checkpoint to continue from, which is the one that the first process sees."""
    newest = store.newest() if store.run.is_main else None
    name = gather_objects(newest.folder.name if newest else None)[0]
    if name is not None and newest is None:
        newest = open_checkpoint(store.folder / name)
    return newest


def _open_stream(recipe: Recipe, run: Run, engine: Engine, checkpoint: Checkpoint | None) -> Stream:
    """The micro-batches of this process behind a checkpoint, or from the beginning."""
    state: dict[str, Any] = checkpoint.state if checkpoint else {}
    return recipe.data.build(
        recipe,
        run,
        first_sample=state.get("step", 0) * recipe.batch_size,
        state=stream_state(recipe, run, state.get("stream", [])),
        engine=engine,
    )


def stream_state(recipe: Recipe, run: Run, saved: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stream of this process continues from, of what each process of a run saved."""
    if recipe.data.shared_state and saved:
        return saved[0]
    return saved[run.rank] if len(saved) == run.world_size else {}


def _warn_of_repeated_samples(recipe: Recipe, run: Run, samples: int) -> None:
    """Tell where a pair is bound to meet itself among the pairs it is told apart from."""
    micro_batch = recipe.batch_size // recipe.engine.accumulate
    if recipe.objective.compares_samples and samples < micro_batch:
        run.log.warning(
            "the data has %s pairs, fewer than the %s that are told apart at a time: some are "
            "compared with themselves as if they were others; lower batch_size, or give more data",
            f"{samples:,}",
            f"{micro_batch:,}",
        )


def _write_run_files(
    recipe: Recipe, run: Run, engine: Engine, *, begins: bool, trains: bool
) -> None:
    """recipe.json, model.json, environment.json and the tokenizer.

    A run that goes on keeps its recipe but for where its data lie, and a complete one its tokenizer
    and its environment; what one left that never wrote a checkpoint is replaced.
    """
    if not run.is_main:
        return
    if trains or not (run.dir / "environment.json").exists():
        write_json(run.dir / "environment.json", environment_of(run, engine))
    if trains or not (run.dir / "tokenizer").exists():
        recipe.data.save_tokenizer(run.dir / "tokenizer")
    path = run.dir / "recipe.json"
    kept = None if begins else recipe_if_whole(path)
    if kept is None or (trains and difference(kept, recipe)):
        write_json(path, to_json(recipe))
        write_description(bundle_of(engine.objective.model, recipe), run.dir)


_WHERE = ("data.train",)
"""The field that says where data lie."""


def _changes_besides(recipe: Recipe, run: Run, checkpoint: Checkpoint) -> list[str]:
    """What is another than before and not among the shards, one phrase each."""
    changes = _tokenizer_changes(recipe, run)
    before = recipe_of_run(run.dir)
    if before is not None and not is_known_by_content(run.dir, data_of(checkpoint.folder)):
        moved = set(difference(before, recipe)) - set(difference(before, recipe, compared=_WHERE))
        changes += sorted(moved)
    return changes


def _tokenizer_changes(recipe: Recipe, run: Run) -> list[str]:
    """How the tokenizer differs from the one that a run keeps, in at most one phrase."""
    kept, source = run.dir / "tokenizer", recipe.data.caption_tokenizer
    if source is None or not kept.is_dir():
        return []
    with tempfile.TemporaryDirectory() as folder:
        source.load().save(Path(folder))
        if _digest_folder(Path(folder)) == _digest_folder(kept):
            return []
    # other versions of a library may write the same tokenizer otherwise
    found = token_difference(load_tokenizer(kept), source.load())
    return [f"the tokenizer is another: it {found.words}"] if found else []


def _digest_folder(folder: Path) -> str:
    """SHA-256 of the files in a folder and their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_json([[str(f.relative_to(folder)), digest_file(f)["sha256"]] for f in files])


def _about(contents: Contents, also: Mapping[str, str], run: Run) -> dict[str, Any]:
    """What the manifests of a run's checkpoints tell beside their files."""
    tokenizer = run.dir / "tokenizer"
    return {
        "code": code_version(),
        "data": noted(contents, also),
        **({"tokenizer": _digest_folder(tokenizer)} if tokenizer.is_dir() else {}),
    }


def _note_start(
    recipe: Recipe,
    run: Run,
    engine: Engine,
    checkpoint: Checkpoint | None,
    changes: Sequence[str],
    weights: str,
) -> None:
    """Write into the history that a run begins or goes on, and what was allowed to be another.

    The lines of steps that are taken again are dropped from the log afterwards. ``weights`` is a
    digest of those that it begins with, or empty.
    """
    state: Mapping[str, Any] = checkpoint.state if checkpoint else {}
    step = checkpoint.step if checkpoint else 0
    event = "continued" if checkpoint else "began"
    last = last_line(run.dir) or {}
    facts = {
        "world_size": run.world_size,
        "engine": engine.name,
        "recipe": to_json(recipe),
        "code": code_version(),
        "since": round(process_began(), 3),
        "seconds": state.get("seconds", 0.0),
        "lost_seconds": state.get("lost_seconds", 0.0),
        "before": {n: last[n] for n in ("step", "time", "session_seconds") if n in last},
        "environment": environment_of(run, engine),
        **({"weights": weights} if weights else {}),
    }
    note(run.dir, event, step=step, **facts)
    if changes:
        note(run.dir, "data_changed", step=step, changes=changes)


def environment_of(run: Run, engine: Engine) -> dict[str, Any]:
    """What a run is computed by: versions, code, device, threads, processes."""
    device = run.device
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": package_versions(),
        "code": code_version()["sha256"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads_per_process": torch.get_num_threads(),
        "world_size": run.world_size,
        "engine": engine.name,
        "compute_dtype": str(engine.dtype).removeprefix("torch."),
    }


def _announce(recipe: Recipe, run: Run, engine: Engine, checkpoint: Checkpoint | None) -> None:
    run.log.info(
        "%s, %d %s on %s, %s products, attention by %s, JPEG by %s; %.1f M trained parameters",
        engine.name,
        run.world_size,
        "process" if run.world_size == 1 else "processes",
        run.device.type,
        str(engine.dtype).removeprefix("torch."),
        attention_kernel(run.device, compiled=recipe.engine.compile),
        jpeg_decoder(),
        sum(engine.whole_shape(p).numel() for _, p in engine.trainable()) / 1e6,
    )
    if checkpoint is None:
        run.log.info(
            "training %d steps of %d samples into %s", recipe.steps, recipe.batch_size, run.dir
        )
    elif checkpoint.step < recipe.steps:
        run.log.info("continuing %s from step %d of %d", run.dir, checkpoint.step, recipe.steps)
        if changes := computed_otherwise(checkpoint.recipe(), recipe):
            run.log.info("from here on it is computed otherwise: %s", "; ".join(changes))
    else:
        run.log.info("%s is complete (%d steps); nothing left to train", run.dir, recipe.steps)
