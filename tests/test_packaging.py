"""The package list of pyproject.toml against the folders, and what importing the package costs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with the package's wheel in it, and this environment's packages behind it."""
    pytest.importorskip("setuptools.build_meta", reason="setuptools builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    # A copy, because setuptools builds in the folder that it finds the sources in.
    for name in ("pyproject.toml", "README.md", "LICENSE", *FOLDERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], check=True, cwd=folder / "source", stdout=subprocess.DEVNULL
    )
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("[Ll]ib/**/site-packages")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))
    return next(path for path in (folder / "venv").glob("*/python*") if path.stem == "python")


WHOLE = (
    "import torch_prunepath, torch_prunepath.integrations.transformers, torch_prunepath.integrations.peft\n"
    "import torch_prunepath.csrc_triton, torch_prunepath.commands.cli\n"
    "from torch_prunepath import sparsify\n"
    "print(torch_prunepath.__file__, torch_prunepath.integrations.__file__, sep='\\n')"
)


@pytest.mark.parametrize("place", [ROOT, ROOT / "docs"], ids=["the repository's root", "elsewhere"])
def test_an_installed_wheel_imports_from_everywhere(installed: Path, place: Path) -> None:
    """In the repository's root Python finds the sources first, where two packages lie beside the package."""
    shown = subprocess.run([installed, "-c", WHOLE], check=True, cwd=place, capture_output=True, text=True).stdout
    package, integrations = map(Path, shown.split())
    # All of one kind: sources and installation may be of different versions.
    assert (place == ROOT) == package.is_relative_to(ROOT) == integrations.is_relative_to(ROOT)


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
