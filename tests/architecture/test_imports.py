"""The rules of who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

from support import run_code

ROOT = Path(__file__).parents[2]
LAYERS = [
    (
        "distributed",
        "errors",
        "files",
        "old_names",
        "quiet_transformers",
        "randomness",
        "ranges",
    ),
    ("reduction",),
    # what the contracts speak of: a bundle of a model, and what an evaluation finds
    (
        "data.damage",
        "data.decoding",
        "data.tokenizers",
        "data.transforms",
        "data.vocabularies",
        "data.word_pieces",
        "evaluation.bootstrap",
        "evaluation.metrics",
        "models.bundle",
    ),
    ("cli", "contracts", "recipe", "run"),
    ("optim",),
    ("data", "scenes"),
    ("models",),
    ("objectives",),
    ("checkpoint",),
    ("evaluation",),
    ("weights",),
    ("checkpoint.init_from",),  # loads models from anywhere
    ("engine",),
    ("transfer",),
    (
        "__init__",
        "compare",
        "demo",
        "report",
        "shards",
        "train",
        "evaluate",
        "export",
        "import_weights",
    ),
]
"""Folders, and modules on their own that stand lower than the others of their folder."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def level(module: str) -> int:
    """Of a module below ``frugal.common``."""
    whole, alone = module.split(".")[0], ".".join(module.split(".")[:2])
    return LEVEL[alone] if alone in LEVEL else LEVEL[whole]


def sources() -> list[tuple[str, Path]]:
    """(package, file) of every module of every package."""
    return [
        (package.name, file)
        for package in sorted((ROOT / "packages").iterdir())
        for file in sorted((package / "src").rglob("*.py"))
    ]


def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports when it runs, type checking left out."""
    tree = ast.parse(file.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for part in node.body for child in ast.walk(part))
    names = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.startswith("frugal.")}


@pytest.mark.parametrize(("package", "file"), sources(), ids=lambda value: str(value)[-40:])
def test_a_package_imports_itself_and_common_only(package: str, file: Path) -> None:
    allowed = (f"frugal.{package}", "frugal.common")
    assert not [name for name in imported(file) if not f"{name}.".startswith(_dotted(allowed))]


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


@pytest.mark.parametrize("file", [f for p, f in sources() if p == "common"], ids=lambda f: f.name)
def test_a_part_of_common_imports_parts_to_its_left_only(file: Path) -> None:
    inside = file.relative_to(ROOT / "packages/common/src/frugal/common").with_suffix("")
    mine = level(".".join(inside.parts))
    for name in imported(file):
        assert level(name.removeprefix("frugal.common.")) <= mine, f"{file.name} imports {name}"


def test_no_package_takes_the_namespace_for_itself() -> None:
    assert not list((ROOT / "packages").glob("*/src/frugal/__init__.py"))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("frugal.flip.recipes", ["RECIPES"]),
        ("frugal.clipa.recipes", ["RECIPES"]),
        ("frugal.cluster_masking.recipes", ["RECIPES"]),
        ("frugal.milan.recipes", ["RECIPES"]),
        ("frugal.milan.transfer_recipes", ["FINE_TUNING", "LINEAR_PROBING"]),
        ("frugal.milan.segmentation_recipes", ["SEGMENTATION"]),
        ("frugal.cit.recipes", ["RECIPES"]),
        ("frugal.common.scenes", []),
        ("frugal.common.report.__main__", []),
        ("frugal.common.compare", []),
    ],
)
def test_building_recipes_and_help_needs_nothing_slower_than_torch(
    module: str, names: list[str]
) -> None:
    check = (
        f"import sys, {module} as m;"
        f"made = [make() for name in {names} for make in getattr(m, name).values()];"
        f"assert made or not {names};"
        "heavy = {'deepspeed', 'transformers', 'accelerate', 'open_clip', 'matplotlib', 'timm',"
        " 'tensorboard', 'pyarrow', 'pandas', 'nltk', 'xformers'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
