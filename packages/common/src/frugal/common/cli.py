"""What every command shares: its words, a recipe made of them, and one sentence for a mistake."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import inspect
import io
import logging
import os
import re
import shlex
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import tyro

from frugal.common.contracts import Optimizer, Schedule
from frugal.common.data.tokenizers import TokenizerConfig
from frugal.common.distributed import forget_launchers, launcher_ranks
from frugal.common.errors import InputError, RunStopped
from frugal.common.files import reason_of, refuse_exhaustion
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.reduction.image import ImageReduction
from frugal.common.reduction.text import TextReduction

Recipes = Mapping[str, Callable[[], Recipe]]
OptionsT = TypeVar("OptionsT")

_FLAG = re.compile(r"-[^=\s]*=")


def command_words(arguments: Sequence[str] | None = None) -> list[str]:
    """The words of a command line, with ``~`` made the home folder also behind ``--flag=``.

    Shells leave ``--flag=~/x`` as it is, and hand on an unset ``"$VARIABLE"`` as an empty word,
    which would be the current folder where a path is wanted. Every command reads its words here.

    Args:
        arguments: those of this process if not given.

    Raises:
        InputError: if a word, or what follows a flag's ``=``, is empty.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for place, word in enumerate(words):
        flag = _FLAG.match(word)
        value = word[flag.end() :] if flag else word
        if not value.strip():
            raise InputError(_empty(words, place, flag.group() if flag else ""))
        if value.startswith("~"):
            words[place] = word[: len(word) - len(value)] + _at_home(value)
    return words


def _empty(words: list[str], place: int, flag: str) -> str:
    before = next((word for word in reversed(words[:place]) if word.startswith("-")), "")
    named = flag.removesuffix("=") or before
    what = f"{named} is" if named else "a word of the command line is"
    return (
        f"{what} empty; give it a value, or leave it out (a shell variable may not be set, as in "
        f'{named or "--flag"} "$UNSET")'
    )


