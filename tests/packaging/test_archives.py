"""What is published holds all that the library needs, and works where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "src" / "spfde"
PLUGIN = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "of-mine"
version = "1.0"

[project.entry-points."spfde.plugins"]
mine = "of_mine"
""",
    "of_mine.py": """
from typing import ClassVar

import spfde


@spfde.register("method")
class Own(spfde.SET):
    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "A method of somebody else."
""",
}


@dataclass
class Archives:
    sdist: Path
    wheel: Path


def build(source: Path, folder: Path) -> Archives:
    """Build an sdist, and a wheel from it, with the build backend that is installed here."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Archives(next(folder.glob("*.tar.gz")), next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


# --- what is inside --------------------------------------------------------------------------------------------------


def files_of_the_package() -> set[str]:
    found = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(PACKAGE.parent)) for path in found}


def test_both_hold_every_file_of_the_package(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files_of_the_package()
    with tarfile.open(archives.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name.removeprefix("src/") for name in names if name.startswith("src/spfde/")} == files_of_the_package()
    assert {"pyproject.toml", "README.md", "LICENSE", "Makefile", "tests/conftest.py", "scripts/make_docs.py"} <= names


def test_the_package_has_files_of_every_kind() -> None:
    """The comparison above would not miss what is missing on both sides."""
    kinds = {path.partition("/")[2].rpartition(".")[2] for path in files_of_the_package()}
    assert kinds >= {"py", "typed", "cpp", "h", "j2", "bib", "npz", "LICENSE"}


def test_the_wheel_says_what_it_needs_and_what_it_brings(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as wheel:
        info = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(wheel.read(info["METADATA"]).decode())
        scripts = wheel.read(info["entry_points.txt"]).decode()
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.partition(">")[0] for line in needed} == {"torch", "numpy", "pydantic"}
    assert "spfde = spfde.__main__:main" in scripts
    assert {"LICENSE", "fashion_mini.LICENSE"} <= info.keys()


# --- where it is installed -------------------------------------------------------------------------------------------


@dataclass
class Installed:
    """A fresh environment, whose other packages are those of the environment that runs the tests."""

    python: Path
    folder: Path

    def run(self, *command: str) -> str:
        """Run a program of the environment in a folder that has nothing to do with the sources."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"SPFDE_CACHE_DIR": str(self.folder / "cache"), "COLUMNS": "80"}
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        program = [str(self.python.parent / command[0]), *command[1:]]
        ran = subprocess.run(program, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def install(self, archive: Path) -> None:
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
        self.run("python", "-m", "pip", "install", *options, str(archive))


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    own = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # Behind the environment's own; what .pth files are in there, an editable installation's among them, counts not.
    (own / "others.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))))
    return Installed(folder / "bin" / "python", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_works_where_it_is_installed(kind: str, archives: Archives, installed: Installed) -> None:
    installed.install(getattr(archives, kind))
    place = installed.run("python", "-c", "import spfde; print(spfde.__file__)").strip()
    assert Path(place).is_relative_to(installed.folder / "environment")

    assert "mest" in installed.run("spfde", "methods")
    plan = json.loads(installed.run("spfde", "plan", "--model", "resnet8", "--epochs", "10", "--json"))
    assert 0 < plan["training_flops"] < plan["dense_training_flops"]

    # The embedded data, and kernels compiled from the sources that were installed.
    options = ["--model", "resnet8", "--epochs", "2", "--engine", "native", "--quiet"]
    installed.run("spfde", "train", *options, "--out", "run")
    installed.run("spfde", "report", "run", "--out", "report.html")
    run = installed.folder / "elsewhere"
    assert json.loads((run / "run" / "summary.json").read_text())["engine"] == "native"
    assert list((installed.folder / "cache").glob("*.so"))
    assert "</html>" in (run / "report.html").read_text()
    assert "@inproceedings" in installed.run("spfde", "cite", "run").lower()


@pytest.mark.long
def test_what_an_installed_package_registers_is_listed(
    archives: Archives, installed: Installed, tmp_path: Path
) -> None:
    project = tmp_path / "of-mine"
    project.mkdir()
    for name, text in PLUGIN.items():
        (project / name).write_text(text)
    installed.install(archives.wheel)
    assert "A method of somebody else." not in installed.run("spfde", "methods")
    installed.install(build(project, tmp_path / "dist").wheel)
    assert "A method of somebody else." in installed.run("spfde", "methods")
