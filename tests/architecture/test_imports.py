"""The rules of who may import whom, read from the source."""

import ast
import graphlib
import re
from functools import cache
from pathlib import Path

import pytest

from support import run_code

ROOT = Path(__file__).parents[2]
LAYERS = [
    (
        "distributed",
        "errors",
        "files",
        "installed",
        "old_names",
        "ports",
        "quiet_transformers",
        "randomness",
        "ranges",
    ),
    ("reduction",),
    # what the contracts speak of: a bundle of a model, and what an evaluation finds
    (
        "data.damage",
        "data.decoding",
        "data.jpeg",
        "data.tokenizers",
        "data.transforms",
        "data.vocabularies",
        "data.word_pieces",
        "evaluation.bootstrap",
        "evaluation.metrics",
        "models.bundle",
    ),
    ("cli", "contracts", "history", "recipe", "recipe_json", "run"),
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
        "plan",
        "report",
        "shards",
        "train",
        "evaluate",
        "export",
        "import_weights",
        "replay",
        "branch",
        "embed",
        "interpolate",
        "tune",
        "programs",
        "find_learning_rate",
        "comparison",
        "compare_methods",
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


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def named(node: ast.AST) -> list[str]:
    """What an import names, submodules that it takes from a folder included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        folders = [
            f"{module}.{alias.name}" for alias in node.names if is_module(module, alias.name)
        ]
        return folders or [module]
    return []


@cache
def is_module(module: str, name: str) -> bool:
    """Whether what is imported from a folder of ours is a module, or a folder, in it."""
    inside = Path(*module.split("."), name)
    roots = [package / "src" for package in (ROOT / "packages").iterdir()]
    return any((root / inside).is_dir() or (root / f"{inside}.py").is_file() for root in roots)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports when it runs, type checking left out."""
    tree = parsed(file)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if is_for_type_checkers(node):
            skipped.update(child for part in node.body for child in ast.walk(part))  # type: ignore[attr-defined]
    names = {name for node in ast.walk(tree) if node not in skipped for name in named(node)}
    return {name for name in names if name.split(".")[0] == "frugal"}


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
        where = "__init__" if name == "frugal.common" else name.removeprefix("frugal.common.")
        assert level(where) <= mine, f"{file.name} imports {name}"


IN_FUNCTIONS = {
    # each takes longer to import than torch, and only one is used
    "common/train.py": {"frugal.common.engine.accelerate", "frugal.common.engine.deepspeed"},
}
"""What of ours is imported where it is used, with the reason."""


@pytest.mark.parametrize("file", [f for _, f in sources()], ids=lambda f: str(f)[-40:])
def test_what_is_ours_is_imported_at_the_top_by_its_whole_name(file: Path) -> None:
    tree = parsed(file)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {name for one in functions for node in ast.walk(one) for name in named(node)}
    ours = {name for name in inside if name.split(".")[0] == "frugal"}
    known = [names for place, names in IN_FUNCTIONS.items() if str(file).endswith(place)]
    assert ours == (known[0] if known else set())
    assert not [name for node in ast.walk(tree) for name in named(node) if name.startswith(".")]


def test_no_module_of_ours_is_imported_by_a_string_that_says_its_name() -> None:
    for _, file in sources():
        calls = [n for n in ast.walk(parsed(file)) if isinstance(n, ast.Call)]
        for call in calls:
            if ast.unparse(call.func).endswith("import_module"):
                assert not isinstance(call.args[0], ast.Constant), f"{file}: {ast.unparse(call)}"


def test_no_two_modules_import_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for _, file in sources():
        parts = file.relative_to(ROOT / "packages").with_suffix("").parts[2:]
        module = ".".join(part for part in parts if part != "__init__")
        edges[module] = imported(file)
    order = graphlib.TopologicalSorter({m: needed & edges.keys() for m, needed in edges.items()})
    order.prepare()  # raises CycleError with the modules of a circle


def test_every_folder_says_what_lives_in_it() -> None:
    folders = {file.parent for _, file in sources()} - set((ROOT / "packages").glob("*/src/frugal"))
    for folder in folders:
        init = folder / "__init__.py"
        assert init.is_file(), f"{folder} has no __init__.py"
        assert ast.get_docstring(ast.parse(init.read_text())), f"{init} has no docstring"


JSON = {"calibrate": {"Callable[[Any], list[Any]]"}}
"""What is gathered from other processes is JSON, too."""


@pytest.mark.parametrize("name", ["contracts.py", "reduction/image.py", "reduction/text.py"])
def test_contracts_are_typed(name: str) -> None:
    """``Any`` stands for JSON only: in a state, and among the values of what is gathered."""
    tree = ast.parse((ROOT / "packages/common/src/frugal/common" / name).read_text())
    for one in ast.walk(tree):
        if not isinstance(one, ast.FunctionDef):
            continue
        arguments = [*one.args.args, *one.args.kwonlyargs]
        hints = {ast.unparse(a.annotation) for a in arguments if a.annotation}
        hints |= {ast.unparse(one.returns)} if one.returns else set()
        bare = {
            h for h in hints if "Any" in re.sub(r"(dict|Mapping)\[str, Any\]|list\[Any\]", "", h)
        }
        assert not bare - JSON.get(one.name, set()), f"{name}: {one.name} takes or gives {bare}"


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
        ("frugal.common.compare_methods", []),
        ("frugal.common.plan.__main__", []),
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
