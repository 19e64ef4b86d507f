"""Which packages of Frugal are here, against what pip knows."""

from importlib.metadata import distributions
from pathlib import Path

import frugal.common.plan.__main__ as plan
from frugal.common.installed import code_version, installed_packages, source_folders
from support import command


def test_packages_are_those_that_pip_knows() -> None:
    names = {each.name.replace("-", "_") for each in distributions() if each.name}
    known = {name.removeprefix("frugal_") for name in names if name.startswith("frugal_")}
    assert len(known) > 1
    assert installed_packages() == tuple(sorted(known))


def test_every_package_has_its_sources() -> None:
    folders = source_folders()
    assert [folder.name for folder in folders] == list(installed_packages())
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert Path(plan.__file__).parents[1] in folders


def test_the_version_of_the_code_is_that_of_its_sources() -> None:
    version = code_version()
    assert version["version"] != "unknown"
    assert len(version["sha256"]) == 64


def test_who_plans_what_is_not_there_is_told_every_entry_script() -> None:
    said = command("frugal.common.plan", "nothing:large", expect=2).stderr
    for program in ("cit.train", "clipa.train", "flip.train", "milan.pretrain", "milan.segment"):
        assert program in said
