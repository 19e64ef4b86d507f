"""Gradient caching: the loss of a large batch with the activations of a small one.

First every chunk is encoded without gradients, then the loss of the whole batch is differentiated
by the features alone, then every chunk is encoded once more and its part of these gradients sent
back through the towers. Nothing is approximated. Source: Gao et al., arXiv:2101.06983.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from frugal.common.contracts import Batch, Objective
from frugal.common.objectives.contrastive import ContrastiveObjective, Encoded
from frugal.common.randomness import random_states, set_random_states


class Wrapper(Protocol):
    """What trains the objective; the part of an engine that is needed here."""

    objective: Objective

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the objective through whatever wraps it."""
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around every forward and backward; ``last`` marks the last of an optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        ...


def cached_backward(
    wrapper: Wrapper, batch: Batch, chunk: int, share: float | Tensor, *, last: bool
) -> dict[str, Tensor]:
    """Accumulate the gradients of a whole batch, encoding a few samples at a time.

    Masks are functions of the sample and so are the same in both passes; dropout is made so by
    replaying the random states.

    Args:
        wrapper: the engine, around a :class:`ContrastiveObjective`.
        batch: this process's micro-batch.
        chunk: samples encoded at a time.
        share: factor on the loss, a number or ().
        last: whether this is the last backward pass before the optimizer's step.

    Returns:
        The objective's metrics and the ``loss`` itself, before ``share``.
    """
    starts = range(0, len(batch), chunk)
    parts = [batch.rows(start, min(start + chunk, len(batch))) for start in starts]
    states, pieces = [], []
    # without gradients no activation stays: of a chunk only its (B, E) features do
    with torch.no_grad():
        for part in parts:
            states.append(random_states(batch.images.device))
            # through the wrapper here too: ZeRO-3 and FSDP make weights whole in this call alone
            pieces.append(wrapper.forward(part, encode_only=True))
    objective = wrapper.objective
    assert isinstance(objective, ContrastiveObjective)  # others say that they cache no gradients
    encoded = _joined(pieces)
    loss, metrics = objective.loss(encoded, batch)
    # torch's own backward, since it ends at the features: an engine's would count it as one of its
    # passes, and scale the loss for float16 here and once more below
    (loss * share).backward()
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        is_last = number == len(parts) - 1
        gradients = _gradients(encoded, starts[number], len(part), with_scale=is_last)
        set_random_states(batch.images.device, state)
        # chunks add up on their process; only the last one of a step is exchanged
        with wrapper.accumulating(last=last and is_last):
            wrapper.backward(wrapper.forward(part, gradients=gradients))
    return metrics | {"loss": loss.detach()}


def _joined(pieces: list[Encoded]) -> Encoded:
    """The whole batch as leaves that collect gradients."""
    first = pieces[0]

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    return Encoded(
        images=leaf(torch.cat([piece.images for piece in pieces])),
        texts=leaf(torch.cat([piece.texts for piece in pieces])),
        log_scale=leaf(first.log_scale),
        logit_bias=None if first.logit_bias is None else leaf(first.logit_bias),
        patches=torch.cat([piece.patches for piece in pieces]),
        text_tokens=torch.cat([piece.text_tokens for piece in pieces]),
        token_losses=None
        if first.token_losses is None
        else leaf(
            torch.cat([piece.token_losses for piece in pieces if piece.token_losses is not None])
        ),
    )


def _gradients(encoded: Encoded, start: int, count: int, *, with_scale: bool) -> Encoded:
    """The gradients of some samples; those of scale and bias must count once only."""
    rows = slice(start, start + count)
    # zero rather than left out: every pass then reaches the same parameters on every process, as
    # whatever exchanges gradients expects
    factor = 1.0 if with_scale else 0.0

    def of(leaf: Tensor) -> Tensor:
        assert leaf.grad is not None
        return leaf.grad

    return Encoded(
        images=of(encoded.images)[rows],
        texts=of(encoded.texts)[rows],
        log_scale=of(encoded.log_scale) * factor,
        logit_bias=None if encoded.logit_bias is None else of(encoded.logit_bias) * factor,
        patches=encoded.patches[rows],
        text_tokens=encoded.text_tokens[rows],
        token_losses=None if encoded.token_losses is None else of(encoded.token_losses)[rows],
    )
