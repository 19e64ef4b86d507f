"""Multi-head attention over dense and packed tokens: xformers where it runs, PyTorch elsewhere.

Which attention runs when:

==========================  =========================================  ========================
tokens                      CUDA, where xformers has a kernel          elsewhere
==========================  =========================================  ========================
dense                       xformers, without a bias                   torch
dense, causal               xformers, ``LowerTriangularMask``          torch, ``is_causal``
dense, padding masked       torch, (B, 1, 1, L) mask                   the same
dense, causal and masked    torch, (B, 1, L, L) mask                   the same
packed                      xformers, ``BlockDiagonalMask``            padded; torch, key mask
packed, causal              xformers, ``BlockDiagonalCausalMask``      padded; torch, is_causal
the pooled token, dense     torch, one query of every sequence         the same
the pooled token, packed    keys padded; torch, one query, key mask    the same
==========================  =========================================  ========================

"torch" is ``scaled_dot_product_attention``; on a CPU it computes bfloat16 and float16 in float32.
xformers has a kernel where a tiny forward and backward pass ran, tried once for every device,
dtype and head width. It is left out by ``engine.deterministic``, and by ``engine.compile``, whose
graphs its choice among kernels would break. The pooled token is the one that the pooling reads: a
tower that pools the class token, the end of text, the first or the last slot computes nothing else
in its last block. Padding is masked in dense text towers with ``pad_mask``; tokens are packed by
image reductions that keep another number of patches of every image and by text towers with
``packed``. MILAN's decoder and teacher attend to dense tokens; the importance that the teacher
gives to patches is one row of its last attention, computed apart. Towers of timm and transformers
have their own attention.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from frugal.common.models.layout import Layout


@functools.cache
def _xformers_runs(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """Whether xformers computes attention and its gradient here, found out by doing it once."""
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        kind = device.partition(":")[0]
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(kind, enabled=False),
            # the first block may be one that is recomputed, which counts what is saved inside
            torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is),
        ):
            tokens = torch.zeros(1, 24, 2, head_width, device=device, dtype=dtype)
            tokens.requires_grad_()
            for bias in (None, BlockDiagonalMask.from_seqlens([16, 8], device=device)):
                memory_efficient_attention(tokens, tokens, tokens, attn_bias=bias).sum().backward()
    except ImportError:
        return False
    except (NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        # built for another torch or CUDA, or without a kernel for this device and width
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        logging.getLogger("frugal").warning(
            "xformers computes no attention of %s with heads of %d channels here (%s): torch does "
            "it instead, which pads packed tokens",
            str(dtype).removeprefix("torch."),
            head_width,
            reasons[-1].strip(),
        )
        return False
    return True


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _use_xformers(device: str, dtype: torch.dtype, head_width: int) -> bool:
    if device == "cpu" or torch.are_deterministic_algorithms_enabled():
        return False  # xformers adds gradients in any order
    return _xformers_runs(device, dtype, head_width)


_AS_ON_GPU: ContextVar[bool] = ContextVar("as on a GPU", default=False)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """While open, attention keeps on a CPU what it keeps on a GPU: for plans of memory."""
    token = _AS_ON_GPU.set(True)
    try:
        yield
    finally:
        _AS_ON_GPU.reset(token)


def attention_kernel(
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_width: int = 64,
    compiled: bool = False,
) -> str:
    """Which implementation attention uses on a device, in words for the log."""
    if not compiled and _use_xformers(str(torch.device(device)), dtype, head_width):
        return "xformers.ops.memory_efficient_attention"
    return "torch.nn.functional.scaled_dot_product_attention"


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Softmax attention with scale C**-0.5.

    Args:
        query: (B, L, H, C) dense or (T, H, C) packed.
        key: like ``query``.
        value: like ``query``.
        layout: boundaries and masks.

    Returns:
        Like ``query``.
    """
    # a mask of lengths is no bias that xformers has a fast kernel for; torch takes it as it is
    if (
        not torch.compiler.is_compiling()  # which its choice of a kernel would interrupt
        and layout.key_lengths is None
        and _use_xformers(str(query.device), query.dtype, query.shape[-1])
    ):
        return _attend_xformers(query, key, value, layout)
    if layout.packed is None:
        return _attend_dense(query, key, value, layout.key_lengths, causal=layout.causal)
    # Only attention itself is padded; norms, projections and MLPs stay packed, and these are most
    # of the work. It is exact: padding stands behind every sequence, where no causal token looks,
    # and without a causal mask the lengths hide it.
    packed = layout.packed
    padded = packed.pad(torch.stack((query, key, value), dim=1))  # (B, longest, 3, H, C)
    lengths = None if layout.causal else packed.lengths
    query, key, value = padded.unbind(2)
    return packed.unpad(_attend_dense(query, key, value, lengths, causal=layout.causal))


