"""The sdist and the wheel hold all they need, and the wheel runs in a fresh environment."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import COMMANDS

ROOT = Path(__file__).parents[1]
UNPUBLISHED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
# Nothing of this environment's own lorakit may be seen.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository: what is built leaves files behind."""
    folder = tmp_path_factory.mktemp("source") / "lorakit"
    for name in ("lorakit", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=UNPUBLISHED)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    """Return the folder of the unpacked sdist."""
    (source / "dist").mkdir()
    run(sys.executable, "-c", BUILD.format("sdist", "dist"), cwd=source)
    (archive,) = source.glob("dist/*.tar.gz")
    with tarfile.open(archive) as stream:
        safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        stream.extractall(source / "dist", **safely)
    return source / "dist" / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Return the wheel, built from the sdist as `pip install` does."""
    run(sys.executable, "-c", BUILD.format("wheel", ".."), cwd=sdist)
    (path,) = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel, and this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    installed = run(python, "-c", code, cwd=folder)
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(installed.strip()) / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    return python


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_holds_every_file_of_the_repository(source: Path, sdist: Path) -> None:
    names = files_in(sdist)
    copied = {name for name in files_in(source) if not name.startswith(("dist/", "lorakit.egg"))}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} <= names
    assert {"tests/run.sh", "tests/constraints.txt", "tests/support/program.py"} <= names
    assert copied - names == set()
    assert not [name for name in names if name.startswith(".") or "__pycache__" in name]


def test_the_wheel_holds_the_package_and_nothing_else(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("lorakit-")}
    assert names == {f"lorakit/{name}" for name in files_in(source / "lorakit")}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_names_its_pages_and_extras(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    pages = {url.split(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert pages == {"Homepage", "Repository", "Changelog", "Issues"}
    extras = {
        "endpoint",
        "gguf",
        "html",
        "hub",
        "latex",
        "parquet",
        "plot",
        "quant",
        "test",
        "track",
        "workflow",
        "zst",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_the_extras_are_those_that_messages_name(source: Path, wheel: Path) -> None:
    calls = [
        node
        for path in (source / "lorakit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]
    named = {extra for call in calls if (extra := _extra_of(call))}
    assert named == set(metadata_of(wheel).get_all("Provides-Extra", [])) - {"test", "workflow"}


def _extra_of(call: ast.Call) -> str | None:
    """Return the extra that a call of one of errors.py's reports names, if it does."""
    function = ast.unparse(call.func)
    if function == "check_packages":
        return next((ast.literal_eval(w.value) for w in call.keywords if w.arg == "extra"), None)
    if function == "missing_package" and isinstance(call.args[-1], ast.Constant):
        return str(call.args[2].value) if isinstance(call.args[2], ast.Constant) else None
    return None


def test_the_wheel_in_a_fresh_environment_runs_every_command(python: Path, tmp_path: Path) -> None:
    program = python.with_name("lorakit")
    text = run(program, "--help", cwd=tmp_path)
    for command in COMMANDS:
        assert command in text
        assert run(program, command, "--help", cwd=tmp_path).startswith("Usage: lorakit ")


def test_the_sdists_own_tests_are_collected_with_the_wheel(
    sdist: Path, python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sdist"
    shutil.copytree(sdist, folder, ignore=lambda path, _: ["lorakit"] * (path == str(sdist)))
    place = run(python, "-c", "import lorakit; print(lorakit.__file__)", cwd=folder)
    assert place.startswith(str(python.parents[1]))
    text = run(python, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", cwd=folder)
    counted = re.search(r"^(?:\d+/)?(\d+) tests collected", text, re.MULTILINE)
    assert counted is not None, text[-1000:]
    assert int(counted[1]) > 3000
