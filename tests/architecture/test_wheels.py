"""What is built of a package holds everything that its sources do."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import ROOT

PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir())


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_holds_every_module_and_every_file_beside_them(
    package: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    # built in a copy, as setuptools writes beside the sources
    subprocess.run(["cp", "-r", ROOT / "packages" / package, source], check=True)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", tmp_path, source,
        ],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (ROOT / "packages" / package / "src").rglob("*")
    there = {
        str(file.relative_to(ROOT / "packages" / package / "src"))
        for file in files
        if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file)
    }
    assert held == there and f"frugal/{package}/__init__.py" in held
