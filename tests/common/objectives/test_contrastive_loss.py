import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from frugal.common.objectives import contrastive_loss as module
from frugal.common.objectives.contrastive_loss import (
    BOTH,
    LARGEST_LOG_SCALE,
    clip_log_scale,
    contrastive_loss,
    sigmoid_loss,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "flip"


def unit_rows(seed: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1).to(dtype)


def slow_softmax(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    valid: Tensor,
    directions: tuple = BOTH,
    groups: Tensor | None = None,
) -> Tensor:
    """The definition, sample by sample, over the valid samples only."""
    logits = log_scale.exp() * images[valid] @ texts[valid].T
    of = (torch.arange(len(valid)) if groups is None else groups)[valid]
    rows = []
    for direction in directions:
        table = logits if direction == "image_to_text" else logits.T
        rows.append(
            torch.stack([row.logsumexp(0) - row[of == of[i]].mean() for i, row in enumerate(table)])
        )
    return torch.stack(rows).mean()


def slow_sigmoid(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    valid: Tensor,
    groups: Tensor | None = None,
) -> Tensor:
    images, texts = images[valid], texts[valid]
    of = (torch.arange(len(valid)) if groups is None else groups)[valid]
    total = torch.zeros((), dtype=images.dtype)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = log_scale.exp() * (image @ text) + bias
            total = total - F.logsigmoid(logit if of[i] == of[j] else -logit).sum()
    return total / len(images)


def leaves(*values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [value.to(dtype).clone().requires_grad_() for value in values]


def assert_same_gradients(ours: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        scale = theirs.grad.abs().max().item()
        error = (mine.grad.double() - theirs.grad).abs().max().item()
        assert error <= tolerance * scale + 1e-9


GROUPS = torch.tensor([3, 1, 3, 0, 9, 9, 3, 5, -2, 1, 3, -2, 0])
"""Of which tests bar one of four, all of a pair, and one of a pair."""


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["alone", "groups"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 50, None])
@pytest.mark.parametrize("directions", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("log_scale", [0.0, 2.659, LARGEST_LOG_SCALE])
@pytest.mark.parametrize("all_valid", [True, False])
def test_softmax_equals_the_float64_definition(
    groups: Tensor | None,
    chunk: int | None,
    directions: tuple,
    log_scale: float,
    all_valid: bool,
) -> None:
    images, texts = unit_rows(1, 13, 5), unit_rows(2, 13, 5)
    valid = torch.ones(13).bool()
    if not all_valid:
        valid[torch.tensor([0, 4, 5, 12])] = False
    scale = torch.tensor([log_scale])
    ours = leaves(images, texts, scale, dtype=torch.float32)
    reference = leaves(images, texts, scale, dtype=torch.float64)
    options = {"valid": valid, "directions": directions, "groups": groups}
    loss, _ = contrastive_loss(*ours, chunk=chunk, **options)
    expected = slow_softmax(*reference, **options)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-6)
    assert_same_gradients(ours, reference, 2e-5)


@pytest.mark.parametrize("groups", [None, GROUPS[:11]], ids=["alone", "groups"])
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(("log_scale", "bias"), [(math.log(10), -10.0), (4.0, 3.0)])
@pytest.mark.parametrize("all_valid", [True, False])
def test_sigmoid_equals_the_float64_definition(
    groups: Tensor | None, chunk: int | None, log_scale: float, bias: float, all_valid: bool
) -> None:
    images, texts = unit_rows(3, 11, 6), unit_rows(4, 11, 6)
    valid = torch.ones(11).bool()
    if not all_valid:
        valid[torch.tensor([2, 3, 10])] = False
    values = (images, texts, torch.tensor([log_scale]), torch.tensor([bias]))
    ours = leaves(*values, dtype=torch.float32)
    reference = leaves(*values, dtype=torch.float64)
    loss, _ = sigmoid_loss(*ours, valid=valid, groups=groups, chunk=chunk)
    expected = slow_sigmoid(*reference, valid=valid, groups=groups)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same_gradients(ours, reference, 2e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_groups_of_one_change_no_bit(kind: str) -> None:
    found = []
    for groups in (None, torch.arange(13) * 7 - 30):
        scale, bias = torch.tensor([3.0]), torch.tensor([-2.0])
        values = leaves(unit_rows(7, 13, 5), unit_rows(8, 13, 5), scale, bias, dtype=torch.float32)
        options = {"valid": torch.arange(13) != 6, "chunk": 4, "groups": groups}
        if kind == "softmax":
            out = contrastive_loss(*values[:3], **options)
        else:
            out = sigmoid_loss(*values, **options)
        out.loss.backward()
        found.append([*out, *(v.grad for v in values if v.grad is not None)])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_whoever_finds_one_of_its_group_has_found_it() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[1, 0, 3, 2]]  # every image finds its neighbor's caption
    options = {"log_scale": torch.tensor([1.0])}
    assert contrastive_loss(images, texts, **options).accuracy == 0.0
    groups = torch.tensor([5, 5, 6, 7])
    assert contrastive_loss(images, texts, groups=groups, **options).accuracy == 0.5
    bias = torch.tensor([-1.0])
    found = sigmoid_loss(images, texts, logit_bias=bias, groups=groups, **options)
    assert found.accuracy == 0.5


@pytest.mark.parametrize("piece", [1, 4, 13])
@pytest.mark.parametrize("chunk", [3, None])
def test_gathering_in_pieces_changes_nothing(
    piece: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = torch.arange(13) != 6
    values = (unit_rows(1, 13, 5), unit_rows(2, 13, 5), torch.tensor([3.0]), torch.tensor([-2.0]))
    whole, pieces = leaves(*values, dtype=torch.float64), leaves(*values, dtype=torch.float64)
    losses = []
    for inputs in (whole, pieces):
        softmax = contrastive_loss(*inputs[:3], valid=valid, chunk=chunk)
        sigmoid = sigmoid_loss(*inputs, valid=valid, chunk=chunk)
        losses.append(torch.stack([*softmax, *sigmoid]))
        (softmax.loss + sigmoid.loss).backward()
        monkeypatch.setattr(module, "_PIECE_NUMBERS", piece * 5)
    torch.testing.assert_close(*losses)
    assert_same_gradients(pieces, whole, 1e-12)


def test_gradients_pass_gradcheck() -> None:
    images = unit_rows(5, 4, 3, torch.float64).requires_grad_()
    texts = unit_rows(6, 4, 3, torch.float64).requires_grad_()
    scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, False, True, True])

    def softmax(*inputs: Tensor) -> Tensor:
        return contrastive_loss(*inputs, valid=valid, chunk=3).loss

    def sigmoid(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, valid=valid, chunk=3).loss

    def grouped(*inputs: Tensor) -> Tensor:
        groups = torch.tensor([2, 2, 2, 0])
        together = contrastive_loss(*inputs[:3], valid=valid, groups=groups, chunk=3).loss
        return together + sigmoid_loss(*inputs, valid=valid, groups=groups, chunk=3).loss

    assert torch.autograd.gradcheck(grouped, (images, texts, scale, bias))
    assert torch.autograd.gradcheck(softmax, (images, texts, scale))
    assert torch.autograd.gradcheck(sigmoid, (images, texts, scale, bias))


def test_flip_golden_losses_and_gradients() -> None:
    golden = load_file(GOLDEN / "loss.safetensors")
    for case, raw in enumerate(golden["logit_scale_raw"]):
        values = leaves(golden["z_img"], golden["z_txt"], raw[None], dtype=torch.float32)
        loss, _ = contrastive_loss(values[0], values[1], clip_log_scale(values[2]), chunk=3)
        loss.backward()
        torch.testing.assert_close(loss, golden["loss"][case], rtol=1e-5, atol=1e-5)
        tau = 1 / clip_log_scale(values[2]).exp()
        torch.testing.assert_close(tau[0], golden["tau"][case], rtol=1e-6, atol=0.0)
        for value, name in zip(values, ("z_img", "z_txt", "logit_scale"), strict=True):
            expected = golden[f"grad_{name}"][case].view_as(value)
            torch.testing.assert_close(value.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("raw", [-0.5, LARGEST_LOG_SCALE + 1e-3, 6.0])
def test_forward_clip_gives_no_gradient_outside_of_its_bounds(raw: float) -> None:
    log_scale = torch.tensor([raw], requires_grad=True)
    images, texts = unit_rows(1, 6, 4), unit_rows(2, 6, 4)
    loss, _ = contrastive_loss(images, texts, clip_log_scale(log_scale))
    loss.backward()
    nearest = torch.tensor([0.0 if raw < 0 else LARGEST_LOG_SCALE])
    assert log_scale.grad == 0
    assert loss == contrastive_loss(images, texts, nearest).loss


def test_identical_rows_at_the_largest_scale_neither_overflow_nor_lose_digits() -> None:
    images = unit_rows(7, 16, 64)
    values = leaves(images, images, torch.tensor([LARGEST_LOG_SCALE]), dtype=torch.float32)
    loss, accuracy = contrastive_loss(*values, chunk=5)
    loss.backward()
    logits = 100 * images.double() @ images.double().T
    others = (logits - logits.diagonal()[:, None]).exp().masked_fill(torch.eye(16).bool(), 0.0)
    expected = others.sum(1).log1p().mean().item()
    assert 0 < expected < 1e-12
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=0.0)
    assert accuracy == 1
    assert all(value.grad is not None and value.grad.isfinite().all() for value in values)


def test_one_vector_for_everything_costs_the_logarithm_of_the_batch() -> None:
    same = unit_rows(8, 1, 4).expand(10, 4)
    values = leaves(same, same, torch.tensor([LARGEST_LOG_SCALE]), dtype=torch.float32)
    loss, accuracy = contrastive_loss(*values, chunk=4)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(10), rel=1e-5)
    assert accuracy == 0
    assert all(value.grad is not None and value.grad.isfinite().all() for value in values)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_equal_open_clip(kind: str) -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    images, texts = unit_rows(9, 12, 8), unit_rows(10, 12, 8)
    scale, bias = torch.tensor([2.0]), torch.tensor([-5.0])
    ours = leaves(images, texts, scale, bias, dtype=torch.float32)
    theirs = leaves(images, texts, scale, bias, dtype=torch.float64)
    if kind == "softmax":
        loss = contrastive_loss(*ours[:3], chunk=5).loss
        expected = open_clip_loss.ClipLoss()(theirs[0], theirs[1], theirs[2].exp())
        ours, theirs = ours[:3], theirs[:3]
    else:
        loss = sigmoid_loss(*ours, chunk=5).loss
        expected = open_clip_loss.SigLipLoss()(theirs[0], theirs[1], theirs[2].exp(), theirs[3])
    loss.backward()
    expected.sum().backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(ours, theirs, 1e-5)