def _at_home(path: str) -> str:
    """A path as the shell would have it; one of a user that there is not stays as it is."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        return path


def read_command_line(
    recipes: Recipes, *, program: str, arguments: list[str] | None = None
) -> tuple[str, Recipe]:
    """The recipe that the first word picks, with the fields that flags override.

    The first word may also be the path of a saved ``recipe.json``. ``--reduction.image``,
    ``--reduction.text``, ``--data.tokenizer``, ``--optimizer`` and ``--schedule`` take another
    class, of any installed method, by its import path; flags override its fields as those of any
    other. ``--local_rank``, which the deepspeed launcher adds, is accepted and ignored: ranks come
    from the environment.

    Returns:
        The name and the recipe. A mistake on the command line ends the process with exit code 2.
    """
    words = without_local_rank(command_words(arguments))
    if words and words[0].endswith(".json"):
        saved = load_recipe(Path(words[0]))
        recipe = overridden(saved, words[1:], program=f"{program} {words[0]}")
        return Path(words[0]).parent.name, recipe
    if words and not words[0].startswith("-"):
        name = _dashed(words[0])
        recipe, about = named_recipe(recipes, name)
        program = f"{program} {name}"
        return name, overridden(recipe, words[1:], program=program, about=about)
    choices = {_dashed(name): (_first_sentence(make), make()) for name, make in recipes.items()}
    recipe = tyro.extras.overridable_config_cli(choices, args=words, prog=program)
    return words[0], recipe


def named_recipe(recipes: Recipes, name: str) -> tuple[Recipe, str]:
    """The recipe of a name, or that of a saved ``recipe.json``, and what is said about it.

    Raises:
        InputError: if there is none.
    """
    if name.endswith(".json"):
        return load_recipe(Path(name)), ""
    named = {_dashed(each): make for each, make in recipes.items()}
    if _dashed(name) not in named:
        raise InputError(
            f"there is no recipe {name!r}; choose from {', '.join(named)}, or give the path of a "
            "recipe.json"
        )
    make = named[_dashed(name)]
    return make(), _first_sentence(make)


def overridden(
    recipe: Recipe, words: list[str], *, program: str, about: str | None = None
) -> Recipe:
    """A recipe with the fields that flags override; a mistake ends the process with exit code 2.

    Args:
        recipe: to change.
        words: of the command line.
        program: what was typed before them, for messages.
        about: the recipe, in a sentence for the help.
    """
    recipe, words = _with_strategies(recipe, words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(
                Recipe,
                default=recipe,
                args=words,
                prog=program,
                description=about,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as end:
        known = list(_flags(to_json(recipe)))
        if end.code and (mistake := _unknown_flag(known, words, of="this recipe")):
            raise InputError(mistake) from None
        sys.stderr.write(said.getvalue())
        raise
    _refuse_samples_twice(found, words)
    return found


def _refuse_samples_twice(recipe: Recipe, words: Iterable[str]) -> None:
    """Refuse a number of samples beside a step of the cooldown, which sets it."""
    step = getattr(recipe.schedule, "cooldown_from", None)
    flags = {_dashed(word.partition("=")[0]) for word in words}
    if step is not None and "--schedule.samples" in flags:
        raise InputError(
            f"schedule.cooldown_from is step {step}, which sets schedule.samples to "
            f"{recipe.schedule.samples}; leave out --schedule.samples, or give "
            "--schedule.cooldown-from None with it"
        )


AS_CHANGES = 'NAME=VALUE without dashes, such as batch-size=512 or "model.image.mean=0.5 0.5 0.5"'


def as_flags(changes: Iterable[str], option: str) -> list[str]:
    """Changes of a recipe, as ``model.image.mean=0.5 0.5 0.5``, as the words of a command line.

    Args:
        changes: that a command was given.
        option: behind which they stand.

    Raises:
        InputError: if one is neither that nor the name of a field that is turned on or off.
    """
    return [word for change in changes for word in _as_flag(change, option)]


def _as_flag(change: str, option: str) -> list[str]:
    name, equals, value = change.removeprefix("--").partition("=")
    try:
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or not (
            equals or "." in name or name == "help"
        ):
            raise ValueError
        return [f"--{name}", *shlex.split(value)]
    except ValueError:  # also of quotes that are not closed
        raise InputError(
            f"{option} has {change!r}, which changes no field of a recipe; write each change as "
            f"{AS_CHANGES}"
        ) from None


def read_options(kind: type[OptionsT], program: str, *, description: str | None = None) -> OptionsT:
    """The options of a command that trains nothing, from this process's command line.

    Args:
        kind: a dataclass of them.
        program: what is typed before them.
        description: for the help; by default the docstring of ``kind``.

    Returns:
        The options. A mistake on the command line ends the process with exit code 2.
    """
    words = without_local_rank(command_words())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=words, prog=program, description=description)
    except SystemExit as end:
        known = list(_option_flags(kind))
        if end.code and (mistake := _unknown_flag(known, words, of="this command")):
            raise InputError(mistake) from None
        sys.stderr.write(said.getvalue())
        raise


def _option_flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every flag that tyro makes of a dataclass."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        name = _dashed(field.name)
        if is_dataclass(hints[field.name]):
            yield from _option_flags(hints[field.name], f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            yield f"--{prefix}no-{name}"


def _unknown_flag(known: list[str], words: Iterable[str], *, of: str) -> str | None:
    """A sentence for the first flag that is none of the known ones, with the nearest of them."""
    known = ["--help", *known]
    for word in words:
        flag = _dashed(word.partition("=")[0])
        if not flag.startswith("--") or flag in known:
            continue
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.8) or _with_leaf(flag, known)
        ask = f"did you mean {' or '.join(near)}?" if near else "--help lists those that there are"
        return f"there is no {flag} in {of}; {ask}"
    return None


def _with_leaf(flag: str, known: Iterable[str]) -> list[str]:
    """The flags that end as one does, or nearly so."""
    leaf = flag.removeprefix("--").rpartition(".")[2]
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.removeprefix("--").rpartition(".")[2], []).append(name)
    nearest = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return [name for found in nearest for name in leaves[found]]


def _flags(value: Any, name: str = "") -> Iterator[str]:
    """Of every field in a recipe as JSON, and the one that turns a yes or no off."""
    if isinstance(value, dict):
        inside = {key: item for key, item in value.items() if key != "type"}
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inside = {str(place): item for place, item in enumerate(value)}
    else:
        parent, _, leaf = name.rpartition(".")
        yield f"--{name}"
        yield f"--{parent}.no-{leaf}".replace("--.", "--")
        return
    for key, item in inside.items():
        yield from _flags(item, f"{name}.{_dashed(key)}".removeprefix("."))


def _with_strategies(recipe: Recipe, words: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe with the parts that the words name by class, and the other words."""
    rest: list[str] = []
    chosen: list[tuple[str, str]] = []
    waiting: str | None = None
    for word in words:
        flag, _, name = word.partition("=")
        if waiting is not None:
            chosen.append((waiting, word))
            waiting = None
        elif flag not in _BASES:
            rest.append(word)
        elif name:
            chosen.append((flag, name))
        else:
            waiting = flag
    if waiting is not None:
        raise InputError(
            f"{waiting} needs the import path of a class, such as {_EXAMPLES[waiting]}"
        )
    # parts of a part behind the part itself, in whichever order they were given
    for flag, name in sorted(chosen, key=lambda pair: pair[0].count(".")):
        recipe = _with_strategy(recipe, flag, flag.removeprefix("--").split("."), name)
    return recipe, rest


