"""Zero-shot classification of images that may be of several classes: average precision."""

from __future__ import annotations

import torch

from frugal.common.data.labeled import MultiLabeledImages, walk_images
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Measure, SampleResults
from frugal.common.evaluation.class_names import naming
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.metrics import average_precision, similarity
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.remarks import Remarks, same_names
from frugal.common.evaluation.task import ImageEvaluation, Inputs


def measure_precision(
    task: ImageEvaluation, given: Inputs, embedder: Embedder, class_names: str, templates: str
) -> dict[str, float | int]:
    """What :class:`~frugal.common.evaluation.zero_shot.ZeroShot` measures of such images.

    Args:
        task: says how images are read, and what its numbers are called.
        given: the data, and who is told.
        embedder: of the model.
        class_names: what the classes are called, ``ZeroShot.class_names``.
        templates: what is written around the names, ``ZeroShot.templates``.

    Returns:
        ``mean_average_precision``, ``images``, ``classes`` and ``labels`` by name.

    Raises:
        InputError: if the data and the names of its classes do not fit together.
    """
    folder, run, ranks = given.folder, given.run, given.ranks
    data = MultiLabeledImages(folder, size=given.size, crop=task.crop)
    found = naming(class_names, templates, data, folder)
    names, prompts = found.names, found.templates
    if data.targets.shape[1] != len(names):
        raise InputError(
            f"the images of {folder} are marked for {data.targets.shape[1]} classes, but there are "
            f"names for {len(names)}; correct its classnames.txt"
        )
    run.log.info("%s: %s images of any of %d classes", task.name, f"{len(data):,}", len(names))
    ranks.same_data(data, task.name)
    with embedder.measuring(ranks):
        classes = class_embeddings(embedder, names, prompts, ranks=ranks)
        scores = torch.zeros(len(data), len(names), device=classes.device)
        walk_images(
            data,
            lambda images, places: [similarity(embedder.images(images, places), classes)],
            [scores],
            ranks=ranks,
            batch_size=task.batch_size,
            workers=task.workers,
        )
    remarks = Remarks(
        same_names=same_names(names, prompts, embedder.token_ids),
        without_images=(data.targets.sum(0) == 0).nonzero()[:, 0].tolist(),
        passed_over=data.passed_over,
    )
    labels = [name if isinstance(name, str) else name[0] for name in names]
    remarks.tell(task.name, labels, run.log)
    scores = scores.cpu()
    precision = average_precision(scores, data.targets)[0]  # (C,)
    identity = identify(data, ranks, run.device)
    identity.remark(task.name, run.log)
    if remarks.without_images:
        run.log.warning(
            "%s: a class without images counts as a precision of 0 in the mean, as in "
            "clip_benchmark",
            task.name,
        )
    if given.keep is not None:
        facts = {
            **identity.facts(),
            "images": len(data),
            "class_names": names,
            "templates": prompts,
            "average_precision": precision.tolist(),
            **remarks.facts(labels),
        }
        tables = {"scores": scores, "targets": data.targets.to(torch.uint8)}
        measure = Measure("average_precision", "scores", groups="targets")
        measures = {task.number_name("mean_average_precision"): measure}
        given.keep(SampleResults(facts, len(data), tables, measures))
    return {
        "mean_average_precision": float(precision.mean()),
        "images": len(data),
        "classes": len(names),
        "labels": int(data.targets.sum()),
        **remarks.numbers(),
    }
