"""Contrastive losses over the global batch, in memory of (local batch x chunk).

Each process holds its own rows and compares them with the gathered columns, a chunk of columns at
a time: the forward pass keeps a running log-sum-exp, the backward pass computes the same logits
again. Columns are gathered a piece at a time too, so that of all that has the size of the global
batch only a few numbers per sample are ever in memory.

Gradients are those of gathered columns that carry gradients, yet no gradient of a column is ever
sent. A feature counts in two places: in the row of its own sample, here, and as a column of all
other rows, elsewhere. The second part is the same matrix of logits read the other way round, so
that a process can compute it from the log-sum-exps of the others, one number per row.

Where samples have groups, the others of a sample's group share its target (softmax), or are pairs
too (sigmoid), as in supervised contrastive learning (Khosla et al., arXiv:2004.11362, equation 2).

Softmax: Radford et al., arXiv:2103.00020, figure 3. Sigmoid: Zhai et al., arXiv:2303.15343,
algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from frugal.common.distributed import gather, place_in_world

Direction = Literal["image_to_text", "text_to_image"]
BOTH: tuple[Direction, ...] = ("image_to_text", "text_to_image")

LARGEST_LOG_SCALE = math.log(100)

_CHUNK_LOGITS = 1 << 20
"""Logits held at a time by default: 4 MiB, few enough for a cache and many enough for a GPU."""
_PIECE_NUMBERS = 1 << 21
"""Numbers gathered at a time: 8 MiB, so much that waiting for the network is all that counts."""


class LossAndAccuracy(NamedTuple):
    """What a contrastive loss returns on every process."""

    loss: Tensor
    """Scalar whose mean over the processes is the loss of the global batch."""
    accuracy: Tensor
    """Scalar whose mean over the processes is the share of valid samples whose partner scores
    highest in the global batch; without gradient."""


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    directions: Sequence[Direction] = BOTH,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossAndAccuracy:
    """Cross-entropy of every sample's partner among the whole global batch.

    Every process calls it with equally many samples. Averaging the gradients over the processes,
    as DDP and ZeRO do, gives the gradients of the global loss.

    Args:
        image_features: (B, E) unit vectors.
        text_features: (B, E) unit vectors; row i belongs to image i.
        log_scale: one element, the logarithm of the factor on the cosines.
        valid: (B,) bool; a sample that is not valid counts neither as a row nor as a column.
        groups: (B,) int64; the target of a sample is spread evenly over all partners in the global
            batch whose samples have its number. Without them it is its own partner.
        directions: which side is the query; the loss is the mean over the directions.
        chunk: columns at a time; by default few enough for 4 MiB of logits.
        group: the processes of the global batch; all of them by default.
    """
    images, texts, scale = _prepare(image_features, text_features, log_scale)
    samples = _Samples.of(images, valid, groups, chunk, group)
    images, texts = samples.blank(images), samples.blank(texts)
    losses, hits = _Softmax.apply(images, texts, scale, samples, tuple(directions))
    loss = losses.sum() * samples.share / len(directions)
    return LossAndAccuracy(loss, hits.sum() * samples.share)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    logit_bias: Tensor,
    *,
    valid: Tensor | None = None,
    groups: Tensor | None = None,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossAndAccuracy:
    """SigLIP's loss: every pair of the global batch is told apart as partners or strangers.

    Summed over the pairs and divided by the number of samples; all pairs of a group are partners.
    Arguments are those of :func:`contrastive_loss`, and ``logit_bias``, one element that is added
    to every logit.
    """
    images, texts, scale = _prepare(image_features, text_features, log_scale)
    samples = _Samples.of(images, valid, groups, chunk, group)
    images, texts = samples.blank(images), samples.blank(texts)
    losses, hits = _Sigmoid.apply(images, texts, scale, logit_bias.to(images.dtype), samples)
    return LossAndAccuracy(losses.sum() * samples.share, hits.sum() * samples.share)


def clip_log_scale(log_scale: Tensor) -> Tensor:
    """Within [0, ln 100]; outside of it the gradient is zero (FLIP)."""
    return log_scale.clamp(0.0, LARGEST_LOG_SCALE)


def _prepare(images: Tensor, texts: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides and the factor in float32, or in float64 where the features are."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    return images.to(dtype), texts.to(dtype), log_scale.to(dtype).exp()


@dataclass(frozen=True)
class _Samples:
    """Which samples of the global batch count, and which of them are this process's."""

    is_barred: Tensor
    """(B,) True for a sample of this process that does not count."""
    all_barred: Tensor
    """(G,) for every process's samples: 0, or minus infinity where one does not count."""
    share: Tensor
    """Weight of one row, such that the mean over processes is the mean over valid samples."""
    groups: Tensor | None
    """(B,) int64 of this process's samples; None where everybody is alone."""
    all_groups: Tensor | None
    """(G,) int64"""
    rank: int
    world_size: int
    chunk: int
    """Columns at a time."""
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls,
        features: Tensor,
        valid: Tensor | None,
        groups: Tensor | None,
        chunk: int | None,
        group: dist.ProcessGroup | None,
    ) -> _Samples:
        rank, world_size = place_in_world(group)
        size = len(features)
        valid = torch.ones(size, device=features.device).bool() if valid is None else valid
        all_valid = gather(valid, group)  # (G,)
        return cls(
            is_barred=~valid,
            all_barred=torch.zeros_like(all_valid, dtype=features.dtype).masked_fill(
                ~all_valid, -torch.inf
            ),
            groups=groups,
            all_groups=None if groups is None else gather(groups, group),
            share=world_size / all_valid.sum().clamp(min=1).to(features.dtype),
            rank=rank,
            world_size=world_size,
            chunk=chunk or max(256, _CHUNK_LOGITS // max(size, 1)),
            group=group,
        )

    def blank(self, rows: Tensor) -> Tensor:
        """(B, ...) rows with zeros for samples that do not count, whatever stood there."""
        barred = self.is_barred if rows.ndim == 1 else self.is_barred[:, None]
        return rows.masked_fill(barred, 0.0)

    def kin(self, part: _Chunk) -> Tensor | None:
        """(B, C) bool: columns of the group of each row, but for its partner; None without groups.

        Asked while the partners of the chunk are minus infinity, like columns that do not count.
        """
        if self.groups is None or self.all_groups is None:
            return None
        same = self.groups[:, None] == self.all_groups[part.places]
        return same.logical_and_(part.logits != -torch.inf)


class _Chunk(NamedTuple):
    """The logits of local rows against some of the columns."""

    columns: Tensor
    """(C, E)"""
    places: Tensor
    """(C,) place of each column in the global batch."""
    logits: Tensor
    """(B, C); minus infinity for a column that does not count."""
    rows: slice
    """The local samples whose partners are among these columns."""
    partners: Tensor
    """View of ``logits`` at the partners of ``rows``."""


def _chunks(
    rows: Tensor, columns: Tensor, samples: _Samples, bias: Tensor | None = None
) -> Iterator[_Chunk]:
    """(B, E) rows, already scaled, against the (B, E) columns of every process."""
    size, width = columns.shape
    offsets = samples.all_barred if bias is None else samples.all_barred + bias  # (G,)
    all_places = torch.arange(len(offsets), device=rows.device).view(-1, size)  # (W, B)
    step = max(_PIECE_NUMBERS // (samples.world_size * width), 1)
    for first in range(0, size, step):
        # every process sends the same slice of its columns, so a piece holds a slice of every rank
        # one after another: ranks are in order in it, but its places in the batch are not adjacent
        piece = gather(columns[first : first + step], samples.group)
        places = all_places[:, first : first + step].flatten()
        per_rank = len(piece) // samples.world_size
        local_start = samples.rank * per_rank
        for start in range(0, len(piece), samples.chunk):
            part = slice(start, start + samples.chunk)
            # minus infinity for a column that does not count comes with the product, for nothing
            logits = torch.addmm(offsets[places[part]], rows, piece[part].T)  # (B, C)
            # Row i's partner is local column i, so the partners in this chunk are a diagonal, which
            # starts left or right of the chunk's corner. A view, no index: nothing is copied, and
            # where a chunk has none of them it is empty on the host already.
            partners = logits[first : first + per_rank].diagonal(local_start - start)
            first_row = first + max(start - local_start, 0)
            local_rows = slice(first_row, first_row + len(partners))
            yield _Chunk(piece[part], places[part], logits, local_rows, partners)


def _weighted_columns(
    rows: Tensor,
    columns: Tensor,
    samples: _Samples,
    weigh: Callable[[_Chunk], None],
    partner_weights: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Sums of the columns with weights made from their logits.

    Args:
        rows: (B, E) local rows, already scaled.
        columns: (B, E) local columns.
        samples: which of them count.
        weigh: turns the logits of a chunk into weights, in place; partners are left to the next.
        partner_weights: (B,) weight of every row's own partner.
        bias: added to every logit.

    Returns:
        (B, E); zero for rows that do not count.
    """
    # the logits are computed again rather than kept: they are what would grow with the batch
    sums = torch.zeros_like(rows)
    for part in _chunks(rows, columns, samples, bias):
        weigh(part)
        part.partners.copy_(partner_weights[part.rows])
        sums.addmm_(part.logits, part.columns)
    return samples.blank(sums)


class _Rows(NamedTuple):
    """What the softmax of every local row leaves behind, (B,) each."""

    losses: Tensor
    log_total: Tensor
    """Log-sum-exp of the row."""
    missed: Tensor
    """What the probability that the row gives to its partner lacks of the partner's target."""
    target: Tensor
    """Of every member of the row's group: 1 over their number."""
    hits: Tensor
    """1 where the partner, or another of the group, scores highest."""

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, samples: _Samples) -> _Rows:
        """Local rows, already scaled, against the columns of all processes."""
        largest = rows.new_full((len(rows),), -torch.inf)
        total = rows.new_zeros(len(rows))
        others = _Kin.none(rows)
        for part in _chunks(rows, columns, samples):
            part.partners.fill_(-torch.inf)
            others = others.met(part, samples.kin(part))
            # running log-sum-exp: what was summed so far is brought to the new largest logit
            before, largest = largest, torch.maximum(largest, part.logits.amax(1))
            # a row may have met nothing yet but columns that do not count
            pivot = largest.masked_fill(largest == -torch.inf, 0.0)
            total *= (before - pivot).exp()
            total += part.logits.sub_(pivot[:, None]).exp_().sum(1)
        partner = (rows * columns).sum(1)
        # Log-sum-exp of the others minus the partner: its softplus is the loss, its sigmoid the
        # probability missed. With the partner kept apart a loss near zero keeps all its digits.
        margin = pivot + total.log() - partner
        losses = torch.logaddexp(margin, torch.zeros_like(margin))
        target = 1 / (1 + others.members)
        # what the others' part of the target takes away from the partner's; 0 where there are none
        moved = (others.members * partner - others.logits) * target
        hits = torch.maximum(partner, others.largest) >= largest
        hits &= (partner > largest) | (others.members > 0)
        return cls(
            samples.blank(losses + moved),
            partner + losses,
            margin.sigmoid() - (1 - target),
            target,
            samples.blank(hits.to(rows.dtype)),
        )

    @classmethod
    def absent(cls, rows: Tensor) -> _Rows:
        """Rows of a direction that the loss leaves out: no loss, and no weight for anything."""
        zeros = rows.new_zeros(len(rows))
        return cls(zeros, zeros + torch.inf, zeros, zeros, zeros)


class _Kin(NamedTuple):
    """What the rows have met of their groups, their partners left out, (B,) each."""

    logits: Tensor
    """Their sum."""
    members: Tensor
    """How many they are."""
    largest: Tensor
    """The largest logit; minus infinity where there is none."""

    @classmethod
    def none(cls, rows: Tensor) -> _Kin:
        """Before any column was met."""
        zeros = rows.new_zeros(len(rows))
        return cls(zeros, zeros, zeros - torch.inf)

    def met(self, part: _Chunk, kin: Tensor | None) -> _Kin:
        """With the columns of one chunk more."""
        if kin is None:
            return self
        largest = part.logits.masked_fill(~kin, -torch.inf).amax(1)
        return _Kin(
            self.logits + part.logits.masked_fill(~kin, 0.0).sum(1),
            self.members + kin.sum(1),
            torch.maximum(self.largest, largest),
        )


class _Softmax(torch.autograd.Function):
    """(images, texts, scale) to the loss of every sample in all directions and the hits, (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        samples: _Samples,
        directions: tuple[Direction, ...],
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            of_image = of_text = _Rows.absent(images)
            if "image_to_text" in directions:
                of_image = _Rows.of(images * scale, texts, samples)
            if "text_to_image" in directions:
                of_text = _Rows.of(texts * scale, images, samples)
        hits = of_image.hits if "image_to_text" in directions else of_text.hits
        ctx.mark_non_differentiable(hits)
        ctx.samples = samples
        ctx.save_for_backward(
            images,
            texts,
            scale,
            of_image.log_total,
            of_image.missed,
            of_text.log_total,
            of_text.missed,
            of_image.target,
            of_text.target,
        )
        return of_image.losses + of_text.losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        samples: _Samples = ctx.samples
        images, texts, scale, *of_rows = ctx.saved_tensors
        image_total, image_missed, text_total, text_missed, image_target, text_target = of_rows
        weight = samples.blank(gradients[0])
        # a few numbers of every sample of all ranks: all that a process must know of rows elsewhere
        # to compute, by itself, what they would send to its columns as gradients
        numbers = [image_total, weight, text_total, weight]
        if samples.groups is not None:
            numbers[2:2] = [image_target * weight]
            numbers += [text_target * weight]
        local = torch.stack(numbers).unflatten(0, (2, -1))  # (2, 2 or 3, B): of images, of texts
        everywhere = gather(local.permute(2, 0, 1), samples.group).permute(1, 2, 0)
        partner_weights = -(image_missed + text_missed) * weight
        image_gradient = text_gradient = scale_gradient = None
        with torch.autocast(images.device.type, enabled=False):
            # a frozen tower saves a whole pass over the global batch
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
                weigh = _softmax_weights(samples, local[0], everywhere[1])
                sums = _weighted_columns(images * scale, texts, samples, weigh, partner_weights)
                image_gradient = sums * scale
                scale_gradient = (sums * images).sum().view_as(scale)
            if ctx.needs_input_grad[1]:
                weigh = _softmax_weights(samples, local[1], everywhere[0])
                sums = _weighted_columns(texts * scale, images, samples, weigh, partner_weights)
                text_gradient = sums * scale
        return image_gradient, text_gradient, scale_gradient, None, None


def _softmax_weights(samples: _Samples, rows: Tensor, columns: Tensor) -> Callable[[_Chunk], None]:
    """The derivative of all losses, here and elsewhere, by the logits of local rows.

    Args:
        samples: with their groups.
        rows: (2 or 3, B) log-sum-exp of the local rows, the gradients of their losses and, with
            groups, these times the target of every member.
        columns: (2 or 3, G) the same of the columns where they are rows themselves.
    """

    def weigh(part: _Chunk) -> None:
        kin = samples.kin(part)
        log_total, weight, *target = columns[:, part.places]
        as_columns = (part.logits - log_total).exp_().mul_(weight)
        pulled = None if kin is None else (rows[2][:, None] + target[0]).mul_(kin)
        log_total, weight = rows[0], rows[1]
        part.logits.sub_(log_total[:, None]).exp_().mul_(weight[:, None]).add_(as_columns)
        if pulled is not None:
            part.logits.sub_(pulled)

    return weigh


class _Sigmoid(torch.autograd.Function):
    """(images, texts, scale, bias) to the loss of every image's pairs and the hits, (B,) each."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, samples: _Samples
    ) -> tuple[Tensor, Tensor]:
        rows = images * scale
        losses = rows.new_zeros(len(rows))
        largest = rows.new_full((len(rows),), -torch.inf)
        others = _Kin.none(rows)
        with torch.autocast(images.device.type, enabled=False):
            for part in _chunks(rows, texts, samples, bias):
                part.partners.fill_(-torch.inf)
                kin = samples.kin(part)
                others = others.met(part, kin)
                largest = torch.maximum(largest, part.logits.amax(1))
                losses += F.softplus(_turned(part.logits, kin)).sum(1)
        partner = (rows * texts).sum(1) + bias
        losses += F.softplus(-partner)
        found = torch.maximum(partner, others.largest) >= largest
        found &= (partner > largest) | (others.members > 0)
        hits = samples.blank(found.to(rows.dtype))
        ctx.mark_non_differentiable(hits)
        ctx.samples = samples
        ctx.save_for_backward(images, texts, scale, bias, (-partner).sigmoid())
        return samples.blank(losses), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        samples: _Samples = ctx.samples
        images, texts, scale, bias, missed = ctx.saved_tensors
        weight = samples.blank(gradients[0])  # (B,)
        everywhere = gather(weight, samples.group)  # (G,)
        partner_weights = -missed * weight
        bias_gradient = partner_weights.sum()

        def of_rows(part: _Chunk) -> None:
            nonlocal bias_gradient
            part.partners.fill_(-torch.inf)
            kin = samples.kin(part)
            _turned(_turned(part.logits, kin).sigmoid_(), kin).mul_(weight[:, None])
            bias_gradient = bias_gradient + part.logits.sum()

        def of_columns(part: _Chunk) -> None:
            kin = samples.kin(part)
            _turned(_turned(part.logits, kin).sigmoid_(), kin).mul_(everywhere[part.places])

        image_gradient = text_gradient = scale_gradient = None
        with torch.autocast(images.device.type, enabled=False):
            if any(ctx.needs_input_grad[place] for place in (0, 2, 3)):
                sums = _weighted_columns(
                    images * scale, texts, samples, of_rows, partner_weights, bias
                )
                image_gradient = sums * scale
                scale_gradient = (sums * images).sum().view_as(scale)
            if ctx.needs_input_grad[1]:
                sums = _weighted_columns(
                    texts * scale, images, samples, of_columns, partner_weights, bias
                )
                text_gradient = sums * scale
        return image_gradient, text_gradient, scale_gradient, bias_gradient.view_as(bias), None


def _turned(logits: Tensor, kin: Tensor | None) -> Tensor:
    """The same tensor with the other sign where columns are partners too."""
    if kin is not None:
        torch.where(kin, -logits, logits, out=logits)
    return logits
