"""Attention over dense and packed tokens."""

import math

import pytest
import torch

from frugal.common.models import attention
from frugal.common.models.attention import Attention, attend, attention_kernel
from frugal.common.models.layout import Layout, Packed

LENGTHS = (5, 1, 7, 3)


def slow_attention(query, key, value, visible):
    """One query at a time: ``visible(q)`` tells which keys a query sees. (L, H, C) each."""
    result = torch.zeros_like(query)
    for head in range(query.shape[1]):
        for q in range(len(query)):
            keys = [k for k in range(len(key)) if visible(q, k)]
            logits = [
                (query[q, head] @ key[k, head]).item() / math.sqrt(query.shape[2]) for k in keys
            ]
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            for weight, k in zip(weights, keys, strict=True):
                result[q, head] += weight / sum(weights) * value[k, head]
    return result


def random_tokens(*shape, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tokens = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [item.to(device=device, dtype=dtype) for item in tokens]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention_follows_its_definition(causal, padded):
    query, key, value = random_tokens(3, 6, 2, 4)
    lengths = torch.tensor([6, 1, 4])
    layout = Layout(causal=causal, key_lengths=lengths if padded else None)
    result = attend(query, key, value, layout)
    for row in range(3):
        end = lengths[row] if padded else 6
        expected = slow_attention(
            query[row], key[row], value[row], lambda q, k, e=end: k < e and (k <= q or not causal)
        )
        torch.testing.assert_close(result[row], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(causal):
    query, key, value = random_tokens(sum(LENGTHS), 2, 4)
    layout = Layout(packed=Packed.of(torch.tensor(LENGTHS)), causal=causal)
    result = attend(query, key, value, layout).split(LENGTHS)
    parts = zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True)
    for ours, part in zip(result, parts, strict=True):
        expected = slow_attention(*part, lambda q, k: k <= q or not causal)
        torch.testing.assert_close(ours, expected)


def test_packing_knows_its_boundaries():
    packed = Packed.of(torch.tensor([2, 0, 3]))
    assert packed.sequence.tolist() == [0, 0, 2, 2, 2]
    assert packed.place.tolist() == [0, 1, 0, 1, 2]
    assert packed.starts.tolist() == [0, 2, 2]
    tokens = torch.arange(1.0, 6)[:, None]
    padded = packed.pad(tokens)
    assert padded.squeeze(2).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert torch.equal(packed.unpad(padded), tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_one_picked_token_gathers_what_it_gathers_among_all(packed):
    torch.manual_seed(0)
    module = Attention(12, 3).double()
    tokens = torch.randn(sum(LENGTHS), 12, dtype=torch.float64)
    layout = Layout(packed=Packed.of(torch.tensor(LENGTHS)))
    end = torch.tensor(LENGTHS)
    if not packed:
        tokens, layout = layout.packed.pad(tokens), Layout(key_lengths=end)
    whole = module(tokens, layout)
    place = torch.tensor([4, 0, 2, 1])
    if packed:
        place = place + layout.packed.starts
        picked, expected = tokens[place], whole[place]
    else:
        picked, expected = tokens[torch.arange(4), place], whole[torch.arange(4), place]
    torch.testing.assert_close(module.forward_pooled_token(tokens, picked, layout, end), expected)


@pytest.mark.parametrize("picked", [False, True])
def test_the_bias_of_the_keys_changes_nothing_and_gets_no_gradient(picked):
    torch.manual_seed(0)
    module = Attention(12, 3)
    torch.nn.init.normal_(module.qkv.bias)
    tokens = torch.randn(2, 5, 12)

    def run():
        if picked:
            return module.forward_pooled_token(tokens, tokens[:, 0], Layout(), None)
        return module(tokens, Layout())

    before = run()
    before.square().sum().backward()
    gradient = module.qkv.bias.grad.clone()
    assert torch.all(gradient[12:24] == 0)
    assert torch.all(gradient[:12] != 0)
    assert torch.all(gradient[24:] != 0)
    with torch.no_grad():
        module.qkv.bias[12:24].add_(3)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_named_for_the_log():
    assert attention_kernel("cpu") == "torch.nn.functional.scaled_dot_product_attention"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS, (3, 0, 2)])
def test_xformers_is_asked_for_the_same_attention(monkeypatch, causal, lengths):
    """Its kernels need a GPU; what they are asked is computed here from xformers' own masks."""
    ops = pytest.importorskip("xformers.ops")

    def reference(query, key, value, attn_bias=None):
        logits = torch.einsum("bqhc,bkhc->bhqk", query, key) / query.shape[3] ** 0.5
        if attn_bias is not None:
            logits = logits + attn_bias.materialize(logits.shape, dtype=logits.dtype)
        return torch.einsum("bhqk,bkhc->bqhc", logits.softmax(3), value)

    monkeypatch.setattr(ops, "memory_efficient_attention", reference)
    shape = (2, 6, 2, 4) if lengths is None else (sum(lengths), 2, 4)
    tokens = random_tokens(*shape)
    packed = None if lengths is None else Packed.of(torch.tensor(lengths))
    layout = Layout(packed=packed, causal=causal)
    expected = attend(*tokens, layout)
    monkeypatch.setattr(attention, "_use_xformers", lambda *_: True)
    torch.testing.assert_close(attend(*tokens, layout), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 80, 88, 104, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_on_the_gpu_equals_a_float64_reference(dtype, width, causal, packed):
    shape = (sum(LENGTHS), 4, width) if packed else (3, 37, 4, width)
    lengths = torch.tensor(LENGTHS)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        tokens = [item.to(device, kind) for item in random_tokens(*shape, dtype=dtype)]
        for item in tokens:
            item.requires_grad_()
        layout = Layout(packed=Packed.of(lengths.to(device)) if packed else None, causal=causal)
        result = attend(*tokens, layout)
        result.sin().sum().backward()
        results.append([result, *(item.grad for item in tokens)])
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-3}[dtype]
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_is_used_on_the_gpu_where_it_is_installed():
    pytest.importorskip("xformers")
    assert attention_kernel("cuda") == "xformers.ops.memory_efficient_attention"
