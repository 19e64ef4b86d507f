"""Recorded runs of the reference implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "cit"


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]


def case(name: str) -> Case:
    file = GOLDEN / f"{name}.safetensors"
    about = json.loads((GOLDEN / f"{name}.json").read_text())
    return Case(about, load_file(file) if file.exists() else {})


def names(kind: str) -> list[str]:
    """The recorded runs of a kind."""
    return sorted(file.stem for file in GOLDEN.glob(f"{kind}_*.json"))