def _attend_xformers(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    if layout.packed is None:
        bias = LowerTriangularMask() if layout.causal else None
        return memory_efficient_attention(query, key, value, attn_bias=bias)
    bias = layout.packed.block_diagonal
    if layout.causal:
        bias = bias.make_causal()
    # xformers takes packed tokens as a batch of one sequence
    tokens = (item.unsqueeze(0) for item in (query, key, value))
    return memory_efficient_attention(*tokens, attn_bias=bias).squeeze(0)


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, *, causal: bool
) -> Tensor:
    """(B, L, H, C) with PyTorch; queries may be fewer than keys where ``causal`` is off."""
    mask = None
    if key_lengths is not None:
        places = torch.arange(key.shape[1], device=key.device)
        mask = (places < key_lengths[:, None])[:, None, None]  # (B, 1, 1, L)
        if causal:
            mask = mask & (places <= places[:, None])  # (B, 1, L, L)
    query, key, value = (item.transpose(1, 2) for item in (query, key, value))  # (B, H, L, C)
    attended = _product_attention(query, key, value, mask, is_causal=causal and mask is None)
    return attended.transpose(1, 2)


def _product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    """(B, H, L, C) with PyTorch, in float32 on a CPU.

    There torch's backward pass in bfloat16 takes six times that in float32: 178 against 31 ms for
    8 blocks on 128 sequences of 33 tokens and 4 heads, one core, torch 2.15.
    """
    is_slow = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if not is_slow or _AS_ON_GPU.get():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal
        )
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, is_causal=is_causal
        )
    return attended.to(query.dtype)


class QueryKeyValue(nn.Linear):
    """One product for queries, keys and values; rows of the weight in this order."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, queries_of: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values (..., D).

        Args:
            tokens: (..., D).
            queries_of: (..., D) where given, queries are computed of these tokens instead.
        """
        query_bias, key_bias, value_bias = self.bias.chunk(3)
        # A bias on the keys moves every logit of a row alike, so the softmax does not depend on
        # it and its true gradient is zero. What backward computes is rounding noise, which Adam
        # scales up to full steps; runs that should be equal drift apart by it.
        key_bias = key_bias.detach()
        if queries_of is None:
            bias = torch.cat((query_bias, key_bias, value_bias))
            return F.linear(tokens, self.weight, bias).chunk(3, dim=-1)
        width = self.in_features
        query = F.linear(queries_of, self.weight[:width], query_bias)
        both = F.linear(tokens, self.weight[width:], torch.cat((key_bias, value_bias)))
        return query, *both.chunk(2, dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        """(B, L, D) or (T, D), as the layout says; the same shape comes back."""
        query, key, value = (
            item.unflatten(-1, (self.heads, -1)) for item in self.qkv(tokens)
        )  # (..., H, C)
        return self.proj(attend(query, key, value, layout).flatten(-2))

    def forward_pooled_token(
        self, tokens: Tensor, token: Tensor, layout: Layout, attended: Tensor | None
    ) -> Tensor:
        """What one token of every sequence gathers from its sequence.

        Args:
            tokens: (B, L, D) or (T, D).
            token: (B, D) the one token of every sequence.
            layout: as in :meth:`forward`.
            attended: (B,) how many tokens it attends to, from the first on; None: all.

        Returns:
            (B, D).
        """
        query, key, value = self.qkv(tokens, token)
        if layout.packed is not None:
            # one query of each sequence: attention is the least of the cost here, so that padding
            # the keys is cheaper than a kernel of its own
            key, value = layout.packed.pad(torch.stack((key, value), dim=1)).unbind(2)
        query, key, value = (
            item.unflatten(-1, (self.heads, -1)) for item in (query[:, None], key, value)
        )
        gathered = _attend_dense(query, key, value, attended, causal=False)  # (B, 1, H, C)
        return self.proj(gathered.flatten(1))
