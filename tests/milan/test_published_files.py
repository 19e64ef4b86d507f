"""Files of the published code: read without running anything, written back bit for bit."""

import argparse
import json
import logging
from pathlib import Path

import pytest
import reference_milan as readable
import torch
from golden_cases import GOLDEN, case
from safetensors.torch import load_file

from frugal.common.checkpoint.store import find_checkpoint, save_weights
from frugal.common.cli import read_command_line
from frugal.common.engine.accelerate import AccelerateEngine
from frugal.common.engine.saving import restore
from frugal.common.errors import InputError
from frugal.common.recipe_json import difference, load_recipe, to_json
from frugal.common.run import Run, make_logger
from frugal.common.weights.files import read_content, state_in
from frugal.common.weights.image_towers import read_encoder
from frugal.milan.convert import Options, _fitting, convert
from frugal.milan.objective import Reconstruction
from frugal.milan.published_weights import Published, from_published, our_names, to_published
from frugal.milan.recipes import RECIPES

HEADS = {
    "milan_core": {"heads": 4, "decoder_heads": 4},
    "milan_random_mask": {"heads": 3, "decoder_heads": 4},
    "mae_pixel_normpix": {"heads": 2, "decoder_heads": 4},
}
BETAS, DECAY, RATE = (0.9, 0.95), 0.05, 1e-3


def recorded_state(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}


def in_order(name: str) -> dict[str, torch.Tensor]:
    """A recorded state in the order of published files, which safetensors does not keep."""
    state = recorded_state(name)
    found = case(name)
    order = to_published(found.published.state, found.published.model)
    assert order.keys() == state.keys()
    return {key: state[key] for key in order}


def published_gradients(name: str) -> dict[str, torch.Tensor]:
    """Of the recorded loss, by the published names, the readable way."""
    found = case(name)
    model, split = found.model(), found.split
    predicted = readable.predict(model, found.tensors["input/images"], split)
    readable.feature_loss(predicted, found.tensors["input/teacher_tokens"]).backward()
    return found.gradients(model)


class ReferenceTraining:
    """AdamW on parameters with the published names, in the published groups."""

    def __init__(self, name: str) -> None:
        tables = ("pos_embed", "decoder_pos_embed")
        state = in_order(name)
        self.tables = {key: state[key] for key in tables}
        self.state = {n: torch.nn.Parameter(t.clone()) for n, t in state.items() if n not in tables}
        plain = {n for n, p in self.state.items() if p.ndim == 1 or n.endswith(".bias")}
        groups = [
            {"params": [p for n, p in self.state.items() if n in plain], "weight_decay": 0.0},
            {"params": [p for n, p in self.state.items() if n not in plain], "weight_decay": DECAY},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
        self.order = list(state)

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.state.items():
            parameter.grad = gradients[name].clone()
        self.optimizer.step()

    def model(self) -> dict[str, torch.Tensor]:
        both = {n: p.detach() for n, p in self.state.items()} | self.tables
        return {name: both[name] for name in self.order}

    def file(self, path: Path) -> Path:
        content = {
            "model": self.model(), "optimizer": self.optimizer.state_dict(), "epoch": 399,
            "scaler": {
                "scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                "growth_interval": 2000, "_growth_tracker": 7,
            },
            "args": argparse.Namespace(blr=1.5e-4, output_dir=Path("/somewhere"), norm_pix=True),
        }  # fmt: skip
        torch.save(content, path)
        return path


@pytest.fixture(scope="module")
def trained() -> ReferenceTraining:
    training = ReferenceTraining("milan_core")
    gradients = published_gradients("milan_core")
    for scale in (1.0, -0.3, 2.0):
        training.step({name: scale * g for name, g in gradients.items()})
    return training


@pytest.fixture
def imported(trained: ReferenceTraining, tmp_path: Path) -> Path:
    """The run directory that a file with everything in it becomes."""
    file = trained.file(tmp_path / "checkpoint-399.pth")
    run = tmp_path / "run"
    convert(Options(source=file, out=run, data=("nowhere",), **HEADS["milan_core"]))
    return run


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("nest", ["model", "state_dict", None])
def test_an_official_file_has_the_recorded_loss(name, nest, tmp_path):
    state = {f"module.{n}": t for n, t in recorded_state(name).items()}
    path = tmp_path / "checkpoint-399.pth"
    torch.save({nest: state, "args": argparse.Namespace(a=1)} if nest else state, path)
    if nest:
        with pytest.raises(Exception, match="Namespace"):
            torch.load(path, weights_only=True)
    theirs = state_in(read_content(path), source="the file")
    model = from_published(theirs, source="the file", **HEADS[name]).build()
    recorded = case(name)
    images = recorded.tensors["input/images"]
    predicted = readable.predict(model, images, recorded.split)
    if name == "mae_pixel_normpix":
        pixels = readable.cut(images, model.config.image)
        loss = readable.pixel_loss(predicted[:, 1:], pixels, recorded.split, normalize_patches=True)
    else:
        loss = readable.feature_loss(predicted, recorded.tensors["input/teacher_tokens"])
    assert loss.item() == pytest.approx(recorded.about["loss"], rel=1e-5)


def test_the_optimizers_next_step_is_the_one_it_would_have_taken(trained, imported):
    checkpoint = find_checkpoint(imported)
    recipe = load_recipe(imported / "recipe.json")
    assert checkpoint.step == recipe.steps and checkpoint.state["updates"] == 3
    assert checkpoint.state["loss_scale"] == {"scale": 1024.0, "quiet_steps": 7}
    assert recipe.data.train == ("nowhere",)
    words = [str(imported / "recipe.json"), f"--run.dir={imported}"]
    continued = read_command_line(RECIPES, program="pretrain", arguments=words)[1]
    assert difference(recipe, continued) == []
    model = recipe.model.build(outputs=512)
    objective = Reconstruction(model, None, reduction=recipe.reduction.image, seed=0)
    run = Run(imported, 0, 1, 0, torch.device("cpu"), make_logger(0))
    engine = AccelerateEngine(objective, recipe, run)
    restore(engine, checkpoint, None)
    gradients = published_gradients("milan_core")
    ours = our_names(
        {n: g for n, g in gradients.items() if not n.endswith("pos_embed")}, source="a test"
    )
    for name, parameter in objective.model.named_parameters():
        parameter.grad = ours[name].clone()
    engine.step(RATE)
    reference = ReferenceTraining("milan_core")
    for scale in (1.0, -0.3, 2.0, 1.0):
        reference.step({name: scale * g for name, g in gradients.items()})
    found = to_published(objective.model.state_dict(), recipe.model)
    expected = reference.model()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7, msg=name)


