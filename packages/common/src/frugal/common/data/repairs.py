"""Samples of which a part could not be read and another part made up for it: told as they come."""

from __future__ import annotations

import logging
from typing import Any

FIELD = "repaired"
"""Under which a loader hands over keys and reasons beside the fields of a ``Batch``."""


class Repairs:
    """Counts what loader processes repaired, and says so at the first one and at powers of ten."""

    def __init__(self) -> None:
        self.count = 0
        """Samples of this process."""

    def take(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a ``Batch``, without what was repaired, which is counted."""
        for key, reason in fields.pop(FIELD, ()):
            self.count += 1
            if str(self.count).strip("0") == "1":
                logging.getLogger("frugal").warning(
                    "%s samples repaired so far: the caption of %s is of another field than the "
                    "first (%s)",
                    f"{self.count:,}",
                    key,
                    reason,
                )
        return fields
