"""Bytes of a URL or a command, with a limit to how long they are waited for.

Commands run in a process group of their own, which ends when they are not read any more or the
process that reads them is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

from webdataset.gopen import gopen, gopen_schemes, rewrite_url

from frugal.common.errors import InputError

# A process that reads a command keeps the write end of its standard input. When that is closed, by
# whatever ends the reader, the one that waits for it kills the whole group.
_GUARD = """\
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec 3<&-
"$@"
status=$?
kill -KILL $! 2>/dev/null
wait $! 2>/dev/null
exit $status
"""
_PIPE_BYTES = 1 << 20
"""As much as Linux lets anybody put between two processes."""
_FIRST_WARNING = 30.0
"""Seconds of waiting after which it is said; then after twice as many, and so on."""
_BROKEN_PIPE = (0, 128 + signal.SIGPIPE, -signal.SIGPIPE)


def can_read(url: str) -> bool:
    """Whether there is a command for URLs of this kind."""
    scheme = urlparse(rewrite_url(url)).scheme
    return scheme in ("", "file") or scheme in gopen_schemes


class Patience:
    """How long one reader has waited for anything, whichever of its streams gave it."""

    def __init__(self, limit: float) -> None:
        """Wait at most ``limit`` seconds for a sample, half as long for one stream."""
        self.limit = limit
        self._waited = 0.0

    def rewarded(self) -> None:
        """Something came."""
        self._waited = 0.0

    def wait(self, url: str, ready: Callable[[float], bool]) -> None:
        """Return once there is something to read.

        Args:
            url: what is waited for.
            ready: waits for some seconds and says whether there is something.

        Raises:
            TimeoutError: if this stream gives nothing.
            InputError: if no stream has given anything for the whole limit.
        """
        start = last = time.monotonic()
        next_warning = _FIRST_WARNING
        while not ready(min(1.0, self.limit / 10)):
            now = time.monotonic()
            self._waited += now - last
            last = now
            if self._waited >= self.limit:
                raise InputError(
                    f"nothing has come from {url} for {self._waited:.0f} seconds, nor from "
                    "anywhere else meanwhile (data.timeout_minutes); check the network and the "
                    "command, or raise --data.timeout-minutes"
                )
            if now - start >= self.limit / 2:
                raise TimeoutError(f"nothing has come for {now - start:.0f} seconds")
            if now - start >= next_warning:
                # as an error: every process says it, since the others may wait for this one
                logging.getLogger("frugal").error(
                    "waiting for %s: nothing has come for %.0f seconds", url, now - start
                )
                next_warning *= 2


class UrlStream:
    """A URL that is read from its beginning on."""

    def __init__(self, url: str, patience: Patience) -> None:
        """Open a path, ``pipe:`` with a command, or a URL that there is a command for.

        Raises:
            OSError: if it cannot be opened.
            ValueError: if nothing can read URLs of this kind.
        """
        self._url = url
        self._patience = patience
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - what the command complains of
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        words = _command(rewrite_url(url))
        if words is None:
            self._file: Any = gopen(url)
            return
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "sh", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            bufsize=0,
            start_new_session=True,
        )
        self._file = self._process.stdout
        with contextlib.suppress(OSError):  # the kernel may allow less
            fcntl.fcntl(self._file, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def read(self, size: int) -> bytes:
        """As many bytes; fewer only at the end.

        Raises:
            TimeoutError, InputError: as :meth:`Patience.wait`.
        """
        parts, missing = [], size
        while missing and not self._ended:
            part = self._some(missing)
            self._ended = not part
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        if self._process is None:
            return self._file.read(size)
        self._patience.wait(self._url, lambda s: bool(select.select([self._file], [], [], s)[0]))
        return os.read(self._file.fileno(), size)

    def failure(self) -> str:
        """Of a command that was read to its end, how it failed; empty where it did not."""
        if self._process is None or not self._ended:
            return ""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return ""
        if status in _BROKEN_PIPE:
            return ""
        return f"the command ended with exit status {status}{self._complaint()}"

    def _complaint(self) -> str:
        """The last line that the command wrote to its standard error."""
        self._words.seek(max(self._words.seek(0, os.SEEK_END) - 500, 0))
        lines = self._words.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the command, with everything that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        # a command of webdataset's complains if its output is not read to the end
        with contextlib.suppress(OSError):
            self._file.close()
        self._words.close()


def _command(url: str) -> list[str] | None:
    """The words of webdataset's command for a URL; None where it opens that itself."""
    if url.startswith("pipe:"):
        return ["/bin/sh", "-c", url.removeprefix("pipe:")]
    scheme = urlparse(url).scheme
    if scheme in ("http", "https", "sftp", "ftps", "scp"):
        retrying = ["--connect-timeout", "30", "--retry", "30", "--retry-delay", "2"]
        return ["curl", *retrying, "-f", "-s", "-S", "-L", url]
    if scheme == "htgs":
        return ["curl", "-f", "-s", "-S", "-L", re.sub("^htgs:", "gs:", url)]
    if scheme == "gs":
        return ["gsutil", "cat", url]
    if scheme == "ais":
        return ["ais", "get", url, "-"]
    return None