@pytest.mark.parametrize("rubbish", [0.0, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_samples_that_are_not_valid_count_nowhere(kind: str, rubbish: float) -> None:
    images, texts = unit_rows(11, 9, 4), unit_rows(12, 9, 4)
    valid = torch.tensor([True, True, False, True, False, False, True, True, False])
    dirty_images = images.masked_fill(~valid[:, None], rubbish)
    dirty_texts = texts.masked_fill(~valid[:, None], rubbish)
    rest = (torch.tensor([LARGEST_LOG_SCALE]), torch.tensor([-2.0]))
    dirty = leaves(dirty_images, dirty_texts, *rest, dtype=torch.float32)
    clean = leaves(images[valid], texts[valid], *rest, dtype=torch.float32)
    if kind == "softmax":
        loss, accuracy = contrastive_loss(*dirty[:3], valid=valid, chunk=4)
        expected, expected_accuracy = contrastive_loss(*clean[:3])
        used = 3
    else:
        loss, accuracy = sigmoid_loss(*dirty, valid=valid, chunk=4)
        expected, expected_accuracy = sigmoid_loss(*clean)
        used = 4
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert accuracy.item() == pytest.approx(expected_accuracy.item())
    for side in range(2):
        gradient = dirty[side].grad
        assert gradient is not None
        assert (gradient[~valid] == 0).all()
        torch.testing.assert_close(gradient[valid], clean[side].grad, rtol=1e-4, atol=1e-6)
    for place in range(2, used):
        torch.testing.assert_close(dirty[place].grad, clean[place].grad, rtol=1e-4, atol=1e-6)


def test_invalid_samples_stay_harmless_where_all_others_score_far_below_them() -> None:
    images = unit_rows(1, 1, 4).repeat(6, 1)
    valid = torch.arange(6) != 3
    values = leaves(images, -images, torch.tensor([LARGEST_LOG_SCALE]), dtype=torch.float32)
    loss, _ = contrastive_loss(*values, valid=valid)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), rel=1e-5)
    assert all(value.grad is not None and value.grad.isfinite().all() for value in values)