def _with_strategy(whole: Any, flag: str, path: Sequence[str], name: str) -> Any:
    """A recipe, or a part of one, with what lies at a path in it of another class."""
    field, *deeper = path
    if not is_dataclass(whole) or field not in {item.name for item in fields(whole)}:
        raise InputError(f"there is no {flag} in this recipe{_MISSING_PARTS.get(flag, '')}")
    inside = getattr(whole, field)
    if deeper:
        changed = _with_strategy(inside, flag, deeper, name)
    else:
        changed = _strategy(flag, name, instead_of=inside)
    return replace(whole, **{field: changed})  # type: ignore[type-var]


_MISSING_PARTS = {
    "--data.tokenizer": ", which reads no captions; leave it out",
    "--reduction.text.then": "; give it with --reduction.text "
    "frugal.clipa.sub_captions.SubCaption, which takes sentences out of captions",
}
"""Why a recipe may lack a part, and what to do."""
_BASES: dict[str, type | types.UnionType] = {
    "--reduction.image": ImageReduction,
    "--reduction.text": TextReduction,
    "--reduction.text.then": TextReduction,
    "--data.tokenizer": TokenizerConfig,
    "--optimizer": Optimizer,
    "--schedule": Schedule,
}
_KINDS = {
    "--reduction.image": "ImageReduction",
    "--reduction.text": "TextReduction",
    "--reduction.text.then": "TextReduction",
    "--data.tokenizer": "tokenizer",
    "--optimizer": "Optimizer",
    "--schedule": "Schedule",
}
_EXAMPLES = {
    "--reduction.image": "frugal.common.reduction.random_masking.RandomMasking, or "
    "frugal.common.reduction.image.KeepAll to leave nothing out",
    "--reduction.text": "frugal.common.reduction.text.Truncate, which leaves no more out than it "
    "must",
    "--reduction.text.then": "frugal.common.reduction.text.Truncate",
    "--data.tokenizer": "frugal.common.data.tokenizers.HuggingFace with --data.tokenizer.name, or "
    "frugal.common.data.tokenizers.ClipBpe",
    "--optimizer": "frugal.common.optim.muon.Muon, or frugal.common.optim.optimizers.LARS",
    "--schedule": "frugal.common.optim.schedules.WarmupLinear",
}


def _strategy(flag: str, name: str, *, instead_of: Any) -> Any:
    """A part in its default form; what all parts of its kind have stays as it was.

    What has no default is for the command line to say.

    Raises:
        InputError: if there is no such class, or it is none of this kind.
    """
    module, _, kind = name.rpartition(".")
    base = _BASES[flag]
    if not module.startswith("frugal."):
        raise InputError(
            f"{flag} is {name!r}; give the import path of one of Frugal's classes, such as "
            f"{_EXAMPLES[flag]}"
        )
    try:
        strategy = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError):
        raise InputError(
            f"{flag} names {name!r}, which is not installed; the READMEs of the packages list what "
            "there is"
        ) from None
    is_class = isinstance(strategy, type) and issubclass(strategy, base)
    if not is_class or inspect.isabstract(strategy):
        raise InputError(
            f"{flag} names {name!r}, which is no {_KINDS[flag]} to train with; give one such as "
            f"{_EXAMPLES[flag]}"
        )
    shared = {field.name for field in fields(base)} if is_dataclass(base) else set()
    given = {
        field.name: getattr(instead_of, field.name) if field.name in shared else tyro.MISSING
        for field in fields(strategy)
        if field.name in shared or (field.default is MISSING and field.default_factory is MISSING)
    }
    return strategy(**given)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _first_sentence(make: Callable[[], Recipe]) -> str:
    return (make.__doc__ or "").strip().split("\n")[0]


