"""The package list of pyproject.toml against the folders, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"torch_prunepath": "torch_prunepath", "csrc_triton": "torch_prunepath.csrc_triton"}
FOLDERS["integrations"] = "torch_prunepath.integrations"


def packages_on_disk() -> set[str]:
    return {
        ".".join([package, *init.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }


def test_every_package_folder_is_listed() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


@pytest.mark.parametrize("package", sorted(PYPROJECT["tool"]["setuptools"]["packages"]))
def test_installed_package_imports(package: str) -> None:
    """From another folder, so that the installation is what is imported."""
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True, cwd=ROOT / "docs")


def test_constraints_pin_every_dependency_that_is_installed_here() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {name.split(";")[0].split(">")[0].split("[")[0] for name in wanted} - {project["name"]}
    assert names <= pins.keys()