@pytest.mark.parametrize("num_valid", [0, 1])
def test_nothing_to_tell_apart_costs_nothing(num_valid: int) -> None:
    values = leaves(
        unit_rows(1, 5, 4), unit_rows(2, 5, 4), torch.tensor([3.0]), dtype=torch.float32
    )
    loss, _ = contrastive_loss(*values, valid=torch.arange(5) < num_valid)
    loss.backward()
    assert loss == 0
    assert all(value.grad is not None and (value.grad == 0).all() for value in values)


def test_autocast_does_not_reach_the_logits() -> None:
    images, texts = unit_rows(13, 20, 16), unit_rows(14, 20, 16)
    scale, bias = torch.tensor([LARGEST_LOG_SCALE]), torch.tensor([-5.0])
    inside = leaves(images, texts, scale, bias, dtype=torch.float32)
    outside = leaves(images, texts, scale, bias, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(*inside[:3]).loss + sigmoid_loss(*inside).loss
        loss.backward()
    expected = contrastive_loss(*outside[:3]).loss + sigmoid_loss(*outside).loss
    expected.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for mine, theirs in zip(inside, outside, strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_half_precision_features_are_compared_in_float32() -> None:
    images = unit_rows(15, 10, 8).bfloat16().requires_grad_()
    texts = unit_rows(16, 10, 8).bfloat16().requires_grad_()
    scale = torch.tensor([4.0])
    loss, _ = contrastive_loss(images, texts, scale)
    expected, _ = contrastive_loss(images.float(), texts.float(), scale)
    loss.backward()
    assert torch.equal(loss, expected)
    assert images.grad is not None and images.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["images", "texts"])
def test_a_side_without_gradient_stays_without(frozen: str) -> None:
    values = dict(
        zip(
            ("images", "texts", "scale"),
            leaves(
                unit_rows(1, 6, 4), unit_rows(2, 6, 4), torch.tensor([2.0]), dtype=torch.float32
            ),
            strict=True,
        )
    )
    both = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    values[frozen].requires_grad_(False)
    contrastive_loss(*values.values()).loss.backward()
    contrastive_loss(*both.values()).loss.backward()
    assert values[frozen].grad is None
    for name in values.keys() - {frozen}:
        assert torch.equal(values[name].grad, both[name].grad)  # type: ignore[arg-type]


def test_accuracy_is_the_share_of_partners_that_score_highest() -> None:
    images = unit_rows(17, 40, 3)
    texts = F.normalize(images + unit_rows(18, 40, 3) * torch.linspace(0, 1, 40)[:, None], dim=1)
    scale, bias = torch.tensor([1.0]), torch.tensor([-3.0])
    valid = torch.arange(40) % 7 != 0
    scores = (images[valid] @ texts[valid].T).double()
    own = torch.arange(len(scores))
    by_image = (scores.argmax(1) == own).double().mean().item()
    by_text = (scores.argmax(0) == own).double().mean().item()
    assert by_image != by_text
    softmax = contrastive_loss(images, texts, scale, valid=valid, chunk=9)
    reverse = contrastive_loss(images, texts, scale, valid=valid, directions=BOTH[1:])
    sigmoid = sigmoid_loss(images, texts, scale, bias, valid=valid, chunk=9)
    assert softmax.accuracy.item() == pytest.approx(by_image)
    assert sigmoid.accuracy.item() == pytest.approx(by_image)
    assert reverse.accuracy.item() == pytest.approx(by_text)
    assert not softmax.accuracy.requires_grad


def test_a_frozen_or_scalar_scale_is_taken() -> None:
    images = unit_rows(1, 6, 4).requires_grad_()
    texts = unit_rows(2, 6, 4).requires_grad_()
    loss, _ = contrastive_loss(images, texts, torch.tensor(2.0))
    assert torch.equal(loss, contrastive_loss(images, texts, torch.tensor([2.0])).loss)
    scalar = torch.tensor(2.0, requires_grad=True)
    contrastive_loss(images, texts, scalar).loss.backward()
    assert scalar.grad is not None and scalar.grad.shape == ()
