"""Plans of recipes: every one has a cost, the largest micro-batch fits, mistakes are sentences."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.cit.recipes import RECIPES as CIT
from frugal.clipa.recipes import RECIPES as CLIPA
from frugal.cluster_masking.recipes import RECIPES as CLUSTER_MASKING
from frugal.common.errors import InputError
from frugal.common.models.flops import image_flops, projection_flops
from frugal.common.optim.muon import Muon
from frugal.common.plan.__main__ import Options, plan, table
from frugal.common.plan.fake_step import StepMemory, step_memory
from frugal.common.plan.partition import Zero, peak_memory
from frugal.common.plan.report import (
    Line,
    Plan,
    cost_of,
    facts,
    largest_batch,
    lines,
    memory_table,
    published_shares,
)
from frugal.flip.recipes import RECIPES as FLIP
from frugal.flip.recipes import demo
from frugal.milan.recipes import RECIPES as MILAN
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING
from support import ROOT

pytestmark = pytest.mark.slow

PROGRAMS = {
    "flip.train": FLIP, "clipa.train": CLIPA, "cluster_masking.train": CLUSTER_MASKING,
    "cit.train": CIT, "milan.pretrain": MILAN, "milan.finetune": FINE_TUNING,
    "milan.linear_probe": LINEAR_PROBING, "milan.segment": SEGMENTATION,
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_readme_shows_the_time_of_every_recipe(program: str) -> None:
    """``python -m frugal.common.plan PROGRAM`` writes the rows."""
    text = (ROOT / "packages" / program.partition(".")[0] / "README.md").read_text()
    shown = text.partition(f"<!-- python -m frugal.common.plan {program} -->\n")[2]
    rows = shown.partition("\n<!-- end of plan -->")[0].split("\n")
    assert rows == list(table(program, gpus=8, gpu="h100-80"))
    names = {name for row in rows for name in re.findall("`([^`]+)`", row)}
    assert names == {name for name in PROGRAMS[program] if not name.startswith("demo")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_demo_of_every_program_is_planned(program: str, tmp_path: Path) -> None:
    recipe = PROGRAMS[program]["demo"]()
    found = list(
        lines(Plan(recipe, gpus=2, gpu="a100-40"), None, engine="Accelerate", about="", price=2.0)
    )
    assert {line.name for line in found} >= {"parameters", "memory of a GPU", "speed", "time"}
    assert all(line.known for line in found)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    recipe, room = MILAN["demo-pixels"](), 30e6

    def take(samples: int) -> StepMemory:
        return step_memory(recipe, samples=samples)

    def total(step: StepMemory) -> int:
        return peak_memory(step, None, world_size=1, moments=2).total

    largest = largest_batch(take, lambda step: total(step) <= room)
    assert largest > 32
    # taken anew, not read off the line
    assert total(take(largest)) <= room < total(take(largest + 1))
    assert largest_batch(take, lambda step: total(step) <= 1e6) == 0


def cached(*, batch: int, **engine: object) -> Plan:
    recipe = replace(demo(), batch_size=batch)
    return Plan(replace(recipe, engine=replace(recipe.engine, **engine)), gpus=1, gpu="rtx4090")


@pytest.mark.parametrize(("chunk", "samples"), [(16, 64), (64, 200), (64, 64)])
def test_what_further_chunks_add_is_what_steps_of_all_chunks_have(chunk: int, samples: int) -> None:
    planned = cached(batch=samples, cache_chunk=chunk)
    whole = planned._take(samples, planned.recipe)
    found, expected = (planned.memory(step, None) for step in (planned.step, whole))
    assert planned.step.batch == whole.batch and planned.step.exchanged == whole.exchanged
    assert found.gradients == expected.gradients
    assert found.total == pytest.approx(expected.total, rel=0.02)
    assert found.activations == pytest.approx(expected.activations, rel=0.05)


def test_the_chunk_that_is_advised_fits_and_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cached(batch=512)
    needed = plain.memory(plain.step, None).total
    monkeypatch.setattr("frugal.common.plan.report.usable_memory", lambda _: 0.5 * needed)
    (advice,) = (line.text for line in said(plain) if line.name == "advice")
    chunk = int(re.search(r"--engine.cache-chunk (\d+)", advice)[1])
    advised = cached(batch=512, cache_chunk=chunk)
    names = {line.name for line in said(advised)}
    assert "advice" not in names and "computed twice" in names
    larger = cached(batch=512, cache_chunk=round(1.2 * chunk))
    (advice,) = (line.text for line in said(larger) if line.name == "advice")
    assert f"--engine.cache-chunk {chunk}" in advice, "one that is given is corrected too"
    hours = [plan.cost.gpu_hours("rtx4090", 0.2) for plan in (plain, advised)]
    assert hours[1] / hours[0] == pytest.approx(4 / 3, rel=0.01), "forward twice, backward once"


def said(planned: Plan) -> list[Line]:
    return list(lines(planned, None, engine="Accelerate", about="", price=None))


def test_flip_halves_the_compute_as_its_paper_says() -> None:
    halved, quartered = (cost_of(FLIP[n]()) for n in ("ablation-mask50-64k", "ablation-mask75-64k"))
    assert halved.flops / halved.dense_flops == pytest.approx(0.52, abs=0.005)
    assert quartered.flops / quartered.dense_flops == pytest.approx(0.28, abs=0.005)


def test_hours_follow_from_flops_peak_and_share() -> None:
    cost = cost_of(demo())
    by_hand = cost.flops * 280_000 / (312e12 * 0.2) / 3600
    assert cost.gpu_hours("a100-80", 0.2) == pytest.approx(by_hand)


def test_published_facts_are_whole_and_within_reason() -> None:
    shares = published_shares()
    assert len(shares) == len(facts()["runs"]) and all(0.05 < s < 0.6 for s in shares.values())
    assert all(fact["source"] for fact in [*facts()["gpus"].values(), *facts()["runs"]])


def test_memory_of_every_file_is_a_row_of_a_table() -> None:
    planned = Plan(MILAN["demo-pixels"](), gpus=2, gpu="rtx4090")
    rows = list(memory_table(planned, {"zero3": Zero(stage=3)}))
    assert len(rows) == 2 + 2 and all(row.count("|") == rows[0].count("|") for row in rows)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("milan:vit-b16", "there is no program 'milan'"),
        ("nothing:demo", "there is no program 'nothing'"),
        ("flip:dem", "there is no recipe 'dem'"),
        ("gone.json", "there is no recipe at gone.json"),
    ],
)
def test_what_is_not_there_is_a_sentence(word: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan(Options(recipe=word), [])


def test_gpus_that_do_not_divide_the_batch_are_a_sentence() -> None:
    with pytest.raises(InputError, match="does not divide among 7 processes"):
        plan(Options(recipe="flip:demo", gpus=7), [])


def test_products_in_float32_take_more_memory_and_are_told_to_be_slower() -> None:
    recipe = MILAN["demo-pixels"]()
    exact = replace(recipe, engine=replace(recipe.engine, precision="float32"))
    plans = [Plan(one, gpus=2, gpu="a100-40") for one in (recipe, exact)]
    memory = [one.memory(one.step, None).activations for one in plans]
    assert memory[0] < memory[1]
    told = list(lines(plans[1], None, engine="Accelerate", about="", price=None))
    assert "float32 products do not reach" in next(one.known for one in told if one.name == "speed")


def test_flags_of_the_recipe_change_it(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(recipe="flip:demo", gpus=2)
    plan(options, ["--reduction.image.mask-ratio=0.75"])
    assert "5 image tokens" in capsys.readouterr().out  # 4 of 16 patches and the class token


def test_muon_keeps_one_moment_of_matrices_and_gathers_them() -> None:
    given = demo()
    options = Muon(learning_rate=given.optimizer.learning_rate)
    plan = Plan(replace(given, optimizer=options), gpus=2, gpu="a100-40")
    named = dict(plan.outline.named_parameters())
    sizes = {name: parameter.numel() for name, parameter in named.items()}
    matrices = {n for n in sizes if ".blocks." in n and n.endswith("weight") and named[n].ndim == 2}
    of_matrices, total = sum(sizes[name] for name in matrices), sum(sizes.values())
    assert plan.moments == pytest.approx(2 - of_matrices / total)
    with_adamw = Plan(given, gpus=2, gpu="a100-40")
    assert with_adamw.moments == 2
    found, before = (one.memory(plan.step, Zero(stage=1)) for one in (plan, with_adamw))
    assert before.moments - found.moments == pytest.approx(4 * of_matrices / 2, abs=4)
    said = {
        line.name: line.text
        for line in lines(plan, Zero(stage=1), engine="ZeRO-1", about="", price=None)
    }
    assert f"{4 * of_matrices / 2 / 1e9:.2f} GB of optimizer" in said["communication"]


def test_a_plan_of_stored_vectors_sees_no_image() -> None:
    recipe = CIT["demo-lit"]()
    assert recipe.data.stored is not None
    plan = Plan(recipe, gpus=2, gpu="a100-40")
    found = {line.name: line.text for line in lines(plan, None, engine="", about="", price=None)}
    assert "loading" not in found and found["tokens of a sample"].startswith("0 image tokens")
    with_images = replace(recipe, data=replace(recipe.data, stored=None))
    other = Plan(with_images, gpus=2, gpu="a100-40")
    tower = image_flops(recipe.model.image, recipe.model.image.num_patches)
    assert other.cost.flops - plan.cost.flops == pytest.approx(tower)
    assert "loading" in {line.name for line in lines(other, None, engine="", about="", price=None)}


def test_a_plan_of_heads_alone_sees_no_caption_either() -> None:
    align = CIT["demo-align"]()
    plan, of_images = (Plan(each, gpus=2, gpu="a100-40") for each in (align, CIT["demo-lit"]()))
    found = {line.name: line.text for line in lines(plan, None, engine="", about="", price=None)}
    assert found["tokens of a sample"].startswith("0 image tokens, 0 text tokens")
    assert plan.cost.flops == pytest.approx(3 * projection_flops(align.model))
    assert plan.step.num_trained < of_images.step.num_trained / 100
