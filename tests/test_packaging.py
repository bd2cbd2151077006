"""The package list of pyproject.toml against the folders, and what importing the package costs."""

from __future__ import annotations

import re
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


def normal_name(requirement: str) -> str:
    """The project's name that a requirement starts with, as package indexes compare names."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_constraints_pin_every_direct_dependency() -> None:
    pins = {normal_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    assert {normal_name(requirement) for requirement in wanted} - {project["name"]} <= pins
