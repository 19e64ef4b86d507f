"""Released weights become a run directory: the reference's embeddings, or one clear sentence."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frugal.common.data.tokenizers import WordPiece, load_tokenizer
from frugal.common.errors import InputError
from frugal.common.models.named import flip_encoder
from frugal.common.recipe_json import load_recipe
from frugal.common.weights.load import load_model
from frugal.flip.convert import Options, convert
from frugal.flip.published_weights import (
    config_of_sizes,
    empty_state,
    flax_views,
    from_flax,
    sizes_of_tree,
    to_flax,
)
from frugal.flip.recipes import RECIPES
from support import command, environment, run_code
from t5x_writer import Style, array_extension, sides_of, write_checkpoint, zip_folder

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"
ARCHIVE = GOLDEN / "t5x_checkpoint_file.zip"
EXPECTED = load_file(GOLDEN / "t5x_checkpoint_file_expected.safetensors")
PARAMS = {n.removeprefix("params/"): v.numpy() for n, v in EXPECTED.items() if "params/" in n}
HEADS = {"image_heads": 4, "text_heads": 2}
VOCABULARY = ["[PAD]", "[UNK]", "red", "blue", "a", "circle", "square", "of", "and", "the",
              *"bcdefghij"]  # fmt: skip
LOG = logging.getLogger("test_convert")


def embed(run: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of the golden inputs, and the logit scale."""
    model = load_model(run).model
    images = EXPECTED["image_nhwc"].permute(0, 3, 1, 2)
    with torch.no_grad():
        return *model(images, EXPECTED["token_ids"].long()), model.logit_scale


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """19 lines, for the 20 rows of the golden archive's token table."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*VOCABULARY, ""]))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, vocabulary: Path) -> Path:
    """The golden archive, converted as a user would."""
    out = tmp_path_factory.mktemp("converted") / "run"
    command(
        "frugal.flip.convert", str(ARCHIVE), f"--out={out}", "--image-heads=4", "--text-heads=2",
        f"--vocab={vocabulary}",
    )  # fmt: skip
    return out


def test_a_converted_archive_gives_the_embeddings_and_loss_of_the_reference(converted: Path):
    images, texts, logit_scale = embed(converted)
    torch.testing.assert_close(images, EXPECTED["z_img"], rtol=0, atol=2e-6)
    torch.testing.assert_close(texts, EXPECTED["z_txt"], rtol=0, atol=2e-6)
    logits = logit_scale.exp() * images @ texts.T
    target = torch.arange(len(images))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss, EXPECTED["loss"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(1 / logit_scale.exp(), EXPECTED["tau"], rtol=1e-6, atol=0)


def test_every_parameter_is_in_the_checkpoint_exactly(converted: Path):
    files = list((converted / "checkpoints" / "step_000000002").glob("*.safetensors"))
    assert len(files) == 1
    stored = load_file(files[0])
    config = load_recipe(converted / "recipe.json").model
    state = {name.removeprefix("weight/model."): value for name, value in stored.items()}
    table = "img_encoder/posembed_encoder/pos_embedding"
    found = to_flax(state, config)
    assert found.keys() == PARAMS.keys()
    for name, value in PARAMS.items():
        if name != table:  # ours is computed in float64
            np.testing.assert_array_equal(found[name].numpy(), value, err_msg=name)


def test_the_recipe_of_a_converted_run_describes_its_model(converted: Path):
    described = json.loads((GOLDEN / "t5x_checkpoint_file_expected.json").read_text())
    recipe = load_recipe(converted / "recipe.json")
    image, text = recipe.model.image, recipe.model.text
    assert (image.width, image.depth, image.heads, image.mlp_width) == (16, 1, 4, 32)
    assert (image.image_size, image.patch_size) == (16, 8)
    assert (text.width, text.depth, text.heads, text.mlp_width) == (12, 1, 2, 24)
    assert (text.vocabulary, text.length) == (20, 6)
    assert recipe.model.embed_dim == described["proj_dim"]
    assert recipe.run.dir == converted.resolve()


def test_the_tokenizer_comes_along(converted: Path, vocabulary: Path):
    recipe = load_recipe(converted / "recipe.json")
    for tokenizer in (load_tokenizer(converted / "tokenizer"), recipe.data.tokenizer.load()):
        assert tokenizer.encode("a red square") == WordPiece(vocab=vocabulary).load().encode(
            "a red square"
        )
    assert converted.resolve() in recipe.data.tokenizer.vocab.parents


def test_tuning_that_changes_nothing_and_an_export_leave_every_embedding_bit_for_bit(
    converted: Path, scenes: Path, tmp_path: Path
):
    words = [
        "frugal.flip.train", str(converted / "recipe.json"), f"--run.start-from={converted}",
        f"--data.train={scenes / 'train'}", "--data.workers=0", "--batch-size=24",
        "--schedule.samples=48", "--schedule.warmup-samples=0", "--engine.precision=float32",
        "--run.log-every=1",
    ]  # fmt: skip
    done = command(*words, f"--run.dir={tmp_path / 'still'}", "--optimizer.learning-rate-per-256=0")
    assert "started from step 2" in done.stderr
    command(*words, f"--run.dir={tmp_path / 'tuned'}", "--optimizer.learning-rate-per-256=0.1")
    model = load_recipe(converted / "recipe.json").model.build()
    model.load_state_dict(
        from_flax({n: torch.from_numpy(v) for n, v in PARAMS.items()}, model.config)
    )
    images = EXPECTED["image_nhwc"].permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = (*model(images, EXPECTED["token_ids"].long()), model.logit_scale)
    command(
        "frugal.common.export", f"--checkpoint={tmp_path / 'still'}", "--to=frugal",
        f"--out={tmp_path / 'exported'}",
    )  # fmt: skip
    for run in (converted, tmp_path / "still", tmp_path / "exported"):
        assert all(map(torch.equal, embed(run), expected))
    assert not any(map(torch.equal, embed(tmp_path / "tuned"), expected))


def test_converted_weights_are_evaluated(converted: Path, scenes: Path, tmp_path: Path):
    command(
        "frugal.common.evaluate", f"--checkpoint={converted}", f"--data={scenes}",
        f"--out={tmp_path}", "--workers=0",
    )  # fmt: skip
    result = json.loads((tmp_path / "zero_shot.json").read_text())
    assert result["step"] == 2


def test_a_converted_run_is_not_continued_but_started_from(converted: Path, scenes: Path):
    done = command(
        "frugal.flip.train", str(converted / "recipe.json"), "--data.workers=0", expect=2
    )
    assert done.stderr.strip().endswith("with --run.start-from and choose another --run.dir")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "style",
    [
        Style(driver="gcs", chunks=sides_of(3, 5)),
        Style(driver="gfile", path_on_top=True, chunks=sides_of(4), compressor="zlib"),
        Style(inline=lambda name: "img" in name, order="F"),
        Style(inline=lambda name: True, chunked_from=50),
    ],
)
def test_every_style_becomes_the_same_weights(tmp_path: Path, converted: Path, style, packed):
    moments = {f"mu/{name}": value.reshape(-1, 1) for name, value in PARAMS.items()}
    extra = {
        "target/decoder/kernel": array_extension(np.ones((3, 4), np.float32)),
        "target/img_encoder/lost": {"driver": "zarr", "kvstore": {"path": "lost/"}},
    }
    source = tmp_path / "files"
    write_checkpoint(
        source / "release" / "checkpoint_2", PARAMS, moments=moments, style=style, extra=extra
    )
    if packed:
        source = zip_folder(source, tmp_path / "archive.zip")
    convert(Options(source=source, out=tmp_path / "out", **HEADS), LOG)
    assert all(map(torch.equal, embed(tmp_path / "out"), embed(converted)))


def test_what_is_left_aside_is_said(tmp_path: Path, caplog):
    extra = {"target/decoder/kernel": array_extension(np.ones((3, 4), np.float32))}
    for step in (1, 2):
        write_checkpoint(tmp_path / "in" / f"checkpoint_{step}", PARAMS, extra=extra)
    with caplog.at_level(logging.INFO):
        convert(Options(source=tmp_path / "in", out=tmp_path / "out", **HEADS), LOG)
    assert "decoder/kernel" in caplog.text
    assert "checkpoint_2; older: checkpoint_1" in caplog.text
    assert "give its own" in caplog.text  # no vocabulary for 20 tokens


@pytest.mark.parametrize(
    ("recipe", "size", "image_size"),
    [("base", "B/16", 224), ("large", "L/16", 336), ("huge14", "H/14", 224)],
)
def test_the_published_sizes_are_told_by_their_shapes(recipe: str, size: str, image_size: int):
    config = flip_encoder(size, image_size=image_size)
    tree = to_flax(empty_state(config, device="meta"), config)
    shapes = {name: tuple(value.shape) for name, value in tree.items()}
    like = RECIPES[recipe]().model
    found = config_of_sizes(
        sizes_of_tree(shapes, source="the tree"),
        like,
        image_heads=like.image.heads,
        text_heads=like.text.heads,
    )
    assert found == replace(like, image=replace(like.image, image_size=image_size)) == config


def hollow(folder: Path, size: str) -> Path:
    """An archive of a published size: shapes, the position table, and zeros."""
    config = flip_encoder(size)
    tree = to_flax(empty_state(config, device="meta"), config)
    table = "img_encoder/posembed_encoder/pos_embedding"
    params = {
        name: np.broadcast_to(np.float32(0), tuple(value.shape))
        for name, value in tree.items()
        if name != table
    } | {table: tree[table].numpy()}
    style = Style(leave_out_zeros=True, fill_value=0.0, chunks=lambda shape: shape)
    return write_checkpoint(folder / "checkpoint_380000", params, step=380_000, style=style)


def test_base_is_recognized_and_converted_without_a_word_about_heads(tmp_path: Path, caplog):
    vocab = GOLDEN / "bert_uncased_vocab.txt"
    source = hollow(tmp_path / "in", "B/16")
    convert(Options(source=source, out=tmp_path / "out", recipe="base", vocab=vocab), LOG)
    recipe = load_recipe(tmp_path / "out" / "recipe.json")
    assert recipe.model == flip_encoder("B/16")
    assert recipe.data.tokenizer.load().encode("a photo of a cat")
    assert (tmp_path / "out" / "checkpoints" / "step_000380000").is_dir()


def test_an_archive_of_another_size_than_stated_names_both(tmp_path: Path):
    source = hollow(tmp_path / "in", "L/16")
    options = Options(source=source, out=tmp_path / "out", recipe="base")
    with pytest.raises(InputError, match=r"FLIP's large .* not the model of --recipe base") as no:
        convert(options, LOG)
    assert "1024 instead of 768" in str(no.value)
    assert not (tmp_path / "out").exists()


def refusal(tmp_path: Path, source: Path = ARCHIVE, **options) -> str:
    """The sentence, after making sure that nothing was written."""
    out = tmp_path / "refused"
    with pytest.raises(InputError) as error:
        convert(Options(source=source, out=out, **options), LOG)
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_other_sizes_need_their_heads(tmp_path: Path):
    assert "give --image-heads and --text-heads" in refusal(tmp_path)
    assert "together" in refusal(tmp_path, image_heads=4)
    assert "--text-heads is 0" in refusal(tmp_path, image_heads=4, text_heads=0)
    assert "does not divide" in refusal(tmp_path, image_heads=5, text_heads=2)
    assert "leave out" in refusal(tmp_path, recipe="base", **HEADS)
    assert "no recipe 'huge'" in refusal(tmp_path, recipe="huge")
    assert "another model" in refusal(tmp_path, recipe="demo")


@pytest.mark.parametrize("lines", [1, 18, 21])
def test_a_vocabulary_of_the_wrong_length_is_refused(tmp_path: Path, lines: int):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{word}\n" for word in [*VOCABULARY, "x", "y"][:lines]))
    sentence = refusal(tmp_path, vocab=vocab, **HEADS)
    assert f"{lines} lines" in sentence
    assert "trained with 19" in sentence


@pytest.mark.parametrize("lines", [30_521, 30_523])
def test_the_published_vocabulary_has_30522_lines(tmp_path: Path, lines: int):
    table = "txt_encoder/token_embedding/embedding"
    params = PARAMS | {table: np.zeros((30_523, 12), np.float32)}
    source = write_checkpoint(tmp_path / "checkpoint_2", params)
    words = (GOLDEN / "bert_uncased_vocab.txt").read_text().splitlines()
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{word}\n" for word in [*words, "onemore"][:lines]))
    sentence = refusal(tmp_path, source, vocab=vocab, **HEADS)
    assert f"{lines:,} lines" in sentence
    assert "30,522" in sentence
    vocab.write_text("".join(f"{word}\n" for word in words))
    convert(Options(source=source, out=tmp_path / "out", vocab=vocab, **HEADS), LOG)


def test_a_vocabulary_that_is_none_is_refused(tmp_path: Path):
    vocab = tmp_path / "vocab.txt"
    assert "cannot be read" in refusal(tmp_path, vocab=vocab, **HEADS)
    vocab.write_text("".join(f"word{i}\n" for i in range(19)))
    assert "[PAD]" in refusal(tmp_path, vocab=vocab, **HEADS)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in PARAMS.items() if key != name}


@pytest.mark.parametrize(
    "name", sorted(PARAMS.keys() - {"logit_scale"} - {n for n in PARAMS if n.endswith("bias")})
)
def test_a_missing_parameter_is_named(tmp_path: Path, name: str):
    source = write_checkpoint(tmp_path / "checkpoint_2", without(name))
    assert name in refusal(tmp_path, source, **HEADS)


def test_a_missing_block_is_named(tmp_path: Path):
    params = PARAMS | {
        name.replace("block_00", "block_02"): value for name, value in PARAMS.items()
    }
    source = write_checkpoint(tmp_path / "checkpoint_2", params)
    assert "encoderblock_01" in refusal(tmp_path, source, **HEADS)


@pytest.mark.parametrize(
    "name", ["img_mlp1/kernel", "txt_encoder/Transformer/encoder_norm/bias", "img_encoder/cls"]
)
def test_a_parameter_of_another_shape_is_named(tmp_path: Path, name: str):
    wider = np.concatenate((PARAMS[name], PARAMS[name]))
    source = write_checkpoint(tmp_path / "checkpoint_2", PARAMS | {name: wider})
    sentence = refusal(tmp_path, source, **HEADS)
    assert name in sentence
    assert str(wider.shape) in sentence


def test_a_table_of_positions_that_is_not_the_grids_is_refused(tmp_path: Path):
    table = "img_encoder/posembed_encoder/pos_embedding"
    source = write_checkpoint(tmp_path / "a", PARAMS | {table: PARAMS[table][:, ::-1]})
    assert "another grid than 2x2" in refusal(tmp_path, source, **HEADS)
    source = write_checkpoint(tmp_path / "b", PARAMS | {table: PARAMS[table][:, :4]})
    assert "3 patches of 8x8" in refusal(tmp_path, source, **HEADS)


def test_a_fixed_temperature_must_be_told_and_a_learned_one_must_not(tmp_path: Path):
    fixed = write_checkpoint(tmp_path / "checkpoint_2", without("logit_scale"))
    assert "give --temperature" in refusal(tmp_path, fixed, **HEADS)
    assert "leave out --temperature" in refusal(tmp_path, temperature=0.01, **HEADS)
    assert "--temperature is 0.0" in refusal(tmp_path, fixed, temperature=0.0, **HEADS)
    convert(Options(source=fixed, out=tmp_path / "out", temperature=0.01, **HEADS), LOG)
    images, _, scale = embed(tmp_path / "out")
    assert scale.exp().item() == pytest.approx(100, rel=1e-5)
    torch.testing.assert_close(images, EXPECTED["z_img"], rtol=0, atol=2e-6)


def test_a_scale_without_its_one_dimension_is_taken(tmp_path: Path):
    params = PARAMS | {"logit_scale": PARAMS["logit_scale"].reshape(())}
    source = write_checkpoint(tmp_path / "checkpoint_2", params)
    convert(Options(source=source, out=tmp_path / "out", **HEADS), LOG)
    assert torch.equal(embed(tmp_path / "out")[2], EXPECTED["params/logit_scale"])


def test_what_stands_at_out_is_not_touched(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in ("file", "full"):
        with pytest.raises(InputError, match="choose another --out"):
            convert(Options(source=ARCHIVE, out=tmp_path / out, **HEADS), LOG)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(Options(source=ARCHIVE, out=tmp_path / "empty", **HEADS), LOG)
    with pytest.raises(InputError, match="choose another --out"):
        convert(Options(source=ARCHIVE, out=tmp_path / "empty", **HEADS), LOG)


def test_a_damaged_chunk_ends_the_command_with_one_sentence(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "checkpoint_2", PARAMS)
    chunk = folder / "target.txt_mlp1.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    done = command(
        "frugal.flip.convert", str(folder), f"--out={tmp_path / 'out'}", "--image-heads=4",
        "--text-heads=2", expect=2,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "txt_mlp1/kernel is damaged: its chunk target.txt_mlp1.kernel/0.0" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, existed: bool):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    script = tmp_path / "limited.py"
    script.write_text(_LIMITED)
    heads = ("--image-heads", 4, "--text-heads", 2)
    done = command(str(script), ARCHIVE, "--out", out, *heads, expect=2)
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.exists() == existed
    assert not existed or not any(out.iterdir())


_LIMITED = """
import resource, runpy, signal, sys

