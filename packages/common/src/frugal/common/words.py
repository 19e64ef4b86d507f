"""The words of a command line, before anything is made of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from frugal.common.errors import InputError

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
