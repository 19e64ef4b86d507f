"""What a library of models is here: which paths it knows, what it reads, and what it writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from frugal.common.data.tokenizers import Tokenizer
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.installed import installed_packages
from frugal.common.models.bundle import ModelBundle, Source, TokenizerSource
from frugal.common.models.clip import DualEncoder, DualEncoderConfig
from frugal.common.models.fit import misfit, refuse_larger
from frugal.common.models.image_encoder import ImageEncoder
from frugal.common.models.preprocess import Preparation
from frugal.common.weights.wrapped import WrappedModel


class UnsupportedOption(NamedTuple):
    """An option of a model that another library has no place for."""

    option: str
    reason: str


NO_TEXT = UnsupportedOption("the model", "it has no text tower")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One way to write a model."""

    usage: str
    """How to load FOLDER, in Markdown."""
    write: Callable[[Path], None]
    """Fills an empty folder."""
    difference: Callable[[Path], float]
    """The largest one between what the library reads out of the folder and the model."""
    transform: CenterCrop
    """How the library prepares an image for what is written: as near as it has it."""
    is_whole: bool = True
    """A text tower is not left behind."""


def _writes_nothing(bundle: ModelBundle, to: str) -> Target | UnsupportedOption:
    raise AssertionError(
        f"no library that has no targets is asked for {to} of {bundle.source.path}"
    )


@dataclass(frozen=True, kw_only=True)
class Library:
    """One that models come from and are written for, or one kind of file that holds them."""

    name: str
    """As its users call it."""
    knows: Callable[[Path, str | None], bool]
    """Whether a path is of this library, and a name, where there is one, of a model of it. Asked
    of whatever stands at a path, if only nothing; reads no weights."""
    load: Callable[[Path, str | None, str | None], ModelBundle]
    """The model of a path that it knows, by the name of it, and the key of which of several sets of
    weights in a file is meant. An InputError says why there is none: it is incomplete or damaged,
    of another model, or of a kind that cannot be read."""
    image_tower: Callable[[Path], ImageEncoder] | None = None
    """The image tower of a folder that it knows, whatever stands beside it; None of a library whose
    models are files."""
    targets: tuple[str, ...] = ()
    """What it is written for, by the names on the command line."""
    target: Callable[[ModelBundle, str], Target | UnsupportedOption] = _writes_nothing
    """How a model is written for one of its targets, or why it cannot be."""


# ------------------------------------------------------------------------------------------------
# What several libraries need


def two_tower_bundle(
    model: nn.Module,
    config: DualEncoderConfig | WrappedModel,
    tokenizer: TokenizerSource,
    prepared: Preparation,
    *,
    path: Path,
    library: str,
) -> ModelBundle:
    """A dual encoder that another library wrote, on the CPU in float32, in evaluation mode.

    Args:
        model: our ``DualEncoder`` where its towers can be that, else the library's own.
        config: of the model.
        tokenizer: of its captions.
        prepared: how the library prepares an image for it.
        path: where it was read.
        library: as its users call it.
    """
    return ModelBundle(
        model=model,
        config=config,
        image=config.image,
        text=config.text,
        tokenizer_source=tokenizer,
        transform=prepared.crop,
        source=Source(path=path, library=library, name=library),
        precision="auto",
        told_by=prepared.told_by,
    )


def refuse_larger_than(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], *, source: str | Path
) -> None:
    """Refuse settings of a model that a state cannot be of; see :func:`refuse_larger`.

    Raises:
        InputError: naming the setting.
    """
    numbers = sum(tensor.numel() for tensor in state.values())
    refuse_larger(settings, tensors=len(state), numbers=numbers, source=source)


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


def elsewhere() -> str:
    """Who may know what is not known here, to follow a refusal: commands of installed methods."""
    modules = [f"frugal.{package}.convert" for package in installed_packages()]
    known = [f"python -m {module}" for module in modules if _exists(module)]
    return f"; {', '.join(known)} read what their methods released" if known else ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
