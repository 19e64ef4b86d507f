"""The launch scripts start any entry script of a method, by what they hand to each launcher."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import BIN, ROOT

RECORD = '#!/usr/bin/env bash\necho "$(basename "$0") $*"\n'
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = -m ]; then echo "python $*"; exit; fi
exec {BIN}/python "$@"
"""
SRUN = '#!/usr/bin/env bash\nshift\nSLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"\n'


@pytest.fixture
def launchers(tmp_path: Path) -> Path:
    """Stand-ins for the launchers, which say what they were told, and no GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = dict.fromkeys(("deepspeed", "accelerate", "torchrun"), RECORD) | {
        "srun": SRUN,
        "scontrol": "#!/usr/bin/env bash\necho host\n",
        "nvidia-smi": "#!/usr/bin/env bash\nexit 1\n",
        "python": PYTHON,
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def launch(script: str, *words: str, path: Path, **variables: str) -> subprocess.CompletedProcess:
    slurm = {"SLURM_JOB_NODELIST": "host", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words],
        capture_output=True, text=True,
        env=os.environ | slurm | variables | {"PATH": f"{path}:{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "variables", "option"),
    [
        ("deepspeed.sh", {"PROCESSES": "2"}, "--module"),
        ("deepspeed.sh", {"HOSTFILE": "hosts"}, "--module"),
        ("accelerate.sh", {"PROCESSES": "1"}, "-m"),
        ("accelerate.sh", {"PROCESSES": "2"}, "-m"),
        ("slurm.sh", {}, "-m"),
    ],
)
@pytest.mark.parametrize(
    ("method", "module"),
    [
        ("flip", "frugal.flip.train"),
        ("milan.pretrain", "frugal.milan.pretrain"),
        ("milan.linear_probe", "frugal.milan.linear_probe"),
    ],
)
def test_a_method_with_a_dot_names_the_script(
    script, variables, option, method, module, launchers
) -> None:
    result = launch(script, method, "demo", "--run.dir", "runs/a b", path=launchers, **variables)
    assert result.returncode == 0, result.stderr
    assert f" {option} {module} demo --run.dir runs/a b\n" in result.stdout


@pytest.mark.parametrize("script", ["deepspeed.sh", "accelerate.sh", "slurm.sh"])
def test_the_help_says_what_a_dot_means(script, launchers) -> None:
    result = launch(script, "milan.pretrain", path=launchers)
    assert result.returncode == 2
    assert "with a dot, as in milan.pretrain, it names the script itself" in result.stderr
    assert "set -euo" not in result.stderr


def test_two_stages_of_one_script_are_refused(launchers) -> None:
    result = launch("two_stage.sh", "milan.pretrain", "demo", path=launchers)
    assert result.returncode == 2
    assert result.stderr.startswith("error: milan.pretrain names one script")
    assert len(result.stderr.splitlines()) == 1