def test_there_and_back_is_bit_exact(trained, imported, tmp_path):
    back = tmp_path / "back" / "checkpoint-399.pth"
    convert(Options(source=imported, out=back))
    expected = torch.load(tmp_path / "checkpoint-399.pth", weights_only=False)
    found = torch.load(back, weights_only=True)
    assert list(found["model"]) == list(expected["model"]) and found["epoch"] == 399
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    twin = load_file(back.with_suffix(".safetensors"))
    assert twin.keys() == found["model"].keys()
    assert all(torch.equal(twin[name], t) for name, t in found["model"].items())
    state, theirs = found["optimizer"]["state"], expected["optimizer"]["state"]
    assert state.keys() == theirs.keys()
    for number, moments in theirs.items():
        for kind, tensor in moments.items():
            assert torch.equal(state[number][kind], tensor), (number, kind)
    # the published optimizer takes it as its own
    ReferenceTraining("milan_core").optimizer.load_state_dict(found["optimizer"])
    again = tmp_path / "again"
    convert(Options(source=back, out=again, **HEADS["milan_core"]))
    first, second = (find_checkpoint(run).reader() for run in (imported, again))
    for name in find_checkpoint(imported).names():
        assert torch.equal(first(name), second(name)), name


def test_weights_alone_start_other_runs_and_are_not_continued(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": recorded_state("mae_pixel_normpix")}, file)
    run = tmp_path / "run"
    convert(Options(source=file, out=run, **HEADS["mae_pixel_normpix"]))
    checkpoint = find_checkpoint(run)
    assert checkpoint.state["weights_only"] and checkpoint.step == 0
    encoder = read_encoder(run)
    direct = read_encoder(file, heads=2)
    assert encoder.tower == direct.tower and encoder.tower.positions == "sincos"
    for name, tensor in direct.state.items():
        assert torch.equal(encoder.state[name], tensor)


@pytest.mark.parametrize("outputs", [768, 96, 7])
def test_the_width_of_the_target_is_read_from_the_file(outputs):
    state = recorded_state("milan_core")
    state["decoder_pred.weight"] = torch.zeros(outputs, 32)
    state["decoder_pred.bias"] = torch.zeros(outputs)
    published = from_published(state, source="a test", **HEADS["milan_core"])
    assert published.outputs == outputs
    assert published.build().decoder.head.out_features == outputs


def test_the_published_sizes_are_recognized():
    for name, outputs, expected in (
        ("vit-b16", 512, "vit-b16"), ("vit-b16", 768, "vit-b16"), ("vit-l16", 512, "vit-l16"),
        ("vit-h14", 512, "vit-h14"), ("mae-l16-1600ep", 768, "mae-l16-800ep"),
        ("mae-h14-800ep", 588, "mae-h14-800ep"), ("vit-s16", 512, "vit-s16"),
    ):  # fmt: skip
        model = RECIPES[name]().model
        assert _fitting(Published(model, outputs, {})) == expected


# ------------------------------------------------------------------------------------------------
# What is no such file


def altered(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = recorded_state("milan_core") | {
        name.replace("__", "."): t for name, t in changes.items()
    }
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (altered(mask_token=None), "no decoder; as a start for fine-tuning it can be used"),
        (altered(decoder_pred__weight=None), "without decoder_pred"),
        (altered(decoder_blocks__1__attn__kv__weight=None), r"kv_weight has the shape \(1, "),
        (altered(decoder_blocks__0__attn__q__bias=None), r"query\.bias is missing"),
        (altered(norm__weight=None), r"norm\.weight is missing"),
        (altered(pos_embed=torch.zeros(1, 17, 64)), "pos_embed of the file is not the fixed one"),
        (altered(decoder_pos_embed=torch.zeros(1, 17, 32)), "decoder_pos_embed of the file"),
        (altered(decoder_pos_embed=torch.zeros(1, 5, 32)), "decoder_pos_embed of the file"),
        (altered(decoder_extra=torch.zeros(3)), "decoder_extra"),
        (altered(patch_embed__proj__weight=None), "not an image encoder of a known kind"),
    ],
)
def test_another_file_is_refused_in_words(state, sentence):
    with pytest.raises(InputError, match=sentence):
        from_published(state, source="the file", **HEADS["milan_core"])


