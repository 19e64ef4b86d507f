"""The one exception for a user's mistake, and the two ends of a run that are none."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence: what is wrong, where, and what to do. Entry scripts print it
    without a stack trace and end with exit code 2; everything else that is raised is a bug of
    ours and keeps its trace.
    """


class NotFiniteError(InputError):
    """What a model computes outside of a step is not finite, as where training has diverged.

    All processes of a run raise it alike, so that they can go back together.
    """


class RunStopped(Exception):  # noqa: N818 - an end, not an error
    """A run ended before its last step for a reason that is no bug, such as SIGTERM.

    The message is one sentence; entry scripts print it and end with ``exit_code``.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LossNotFinite(RunStopped):
    """A run ended because its loss was not finite any more; exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=1)
