"""Leaving for another library: what is written, what is refused, what is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_directories import STEP, small
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.data.tokenizers import HuggingFace, WordPiece
from frugal.common.errors import InputError
from frugal.common.export import Options, export
from frugal.common.models.named import clip_encoder, flip_encoder
from frugal.common.weights import libraries
from frugal.common.weights.library import Target
from frugal.common.weights.load import load_model
from frugal.flip.recipes import demo
from support import command, run_code

pytestmark = pytest.mark.slow

clip = clip_encoder("B/16")


def exported(run: Path, to: str, out: Path, **options: int) -> subprocess.CompletedProcess[str]:
    words = ("--checkpoint", run, "--to", to, "--out", out)
    return command("frugal.common.export", *words, **options)


def embeddings(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    trained = load_model(run)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, *trained.config.image.height_width, generator=generator)
    token_ids = torch.randint(1, 80, (3, 9), generator=generator)
    lengths = torch.tensor([9, 4, 1])
    with torch.inference_mode():
        return trained.model.encode_image(images), trained.model.encode_text(token_ids, lengths)


def test_the_command_line_offers_every_target_and_no_other() -> None:
    result = command(
        "frugal.common.export", "--checkpoint", "x", "--out", "y", "--to", "z", expect=2
    )
    targets = "frugal", "open_clip", "huggingface", "huggingface_beit", "huggingface_mae", "timm"
    said = " ".join(result.stderr.replace("│", " ").split())
    assert f"invalid choice 'z' for argument '--to'. Expected one of {targets}." in said
    assert tuple(libraries.writers()) == targets


def test_a_slim_run_directory_gives_the_same_bits_again_and_again(clip_run, tmp_path) -> None:
    first, second = tmp_path / "deep" / "first", tmp_path / "second"
    result = exported(clip_run, "frugal", first)
    assert "differs by at most 0.0e+00" in result.stdout
    assert export(Options(checkpoint=first, to="frugal", out=second)) == 0
    for folder in (first, second):
        for mine, theirs in zip(embeddings(folder), embeddings(clip_run), strict=True):
            assert torch.equal(mine, theirs)
        assert {name.partition("/")[0] for name in find_checkpoint(folder).names()} == {"weight"}
        assert find_checkpoint(folder).step == STEP
        assert json.loads((folder / "recipe.json").read_text()) == json.loads(
            (clip_run / "recipe.json").read_text()
        )
    assert (second / "tokenizer" / "merges.txt").exists()


def test_the_moving_average_leaves_where_the_run_kept_one(make_run, tmp_path) -> None:
    run = make_run(small(clip), average=True)
    out = tmp_path / "out"
    export(Options(checkpoint=run, to="frugal", out=out))
    read, old = find_checkpoint(out).reader(), find_checkpoint(run).reader()
    for name in find_checkpoint(out).names():
        parameter = name.removeprefix("weight/")
        assert torch.equal(read(name), old(f"ema/{parameter}"))
        assert not torch.equal(read(name), old(name))


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_the_demo_leaves_for_other_libraries(to, make_run, tmp_path) -> None:
    run = make_run(demo().model)
    assert export(Options(checkpoint=run, to=to, out=tmp_path / "out")) < 1e-5


def test_any_model_leaves_as_a_run_directory(make_run, bert, tmp_path) -> None:
    config = small(flip_encoder("B/16"), text={"vocabulary": 90})
    run = make_run(config, tokenizer=WordPiece(vocab=bert / "vocab.txt"))
    export(Options(checkpoint=run, to="frugal", out=tmp_path / "out"))
    for mine, theirs in zip(embeddings(tmp_path / "out"), embeddings(run), strict=True):
        assert torch.equal(mine, theirs)


def test_one_checkpoint_of_a_run_can_be_named(clip_run, tmp_path) -> None:
    checkpoint = find_checkpoint(clip_run).folder
    export(Options(checkpoint=checkpoint, to="frugal", out=tmp_path / "out"))
    assert find_checkpoint(tmp_path / "out").step == STEP


def test_measured_numbers_travel_with_the_weights_they_were_measured_with(
    clip_run, tmp_path
) -> None:
    run = shutil.copytree(clip_run, tmp_path / "run")
    (run / "evaluation").mkdir()
    numbers = {"step": STEP, "zero_shot_top1": 0.123456, "zero_shot_images": 12345}
    (run / "evaluation" / "zero_shot.json").write_text(json.dumps(numbers))
    old = {"step": STEP - 1, "retrieval_candidates": 777}
    (run / "evaluation" / "retrieval.json").write_text(json.dumps(old))
    (run / "evaluation" / "broken.json").write_text("{")
    slim = tmp_path / "slim"
    export(Options(checkpoint=run, to="frugal", out=slim))
    for number, source in enumerate((run, slim)):
        out = tmp_path / f"out{number}"
        export(Options(checkpoint=source, to="open_clip", out=out))
        card = (out / "README.md").read_text()
        assert "| zero_shot_top1 | 0.1235 |" in card
        assert "| zero_shot_images | 12,345 |" in card
        assert "777" not in card
    assert "library_name: open_clip" in card
    assert "RandomMasking(mask_ratio=0.5)" in card
    assert "pairs.tar" in card
    assert "local-dir:out1" in card


REFUSED = [
    # library, options of the model, what is named, where it can go instead
    ("open_clip", {"image": {"class_token": "none", "pooling": "mean"}},
     "model.image.class_token=none", "frugal"),
    ("open_clip", {"image": {"pooling": "mean_all"}}, "model.image.pooling=mean_all", "frugal"),
    ("open_clip", {"image": {"activation": "quick_gelu"}},
     "model.image.activation=quick_gelu", "frugal or huggingface"),
    ("open_clip", {"text": {"activation": "quick_gelu"}},
     "model.text.activation=quick_gelu", "frugal or huggingface"),
    ("open_clip", {"text": {"pooling": "mean"}}, "model.text.pooling=mean", "frugal"),
    ("open_clip", {"text": {"pooling": "mean_all"}}, "model.text.pooling=mean_all", "frugal"),
    ("open_clip", {"text": {"pooling": "last", "pad_mask": True}}, "model.text.pad_mask", "frugal"),
    ("open_clip", {"text": {"causal": False, "pad_mask": True}}, "model.text.pad_mask", "frugal"),
    ("huggingface", {"image": {"class_token": "none", "pooling": "mean"}},
     "model.image.class_token=none", "frugal"),
    ("huggingface", {"image": {"pooling": "mean"}},
     "model.image.pooling=mean", "frugal or open_clip"),
    ("huggingface", {"image": {"pre_norm": False, "image_size": (24, 40)}},
     "model.image.pre_norm=False", "frugal or open_clip"),
    ("huggingface", {"image": {"image_size": (24, 40)}},
     "model.image.image_size=(24, 40)", "frugal or open_clip"),
    ("huggingface", {"text": {"causal": False}}, "model.text.causal=False", "frugal or open_clip"),
    ("huggingface", {"text": {"pooling": "first"}},
     "model.text.pooling=first", "frugal or open_clip"),
    ("huggingface", {"initial_logit_bias": -10.0},
     "model.initial_logit_bias", "frugal or open_clip"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "options", "named", "instead"), REFUSED)
def test_what_a_library_cannot_express_is_named_with_a_way_out(
    to, options, named, instead, make_run, tmp_path
) -> None:
    run = make_run(small(clip, **options))
    with pytest.raises(InputError) as refusal:
        export(Options(checkpoint=run, to=to, out=tmp_path / "out"))
    assert f"cannot express {named}: " in str(refusal.value)
    assert f"--to {instead} instead" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_captions_that_end_with_no_token_have_no_end_to_pool(to, make_run, bert, tmp_path) -> None:
    tokenizer = HuggingFace(name=str(bert), separator=False)
    run = make_run(small(clip, text={"vocabulary": 90}), tokenizer=tokenizer)
    with pytest.raises(InputError, match="token that ends every caption"):
        export(Options(checkpoint=run, to=to, out=tmp_path / "out"))


def test_the_number_that_transformers_takes_for_the_highest_is_refused(
    make_run, bert, tmp_path
) -> None:
    words = (bert / "vocab.txt").read_text().split("\n")[:-1]
    words[2], words[3] = words[3], words[2]  # the separator, which ends captions, gets number 2
    other = tmp_path / "other"
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(other)
    run = make_run(small(clip, text={"vocabulary": 90}), tokenizer=HuggingFace(name=str(other)))
    with pytest.raises(InputError, match="has not the number 2"):
        export(Options(checkpoint=run, to="huggingface", out=tmp_path / "out"))
    assert export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out")) < 1e-5


def test_flip_s_towers_are_refused_by_name_on_the_command_line(make_run, bert, tmp_path) -> None:
    config = small(flip_encoder("B/16"), text={"vocabulary": 90})
    run = make_run(config, tokenizer=WordPiece(vocab=bert / "vocab.txt"))
    result = exported(run, "open_clip", tmp_path / "out", expect=2)
    assert "Traceback" not in result.stderr
    assert "model.image.pooling=mean_all" in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(clip_run, tmp_path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    out.mkdir()
    (out / "precious").write_text("mine")
    file.write_text("mine")
    for taken, said in ((out, "is not empty"), (file, "is a file")):
        with pytest.raises(InputError, match=said):
            export(Options(checkpoint=clip_run, to="frugal", out=taken))
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    export(Options(checkpoint=clip_run, to="frugal", out=out))
    assert (out / "recipe.json").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(clip_run, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="could not be written"):
        export(Options(checkpoint=clip_run, to="frugal", out=tmp_path / "file" / "out"))


def test_a_damaged_checkpoint_is_named_and_nothing_is_left_behind(clip_run, tmp_path) -> None:
    run = shutil.copytree(clip_run, tmp_path / "run")
    file = next(run.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    result = exported(run, "open_clip", tmp_path / "out", expect=2)
    assert str(file) in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_of_another_architecture_are_refused(clip_run, tmp_path) -> None:
    run = shutil.copytree(clip_run, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["model"]["embed_dim"] += 4
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="do not fit this recipe's model"):
        export(Options(checkpoint=run, to="huggingface", out=tmp_path / "out"))


def test_a_tokenizer_of_another_model_is_refused(make_run, tmp_path) -> None:
    run = make_run(small(clip, text={"vocabulary": 90}))
    with pytest.raises(InputError, match="49,408 entries for the 90 rows"):
        export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))


def test_there_must_be_a_run(tmp_path) -> None:
    with pytest.raises(InputError, match=r"there is no file or folder .*nothing; check the path"):
        export(Options(checkpoint=tmp_path / "nothing", to="frugal", out=tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint"):
        export(Options(checkpoint=tmp_path / "empty", to="frugal", out=tmp_path / "out"))


def test_weights_that_are_not_finite_are_not_written(make_run, tmp_path) -> None:
    run = make_run(small(clip), spoil=torch.nan)
    with pytest.raises(InputError, match="not finite"):
        export(Options(checkpoint=run, to="open_clip", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("to", "tensor"),
    [
        ("open_clip", "visual.ln_post.bias"),
        ("open_clip", "logit_scale"),
        ("huggingface", "text_model.final_layer_norm.weight"),
        ("timm", "norm.bias"),
    ],
)
def test_what_reads_back_differently_is_removed(
    to, tensor, clip_run, tmp_path, monkeypatch
) -> None:
    library = libraries.writers()[to]
    honest = library.target(load_model(clip_run), to)
    assert isinstance(honest, Target)

    def write(folder: Path) -> None:
        honest.write(folder)
        file = next(folder.glob("*.safetensors"))
        state = load_file(file)
        save_file({**state, tensor: state[tensor] + 0.01}, file, metadata={"format": "pt"})

    spoiling = replace(library, target=lambda bundle, to: replace(honest, write=write))
    monkeypatch.setattr(libraries, "LIBRARIES", (spoiling,))
    with pytest.raises(InputError, match="differs by"):
        export(Options(checkpoint=clip_run, to=to, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_help_needs_nothing_slower_than_torch() -> None:
    check = (
        "import sys, frugal.common.export;"
        "slow = {'deepspeed', 'transformers', 'timm', 'open_clip'} & sys.modules.keys();"
        "sys.exit(' '.join(slow) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr


def test_a_slim_run_directory_is_measured_like_the_run(clip_run, scenes, tmp_path) -> None:
    slim = tmp_path / "slim"
    export(Options(checkpoint=clip_run, to="frugal", out=slim))
    measured = []
    for run in (clip_run, slim):
        out = tmp_path / f"numbers of {run.name}"
        words = ("--checkpoint", run, "--data", scenes, "--out", out, "--workers", 0)
        command("frugal.common.evaluate", *words)
        found = {file.name: json.loads(file.read_text()) for file in out.glob("*.json")}
        for file, numbers in found.items():  # the path, of all they say
            assert numbers[f"{Path(file).stem}_measured"].pop("checkpoint") == str(run)
        measured.append(found)
    assert measured[0]
    assert measured[0] == measured[1]