def test_rounded_tables_are_noticed(caplog):
    state = recorded_state("milan_core")
    state["pos_embed"] = state["pos_embed"].half().float()
    with caplog.at_level(logging.WARNING, logger="frugal"):
        from_published(state, source="the file", **HEADS["milan_core"])
    assert "pos_embed of the file is up to" in caplog.text


def test_an_optimizer_of_another_model_is_refused(trained, tmp_path):
    content = torch.load(trained.file(tmp_path / "a.pth"), weights_only=False)
    del content["optimizer"]["state"][3]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match="does not belong to its model: number 3 should be"):
        convert(Options(source=tmp_path / "a.pth", out=tmp_path / "run", **HEADS["milan_core"]))
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_and_a_wrong_recipe_is_refused(trained, tmp_path):
    file = trained.file(tmp_path / "a.pth")
    with pytest.raises(InputError, match="is there already"):
        convert(Options(source=file, out=tmp_path))
    with pytest.raises(InputError, match="is not of the model of the recipe vit-b16"):
        convert(Options(source=file, out=tmp_path / "run", recipe="vit-b16"))
    with pytest.raises(InputError, match="no recipe 'base'"):
        convert(Options(source=file, out=tmp_path / "run", recipe="base"))
    with pytest.raises(InputError, match="there is no file or folder"):
        convert(Options(source=tmp_path / "b.pth", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_any_heads_comes_back_as_it_was(tmp_path: Path, capsys) -> None:
    recipe = RECIPES["demo-pixels"]()  # 4 heads where 2 are usual
    weights = recipe.objective.build(recipe).state_dict()
    save_weights(tmp_path / "run" / "checkpoints", weights, step=3)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(to_json(recipe)))
    convert(Options(source=tmp_path / "run", out=tmp_path / "file.pth"))
    # of AdamW, but without its moments
    assert f"which {tmp_path / 'run'} does not hold" in capsys.readouterr().out
    convert(Options(source=tmp_path / "file.pth", out=tmp_path / "back"))
    assert "usual" not in capsys.readouterr().out
    back = load_recipe(tmp_path / "back" / "recipe.json")
    assert back.model == recipe.model and back.batch_size == recipe.batch_size
    assert find_checkpoint(tmp_path / "back").step == 3
    # the same without a word of ours: heads are guessed, and that is said
    convert(Options(source=tmp_path / "file.safetensors", out=tmp_path / "guessed"))
    assert "does not say how many heads" in capsys.readouterr().out
    guessed = load_recipe(tmp_path / "guessed" / "recipe.json").model
    assert guessed.image.heads == 2 != recipe.model.image.heads
    content = torch.load(tmp_path / "file.pth", weights_only=True)
    torch.save(content | {"frugal": {"recipe": 7, "step": 3}}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="its own recipe and step is damaged"):
        convert(Options(source=tmp_path / "odd.pth", out=tmp_path / "odd"))
    other = to_json(recipe.optimizer)
    torch.save(content | {"frugal": {"recipe": other, "step": 3}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="says it is of pretrains nothing"):
        convert(Options(source=tmp_path / "other.pth", out=tmp_path / "other"))
