"""``python -m frugal.clipa.convert``: from a published file to a run directory."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frugal.clipa.convert import Options, convert
from frugal.clipa.named_models import named_model
from frugal.clipa.recipes import demo
from frugal.common.checkpoint.init_from import init_from
from frugal.common.errors import InputError
from frugal.common.models.positions import resample_length, sincos_table
from frugal.common.models.weight_names import to_open_clip
from frugal.common.recipe_json import load_recipe
from frugal.common.weights.load import load_model
from support import command, run_code

GOLDEN = Path(__file__).parents[1] / "golden"
NPZ = GOLDEN / "clipa" / "clipa_npz_params.npz"
VOCABULARY = GOLDEN / "flip" / "bert_uncased_vocab.txt"
LOG = logging.getLogger("test")
ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "a", "red", "circle", "##s"]


@pytest.fixture
def vocab(tmp_path) -> Path:
    """A vocabulary for the forty rows of the golden token table."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(ENTRIES) + "\n")
    return path


def converted(out: Path, source: Path = NPZ, **options) -> Path:
    convert(Options(source=source, out=out, **options), LOG)
    return out


@torch.inference_mode()
def test_a_converted_npz_gives_the_embeddings_of_the_jax_code(tmp_path, vocab, capsys):
    run = converted(tmp_path / "run", image_size=32, vocab=vocab)
    assert "32 wide, 2 blocks, patches of 8, 32x32 pixels" in capsys.readouterr().out
    vocab.unlink()  # the run has what it needs
    trained = load_model(run)
    golden = load_file(GOLDEN / "clipa" / "clipa_npz_params_expected.safetensors")
    images = trained.model.encode_image(golden["image_nhwc"].permute(0, 3, 1, 2))
    torch.testing.assert_close(images, golden["z_img"], rtol=0, atol=2e-6)
    texts = trained.model.encode_text(golden["token_ids"].long())
    torch.testing.assert_close(texts, golden["z_txt"], rtol=0, atol=2e-6)
    tokenizer = trained.tokenizer
    assert tokenizer.assemble(tokenizer.encode("Red circles"), 8) == [2, 4, 5, 6]


def test_a_stage_starts_from_converted_weights(tmp_path, vocab):
    run = converted(tmp_path / "run", image_size=32, vocab=vocab)
    published = load_model(run)
    model = published.config
    recipe = replace(
        load_recipe(run / "recipe.json"),
        model=replace(
            model,
            image=replace(model.image, image_size=(48, 40), positions="learned"),
            text=replace(model.text, length=12),
        ),
    )
    objective = recipe.objective.build(recipe)
    init_from(objective, run, interpolate=True, log=LOG)
    state, before = objective.model.state_dict(), published.model.state_dict()
    table = sincos_table((6, 5), 32, "sincos_bigvision", class_row=True)[None]
    torch.testing.assert_close(state.pop("image.pos_embed"), table, rtol=0, atol=1e-6)
    longer = resample_length(before.pop("text.pos_embed"), 12)
    torch.testing.assert_close(state.pop("text.pos_embed"), longer, rtol=0, atol=1e-6)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())


@torch.inference_mode()
def test_a_converted_open_clip_file_gives_the_embeddings_of_its_towers(tmp_path):
    config = named_model("ViT-L-16-CL8-GAP")
    small = {"width": 48, "depth": 2, "mlp_width": 96, "heads": 6}
    config = replace(
        config,
        image=replace(config.image, **small, image_size=48),
        text=replace(config.text, **small),
    )
    model = config.build(torch.Generator().manual_seed(2)).eval()
    save_file(to_open_clip(model.state_dict(), config), tmp_path / "model.safetensors")
    run = converted(tmp_path / "run", tmp_path / "model.safetensors", heads=(6, 6))
    trained = load_model(run)
    assert trained.config == replace(config, initialization=trained.config.initialization)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(trained.model.encode_image(images), model.encode_image(images))
    ids = torch.randint(1, 49_408, (3, 8))
    assert torch.equal(trained.model.encode_text(ids), model.encode_text(ids))


def test_nothing_is_written_where_something_stands(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(InputError, match="is there already and not empty; choose another --out"):
        converted(tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["recipe.json"]


def test_a_refused_conversion_leaves_nothing_behind(tmp_path, vocab):
    with pytest.raises(
        InputError, match="30,522 lines, more than the model's token table has rows"
    ):
        converted(tmp_path / "run", image_size=32, vocab=VOCABULARY)
    with pytest.raises(InputError, match=r"36 is not a multiple of image\.patch_size"):
        converted(tmp_path / "run", image_size=36, vocab=vocab)
    vocab.write_text("[PAD]\n[UNK]\n")
    with pytest.raises(InputError, match=r"has no \[CLS\]"):
        converted(tmp_path / "run", image_size=32, vocab=vocab)
    assert not (tmp_path / "run").exists()


def test_impossible_options_are_refused():
    with pytest.raises(InputError, match="leave out --heads"):
        Options(source=NPZ, out=Path("run"), model="ViT-L-14-CLIPA", heads=(2, 2))
    with pytest.raises(InputError, match=r"--heads is \(0, 2\)"):
        Options(source=NPZ, out=Path("run"), heads=(0, 2))


def test_a_vocabulary_for_towers_with_clip_s_own_is_refused(tmp_path, vocab):
    recipe = demo()
    model = recipe.model.build()
    save_file(to_open_clip(model.state_dict(), recipe.model), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="--vocab has no effect"):
        converted(tmp_path / "run", tmp_path / "a.safetensors", heads=(4, 2), vocab=vocab)


def test_the_command_converts_and_a_mistake_is_one_sentence(tmp_path, vocab):
    words = ("frugal.clipa.convert", NPZ, f"--out={tmp_path / 'run'}")
    command(*words, "--image-size=32", f"--vocab={vocab}")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["model"]["image"]["norm_epsilon"] == 1e-6
    refused = command(*words, expect=2)
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert "choose another --out" in refused.stderr


def test_help_needs_nothing_slower_than_torch():
    check = (
        "import sys, frugal.clipa.convert;"
        "sys.exit(' '.join({'transformers', 'nltk'} & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
