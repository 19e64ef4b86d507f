"""Models of other libraries, ready to be measured: what a path holds, and what it is read as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.bundle import ModelBundle, Source
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.fit import misfit
from frugal.common.weights.wrapped import WrappedModel

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPENAI = "openai"
"""The name that stands for OpenAI's own models where a file does not say what it is."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A dual encoder that another library wrote."""

    model: nn.Module
    """On the CPU in float32, in evaluation mode: our ``DualEncoder`` where its towers can be that,
    else the library's own model."""
    config: DualEncoderConfig | WrappedModel
    tokenizer: Any
    """Has ``load()``."""
    crop: CenterCrop
    """How the library prepares an image for it."""
    told_by: str = ""
    """The file that says so, or whose defaults these are."""
    library: str
    """As its users call it."""

    def bundle(self, path: Path, name: str) -> ModelBundle:
        """The model as it is measured."""
        return ModelBundle(
            model=self.model,
            config=self.config,
            image=self.config.image,
            text=self.config.text,
            tokenizer_source=self.tokenizer,
            transform=self.crop,
            source=Source(path=path, library=self.library, name=name),
            precision="auto",
            told_by=self.told_by,
        )


def fill(config: DualEncoderConfig, state: Mapping[str, Tensor], *, source: str) -> DualEncoder:
    """Our towers with a state under our names, in float32 and evaluation mode.

    Raises:
        InputError: if the state is not of these towers.
    """
    model = config.build()
    if what := misfit(state, model.state_dict()):
        raise InputError(f"the weights of {source} are not of the model it is said to be: {what}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def refuse_unknown_ids(tokenizer: Tokenizer, rows: int, *, source: Path | str) -> None:
    """Refuse a tokenizer that is another model's, as some of its ids would have no row.

    Args:
        tokenizer: of captions.
        rows: of the table of tokens.
        source: for messages.

    Raises:
        InputError: if it has more entries.
    """
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer of {source} has {tokenizer.vocab_size:,} entries, more than the "
            f"{rows:,} rows of the table of tokens; give the tokenizer that belongs to the weights"
        )


def is_foreign(path: Path) -> bool:
    """Whether a path holds a model of another library and not a run or checkpoint of ours."""
    if path.is_file():
        endings = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt", ".index.json")
        return path.name.endswith(endings)
    if (path / "state.json").exists() or (path / "checkpoints").is_dir():
        return False
    return (path / OPEN_CLIP_CONFIG).is_file() or (path / "config.json").is_file()


def load_foreign(path: Path, *, name: str | None = None, key: str | None = None) -> Foreign:
    """The model of a folder of open_clip or transformers, or of a file of weights.

    Args:
        path: the folder or file.
        name: an open_clip model name, or ``openai``, for a file that does not say what it holds.
        key: which of several sets of weights in a file.

    Raises:
        InputError: if it cannot be read, is of a kind that is not known, or needs a name.
    """
    from frugal.common.weights import open_clip, openai, transformers
    from frugal.common.weights.files import read_weights
    from frugal.common.weights.torchscript import is_torchscript

    if path.is_dir():
        refuse_for_folder(path, name, key)
        if (path / OPEN_CLIP_CONFIG).is_file():
            return open_clip.load_folder(path)
        return transformers.load(path)
    if name == OPENAI or (name is None and path.is_file() and is_torchscript(path)):
        return openai.load(path, key=key)
    if name is None:
        if path.suffix != ".npz" and openai.is_openai(read_weights(path, key=key)):
            return openai.load(path, key=key)
        raise InputError(
            f"{path} does not say which model its weights are of; give --model with open_clip's "
            f"name of it, such as ViT-B-16, or --model {OPENAI} for a file of OpenAI's"
        )
    return open_clip.load_named(name, path, key=key)


def refuse_for_folder(folder: Path, name: str | None, key: str | None) -> None:
    """Refuse what only a file of weights leaves open.

    Raises:
        InputError: if a name or a key is given.
    """
    if name is not None:
        raise InputError(
            f"--model {name} is for a file that does not say what it holds, but {folder} is a "
            "folder, which does; leave it out"
        )
    if key is not None:
        raise InputError(
            f"--weights-key {key} is for a file that holds several sets of weights, but {folder} "
            "is a folder; leave it out, or give the file in it with --model"
        )
