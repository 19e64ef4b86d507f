"""How commands end that one process does: with a sentence, an exit code, and no stack trace."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from frugal.common.errors import InputError
from frugal.common.files import reason_of, refuse_exhaustion


def exit_politely(command: Callable[[], int]) -> int:
    """Run a command; a user's mistake becomes one sentence and exit code 2.

    Ctrl-C and a reader of the output that has gone are no mistakes and need no words.

    Returns:
        The exit code.
    """
    try:
        code = command()
        sys.stdout.flush()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if (sentence := of_system(error)) is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return 2
    return code


def of_system(error: OSError) -> str | None:
    """A sentence for what the system refuses, such as a full disk; None where it may be a bug."""
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


def _silence(stream: Any) -> None:
    """Have nothing more written to a pipe that nobody reads, not even when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
