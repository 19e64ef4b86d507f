"""Data sets in clip_benchmark's layout that lie behind a URL, copied once into the cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from frugal.common.data.stores.index import cache_folder, find_index
from frugal.common.errors import InputError
from frugal.common.files import read_json_object, read_text, write_json

_WORDS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
"""Files of a data set that need not be there."""
_VALIDATORS = ("ETag", "Last-Modified")
"""What tells a file of a server from the one that was there before."""
_LOG = logging.getLogger("frugal")
_MOST_SHARDS = 100_000
_SECONDS = 60
"""Without a byte before a server counts as gone."""


def as_url(data: Path) -> str | None:
    """The URL that a word of the command line was, before it was taken for a path."""
    for scheme in ("http", "https"):
        if data.parts[:1] == (f"{scheme}:",):
            return f"{scheme}://{'/'.join(data.parts[1:])}"
    return None


def fetch(url: str, splits: Iterable[str], *, cache: Path | None = None) -> Path:
    """A folder with the splits of a data set, whole; what the server still has is not sent again.

    Every process may call this at once: one fetches, the others wait.

    Args:
        url: of the folder that holds ``test/nshards.txt``; or of a data set's page on the Hugging
            Face hub, as clip_benchmark takes it (``.../datasets/USER/NAME/tree/main``).
        splits: names of sub-folders.
        cache: where to; by default the cache of shard indexes.

    Raises:
        InputError: if there is no such data set, or a file does not arrive whole.
    """
    words, shards = _places(url.rstrip("/"))
    splits = list(splits)
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = (cache or cache_folder()) / "remote" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in _WORDS:
                _fetch(f"{words}/{name}", folder / name, is_needed=False)
            for split in splits:
                _fetch_split(f"{words}/{split}", f"{shards}/{split}", folder / split)
    except _Unreachable as error:
        if not all(_is_whole(folder / split) for split in splits):
            raise
        _LOG.warning("%s: what is in %s is used as it was fetched", error, folder)
    except OSError as error:
        raise InputError(f"{url} cannot be kept in {folder} ({error}); make room there") from None
    return folder


class _Unreachable(InputError):  # noqa: N818 - a state of the server
    """The server does not answer."""


def _is_whole(folder: Path) -> bool:
    """Whether a split was fetched to its end."""
    listed = folder / "nshards.txt"
    count = read_text(listed).strip() if listed.is_file() else ""
    return (
        count.isdecimal()
        and len(count) < 9
        and all((folder / f"{number}.tar").is_file() for number in range(int(count)))
    )


def _places(url: str) -> tuple[str, str]:
    """Where texts lie, and where large files do; the hub keeps them apart."""
    if not url.startswith("https://huggingface.co/datasets"):
        return url, url
    head, _, tail = url.partition("/tree/")
    return f"{head}/raw/{tail or 'main'}", f"{head}/resolve/{tail or 'main'}"


def _fetch_split(words: str, shards: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    listed = folder / "nshards.txt"
    _fetch(f"{words}/nshards.txt", listed)
    try:
        text = read_text(listed).strip()
    except InputError:
        text = ""
    if not text.isdecimal() or not 0 < int(text) <= _MOST_SHARDS:
        listed.unlink()
        raise InputError(
            f"{words}/nshards.txt does not hold a number of shards; give the URL of a folder in "
            "clip_benchmark's webdataset layout"
        )
    for number in range(int(text)):
        _fetch(f"{shards}/{number}.tar", folder / f"{number}.tar")


def _fetch(url: str, path: Path, *, is_needed: bool = True) -> None:
    """One file, written aside and renamed when it is whole; kept as long as the server's is it."""
    origin = path.with_name(f".{path.name}.origin")
    known = read_json_object(origin) if path.exists() and origin.exists() else {}
    aside = path.with_name(f".{path.name}.writing")
    request = urllib.request.Request(url, headers=_conditions(known))
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            told = {name: response.headers.get(name) for name in _VALIDATORS}
            if known and any(known.values()) and told == known:
                return  # a server that knows no conditions
            wanted = response.headers.get("Content-Length")
            with aside.open("wb") as file:
                shutil.copyfileobj(response, file)
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.NOT_MODIFIED:
            return
        if error.code == HTTPStatus.NOT_FOUND and not is_needed:
            path.unlink(missing_ok=True)
            return
        raise InputError(f"{url} cannot be fetched ({error}); check the URL") from None
    except (urllib.error.URLError, HTTPException, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise _Unreachable(f"{url} cannot be fetched ({reason}); check the URL") from None
    if wanted is not None and aside.stat().st_size != int(wanted):
        size = aside.stat().st_size
        aside.unlink()
        raise InputError(f"{url} broke off after {size} of {wanted} bytes; try again")
    origin.unlink(missing_ok=True)  # while the two do not belong together
    if (index := find_index(path)) is not None:
        index.unlink()
    aside.replace(path)
    write_json(origin, told)


def _conditions(known: dict[str, str | None]) -> dict[str, str]:
    """What asks for a file only where it is another one now."""
    asked = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
    return {asked[name]: value for name, value in known.items() if value and name in asked}
