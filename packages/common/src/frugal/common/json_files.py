"""JSON that others wrote: read, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugal.common.errors import InputError


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        InputError: if it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy it again") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content