# no file may grow beyond 16 KiB; the weights have 32
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))
sys.argv[0] = "frugal.flip.convert"
runpy.run_module("frugal.flip.convert", run_name="__main__", alter_sys=True)
"""
_MEASURED = """
import logging, sys
from pathlib import Path
from frugal.flip.convert import Options, convert

def status(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if name in l)
    return int(line.split()[1]) * 1024

small, source, out = map(Path, sys.argv[1:])
log = logging.getLogger()
convert(Options(source=small, out=out / "small", image_heads=4, text_heads=2), log)
before = status("VmRSS")
convert(Options(source=source, out=out / "large", image_heads=8, text_heads=8), log)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures as Linux does")
@pytest.mark.parametrize("inline", [False, True], ids=["zarr", "inline"])
def test_a_conversion_takes_little_more_memory_than_its_result(tmp_path: Path, inline: bool):
    config = flip_encoder("B/16")
    shape = {"width": 512, "depth": 2, "heads": 8, "mlp_width": 2048}
    config = replace(
        config,
        image=replace(config.image, **shape),
        text=replace(config.text, **shape, vocabulary=12_000),
    )
    state = empty_state(config)
    for tensor in state.values():
        tensor.uniform_(-1, 1)
    params = {name: value.numpy() for name, value in to_flax(state, config).items()}
    result = sum(tensor.nbytes for tensor in state.values())
    largest = max(value.nbytes for value in params.values())
    assert result > 70e6
    style = Style(compressor=None, inline=lambda name: inline)
    source = write_checkpoint(tmp_path / "checkpoint_2", params, style=style)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(ARCHIVE), str(source), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment() | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    assert result < peak < result + 1.5 * largest
    stored = load_file(
        next((tmp_path / "large" / "checkpoints" / "step_000000002").glob("*.safetensors"))
    )
    for name, value in state.items():
        assert torch.equal(stored[f"weight/model.{name}"], value), name


def test_views_cover_every_value_of_ours_exactly_once():
    config = replace(
        flip_encoder("B/16"),
        image=replace(
            flip_encoder("B/16").image, width=16, depth=2, heads=2, mlp_width=24, image_size=32
        ),
        text=replace(flip_encoder("B/16").text, width=8, depth=3, heads=2, mlp_width=20),
        embed_dim=6,
    )
    state = empty_state(config)
    for tensor in state.values():
        tensor.zero_()
    for view in flax_views(state, config).values():
        view.add_(1)
    assert all((tensor == 1).all() for tensor in state.values())


def test_asking_for_help_loads_no_transformers():
    code = "import sys; import frugal.flip.convert\nassert not {'transformers'} & set(sys.modules)"
    run_code(code).check_returncode()
