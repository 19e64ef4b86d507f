"""The loss of caption tokens against recorded numbers of the reference, and in the objective."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contrastive_cases import MODEL, Engine, Uneven, batch_of, gradients, recipe
from safetensors.torch import load_file
from torch import Tensor, nn

from frugal.cit.objective import LockedContrastive
from frugal.cit.recipes import RECIPES as CIT
from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.contracts import Batch
from frugal.common.errors import InputError
from frugal.common.objectives.contrastive import Contrastive, ContrastiveObjective
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.objectives.token_loss import TokenLoss
from frugal.common.reduction.image import KeepAll, KeptPatches
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import open_checkpoint, trained_objective
from frugal.common.weights.save import save_run
from support import ALONE, saved_tensors, train

GOLDEN = Path(__file__).parents[2] / "golden" / "extras"


def recorded(case: str) -> tuple[dict, dict[str, Tensor]]:
    return (
        json.loads((GOLDEN / f"{case}.json").read_text()),
        load_file(GOLDEN / f"{case}.safetensors"),
    )


def captions(ids: Tensor, lengths: Tensor | None = None, valid: Tensor | None = None) -> Batch:
    count, length = ids.shape
    return Batch(
        images=torch.zeros(count, 3, 0, 0),
        sample_numbers=torch.arange(count),
        valid=torch.ones(count).bool() if valid is None else valid,
        token_ids=ids,
        # padding counts as a token in the reference
        text_lengths=torch.full((count,), length) if lengths is None else lengths,
    )


def of_scores(vocabulary: int) -> TokenLoss:
    """A loss that is given the scores themselves."""
    loss = TokenLoss(1, vocabulary)
    loss.norm, loss.head = nn.Identity(), nn.Identity()
    return loss


@pytest.mark.parametrize("case", ["superclip_v64_b4", "superclip_v80_b5_fullrows"])
def test_steps_give_the_recorded_statistics_losses_and_gradients(case: str) -> None:
    about, numbers = recorded(case)
    loss = of_scores(about["V"])
    for step in range(about["steps"]):
        labels, scores = numbers[f"s{step}_labels"], numbers[f"s{step}_logits"].requires_grad_()
        batch = captions(labels)
        loss.count([batch])
        found = loss.with_token / about["B"]
        torch.testing.assert_close(
            found.double(), numbers[f"s{step}_f_after"][0], rtol=0, atol=1e-6
        )
        assert loss.captions.item() / about["B"] == numbers[f"s{step}_n_after"].item()
        rarity = numbers[f"s{step}_weights"][0]
        torch.testing.assert_close(loss._rarity(), rarity, rtol=0, atol=1e-6)
        mean = loss(scores, batch).mean()
        assert mean.item() == pytest.approx(about["class_loss"][step], abs=1e-5)
        mean.backward()
        wanted = numbers[f"s{step}_grad_logits"]
        torch.testing.assert_close(scores.grad, wanted, rtol=0, atol=1e-7)


def test_two_processes_give_the_recorded_losses() -> None:
    about, numbers = recorded("superclip_two_ranks")
    loss = of_scores(about["V"])
    for step in range(about["steps"]):
        batches = [captions(numbers[f"s{step}_r{rank}_labels"]) for rank in (0, 1)]
        loss.count(batches)
        for rank, batch in enumerate(batches):
            found = loss(numbers[f"s{step}_r{rank}_logits"], batch).mean().item()
            assert found == pytest.approx(about["class_loss"][step][rank], abs=1e-5)


def test_the_layer_gives_the_recorded_loss_and_gradients() -> None:
    about, numbers = recorded("superclip_head")
    loss = TokenLoss(about["W"], about["V"])
    loss.norm.weight.data.copy_(numbers["ln_weight"])
    loss.norm.bias.data.copy_(numbers["ln_bias"])
    loss.head.weight.data.copy_(numbers["linear_weight"])
    loss.head.bias.data.copy_(numbers["linear_bias"])
    batch = captions(numbers["labels"])
    loss.count([batch])
    patches = numbers["patch_tokens"].requires_grad_()
    mean = loss(patches.mean(dim=1), batch).mean()
    assert mean.item() == pytest.approx(about["class_loss"], abs=1e-5)
    mean.backward()
    found = {
        "patch_tokens": patches.grad, "ln_weight": loss.norm.weight.grad,
        "ln_bias": loss.norm.bias.grad, "linear_weight": loss.head.weight.grad,
        "linear_bias": loss.head.bias.grad,
    }  # fmt: skip
    names = {name.removeprefix("grad_") for name in numbers if name.startswith("grad_")}
    assert names and names <= found.keys()
    for name in names:
        torch.testing.assert_close(found[name], numbers[f"grad_{name}"], rtol=0, atol=1e-6)


def test_padding_is_no_token_though_its_id_is_that_of_a_word() -> None:
    loss = of_scores(5)
    ids = torch.tensor([[1, 0, 3, 0], [1, 2, 2, 0], [4, 4, 4, 4]])
    batch = captions(ids, torch.tensor([3, 3, 4]), torch.tensor([True, True, False]))
    loss.count([batch])
    assert loss.captions.item() == 2
    assert loss.with_token.tolist() == [1, 2, 1, 1, 0]  # a damaged sample is not counted
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    found = loss(scores, batch)
    # 1 stands in every caption: it weighs nothing; 0 and 3 share the target of the first
    log_shares = scores.log_softmax(dim=1)
    wanted = -(log_shares[0, 0] + log_shares[0, 3]) / 2
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found[1].item() == pytest.approx(-log_shares[1, 2].item(), rel=1e-6)


def test_equal_captions_tell_nothing_and_give_no_gradient() -> None:
    loss = of_scores(5)
    batch = captions(torch.tensor([[1, 2], [1, 2]]))
    loss.count([batch])
    scores = torch.randn(2, 5).requires_grad_()
    found = loss(scores, batch)
    found.sum().backward()
    assert not found.any() and not scores.grad.any()


def test_many_rows_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    loss = TokenLoss(8, 50)
    loss.initialize(generator)
    batch = captions(torch.randint(50, (7, 6), generator=generator))
    loss.count([batch])
    patches = torch.randn(7, 8, generator=generator)
    whole = loss(patches, batch)
    monkeypatch.setattr("frugal.common.objectives.token_loss._ROWS", 3)
    torch.testing.assert_close(loss(patches, batch), whole)


# ------------------------------------------------------------------------------------------------
# In the objective


def objective(**parts: object) -> ContrastiveObjective:
    return Contrastive(token_loss=0.5).build(recipe(Contrastive(), **parts))


@pytest.mark.parametrize("image", [
    MODEL.image, replace(MODEL.image, pooling="class"),
    replace(MODEL.image, norm_after_pooling=True),
    replace(MODEL.image, class_token="none"),
], ids=["mean", "class", "norm after pooling", "no class token"])  # fmt: skip
@pytest.mark.parametrize("reduction", [KeepAll(), Uneven()], ids=["dense", "packed"])
def test_the_second_loss_is_added_and_the_first_stays(image, reduction) -> None:
    parts = {"model": replace(MODEL, image=image), "reduction": SimpleNamespace(image=reduction)}
    mine, batch = objective(**parts), batch_of()
    plain = Contrastive().build(recipe(Contrastive(), **parts))
    state = mine.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    mine.begin_step([batch])
    loss, metrics = mine(batch)
    first, _ = plain(batch)
    torch.testing.assert_close(loss, first + 0.5 * metrics["token_loss"])
    # the mean of patch tokens, one image at a time
    view, noise = mine.patch_view(batch)
    kept = reduction.keep(view, noise=noise)
    skip, losses = int(image.class_token != "none"), []
    for number in range(len(batch)):
        row = batch.rows(number, number + 1)
        stays = None if kept is None else KeptPatches.where(kept.mask(8)[number : number + 1])
        tokens = mine.model.image.forward_tokens(row.images, stays).view(-1, image.width)
        losses.append(mine.token_loss(tokens[skip:].mean(dim=0, keepdim=True), row))
    wanted = torch.cat(losses)[batch.valid].mean()
    torch.testing.assert_close(metrics["token_loss"], wanted.detach())


def test_caching_gives_the_same_gradients() -> None:
    whole, cached = objective().double(), objective().double()
    batch = batch_of()
    for one in (whole, cached):
        one.begin_step([batch])
    loss, metrics = whole(batch)
    loss.backward()
    found = cached_backward(Engine(cached), batch, 3, 1.0, last=True)
    assert found["token_loss"].item() == pytest.approx(metrics["token_loss"].item(), rel=1e-12)
    wanted = gradients(whole)
    assert wanted.keys() == gradients(cached).keys() and "token_loss.head.weight" in wanted
    for name, gradient in gradients(cached).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)


def test_counts_are_of_all_micro_batches_and_of_valid_samples() -> None:
    one, other = objective(), objective()
    batch = batch_of(8)
    one.begin_step([batch])
    other.begin_step([batch.rows(0, 3), batch.rows(3, 8)])
    assert torch.equal(one.token_loss.with_token, other.token_loss.with_token)
    assert one.token_loss.captions.item() == 7


def test_what_has_no_patches_or_words_is_refused() -> None:
    demo = CIT["demo"]()
    with pytest.raises(InputError, match=r"token_loss teaches .*train_image=none trains none"):
        replace(demo, objective=replace(demo.objective, token_loss=1.0, train_image="none"))
    assert isinstance(demo.objective, LockedContrastive)
    batch = replace(batch_of(), text_lengths=None)
    with pytest.raises(InputError, match="needs captions and their lengths"):
        objective().begin_step([batch])
    with pytest.raises(InputError, match=r"objective\.token_loss is -1"):
        Contrastive(token_loss=-1.0)


def test_it_costs_what_its_layer_costs() -> None:
    mine, plain = objective(), Contrastive().build(recipe(Contrastive()))
    metrics = {"image_tokens": 9.0, "text_tokens": 5.0}
    assert mine.step_flops(metrics) - plain.step_flops(metrics) == 3 * 2 * 16 * 50
    head = mine.token_loss.head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(16), rel=0.1)
    assert not head.bias.any()


def tiny(tmp_path: Path, scenes: Path, name: str, *words: str) -> tuple[Path, str]:
    given = (f"--data.train={scenes / 'train'}", "--schedule.samples=48")
    said = train(ALONE, tmp_path / name, *given, "--schedule.warmup-samples=24", *words)
    return tmp_path / name, said


@pytest.mark.slow
def test_a_stage_begins_with_it_without_it_or_anew_and_exports_leave_it_behind(
    scenes: Path, tmp_path: Path
) -> None:
    with_it = "--objective.token-loss=1"
    first, _ = tiny(tmp_path, scenes, "first", with_it)
    second, said = tiny(tmp_path, scenes, "second", f"--run.start-from={first}")
    assert "without its token_loss" in said
    third, said = tiny(tmp_path, scenes, "third", f"--run.start-from={second}", with_it)
    assert "token_loss new" in said
    assert "weight/token_loss.head.weight" in saved_tensors(third)
    _, said = tiny(tmp_path, scenes, "fourth", f"--run.start-from={third}", with_it)
    assert "token_loss new" not in said and "without" not in said
    save_run(third, tmp_path / "exported")
    saved = find_checkpoint(tmp_path / "exported").names()
    assert saved and all(name.startswith("weight/model.") for name in saved)
    assert load_model(tmp_path / "exported").config == load_model(third).config
    # the whole objective, as a report draws its examples with
    checkpoint, recipe = open_checkpoint(tmp_path / "exported")
    trained_objective(recipe, checkpoint)