def without_local_rank(words: list[str]) -> list[str]:
    """The words of a command line without the one that the deepspeed launcher adds."""
    kept = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("--local_rank", "--local-rank"):
            skip = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def run_politely(command: Callable[[], None], *, alone: bool = False) -> NoReturn:
    """Run a command; a user's mistake becomes one sentence and exit code 2.

    Every process of a run meets most mistakes alike. The first speaks; the others wait for it,
    and speak only if they are still alive then, which means that the mistake was theirs alone.
    Ctrl-C and a reader of the output that has gone are no mistakes and need no words.

    Args:
        command: what to run.
        alone: it is the work of one process, whatever launchers left in the environment.
    """
    if alone:
        forget_launchers()
    try:
        command()
        sys.stdout.flush()
    except RunStopped as stopped:
        if not stopped.exit_code:  # as it was asked to
            logging.getLogger("frugal").info("%s", stopped)
            sys.exit(0)
        _say(str(stopped), exit_code=stopped.exit_code)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except BrokenPipeError:
        _leave(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        if (sentence := _sentence(error)) is None:
            raise
        _say(sentence, exit_code=2)
    except Exception as error:
        words = str(error)
        if any(part in words for part in _UNWRITTEN):
            reason = words.strip().partition("\n")[0]
            _say(
                f"a file cannot be written ({reason}); make room, or choose another place",
                exit_code=2,
            )
        if not (isinstance(error, RuntimeError) and any(part in words for part in _LOST)):
            raise
        _say(
            "another process of this run has ended, and says why in its own words; the same "
            "command continues from the last checkpoint",
            exit_code=1,
        )
    sys.exit(0)


def exit_politely(command: Callable[[], int]) -> int:
    """Run a command of one process; a user's mistake becomes one sentence and exit code 2.

    Ctrl-C and a reader of the output that has gone are no mistakes and need no words.

    Returns:
        The exit code.
    """
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:
        if (sentence := _sentence(error)) is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return 2
    return code


def _sentence(error: InputError | OSError) -> str | None:
    """What a user is told of an error; None where it may be a bug."""
    if isinstance(error, InputError):
        return str(error)
    if error.errno is None:
        return None
    if error.filename is not None:
        return (
            f"{os.fsdecode(error.filename)}: {reason_of(error)}; see that it is there, that it may "
            "be read or written, and that its disk is not full"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return f"{reason_of(error)} where this command writes; make room, or choose another place"
    with contextlib.suppress(InputError):
        refuse_exhaustion(error)
        return None
    return "too many files are open or the memory is used up; allow more (`ulimit -n 65536`)"


_LOST = (
    "Connection closed by peer", "Connection reset by peer", "gloo/transport/tcp",
    "remote process exited", "ncclRemoteError",
)  # fmt: skip
"""In the words of gloo and NCCL when another process is gone."""
_UNWRITTEN = (
    "No space left on device (os error",
    "PytorchStreamWriter failed writing",
    "os error 27)",
)
"""In the words of safetensors and torch.save when a disk is full or a file may not grow."""


def _say(sentence: str, *, exit_code: int) -> NoReturn:
    try:
        rank = launcher_ranks().rank
    except InputError:  # which may be the sentence
        rank = 0
    if rank > 0:
        time.sleep(5)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {sentence}\n" if exit_code != 143 else f"{sentence}\n")
        sys.stderr.flush()
    # other processes may wait in a collective; leaving without clean-up lets the launcher end them
    _leave(exit_code)


def _leave(exit_code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(exit_code)


def _silence(stream: TextIO) -> None:
    """Have nothing more written to a pipe that nobody reads, not even when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
