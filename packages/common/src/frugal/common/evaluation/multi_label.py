"""Zero-shot classification of images that may be of several classes: average precision."""

from __future__ import annotations

from pathlib import Path

import torch

from frugal.common.contracts import Show
from frugal.common.data.labeled import MultiLabeledImages, grouped
from frugal.common.distributed import Ranks, check_delivery
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Keep, Measure, SampleResults
from frugal.common.evaluation.class_names import names_and_templates
from frugal.common.evaluation.config import ZeroShot
from frugal.common.evaluation.embed import Embedder, similarity
from frugal.common.evaluation.metrics import average_precision
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.remarks import Remarks, same_names
from frugal.common.models.bundle import ModelBundle
from frugal.common.run import Run


def evaluate(
    task: ZeroShot,
    folder: Path,
    bundle: ModelBundle,
    run: Run,
    show: Show | None,
    keep: Keep | None = None,
) -> dict[str, float | int]:
    """See :meth:`frugal.common.evaluation.config.ZeroShot.evaluate`."""
    del show
    data = MultiLabeledImages(folder, size=bundle.image.height_width, crop=task.crop)
    names, templates = names_and_templates(task, data, folder)
    if data.targets.shape[1] != len(names):
        raise InputError(
            f"the images of {folder} are marked for {data.targets.shape[1]} classes, but there are "
            f"names for {len(names)}; correct its classnames.txt"
        )
    if task.metric is not None:
        raise InputError(
            f"the metric of {task.name} is {task.metric}, but images of several classes have an "
            "average precision; leave it out"
        )
    run.log.info("%s: %s images of any of %d classes", task.name, f"{len(data):,}", len(names))
    embedder, ranks = Embedder.of(bundle, run, task), Ranks.current()
    ranks.same_data(data, task.name)
    with embedder.measuring(ranks):
        classes = class_embeddings(embedder, names, templates, ranks=ranks)
        scores = torch.zeros(len(data), len(names), device=classes.device)
        delivered = torch.zeros(len(data), dtype=torch.int64, device=classes.device)
        batches = data.batches(ranks.rank, ranks.world_size, task.batch_size, task.workers)
        for images, places in grouped(batches):
            found = similarity(embedder.images(images, places), classes)  # (b, C)
            places = places.to(scores.device)
            scores[places] = found
            delivered.index_add_(0, places, torch.ones_like(places))
    check_delivery(ranks.sum(delivered).cpu())
    remarks = Remarks(
        same_names=same_names(names, templates, embedder.token_ids),
        without_images=(data.targets.sum(0) == 0).nonzero()[:, 0].tolist(),
        passed_over=data.passed_over,
    )
    labels = [name if isinstance(name, str) else name[0] for name in names]
    remarks.tell(task.name, labels, run.log)
    scores = ranks.sum(scores).cpu()
    precision = average_precision(scores, data.targets)[0]  # (C,)
    identity = identify(data, ranks, run.device)
    identity.remark(task.name, run.log)
    if remarks.without_images:
        run.log.warning(
            "%s: a class without images counts as a precision of 0 in the mean, as in "
            "clip_benchmark",
            task.name,
        )
    name = f"{task.name}_mean_average_precision"
    if keep is not None:
        facts = {
            **identity.facts(),
            "images": len(data),
            "class_names": names,
            "templates": templates,
            "average_precision": precision.tolist(),
            **remarks.facts(labels),
        }
        tables = {"scores": scores, "targets": data.targets.to(torch.uint8)}
        measure = Measure("average_precision", "scores", groups="targets")
        keep(SampleResults(facts, len(data), tables, {name: measure}))
    return {
        name: float(precision.mean()),
        f"{task.name}_images": len(data),
        f"{task.name}_classes": len(names),
        f"{task.name}_labels": int(data.targets.sum()),
        **{f"{task.name}_{kind}": count for kind, count in remarks.numbers().items()},
    }
