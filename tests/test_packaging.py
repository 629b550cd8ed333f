"""What an installation holds, by each way to install, and that none of them is needed for tests."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "conftest.py", "README.md", "LICENSE", "adms", "patches")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is packaged, free of what earlier builds left in the repository."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter that has this one's dependencies, but no adms."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # A path file inside a folder that a path file names is not read, so an editable
    # installation of adms stays behind.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(*command: str | Path, folder: Path | None = None) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def modules_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_names_and_scripts(pyproject: dict) -> None:
    project = pyproject["project"]
    assert project["name"] == "adms"
    assert project["scripts"] == {"adms": "adms.cli:app"}
    assert set(project["optional-dependencies"]) >= {"demo", "dev"}


def test_scripts_pin_one_torch_that_the_library_allows(pyproject: dict) -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["torch==2.13.0"]
    assert "torch>=2.6" in pyproject["project"]["dependencies"]


def test_version_is_one(pyproject: dict) -> None:
    version = pyproject["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE).group(1) == version


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in (ROOT / "adms", ROOT / "patches"):
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_patches_come_from_this_checkout() -> None:
    import adms
    import adms.patches

    assert Path(adms.__file__).parent == ROOT / "adms"
    assert Path(adms.patches.__file__).parent == ROOT / "patches"


@pytest.mark.slow
class TestInstallations:
    def test_wheel(self, checkout: Path, bare_python: Path, tmp_path: Path) -> None:
        pip("wheel", "--no-deps", "-w", tmp_path, checkout)
        (wheel,) = tmp_path.glob("adms-*.whl")
        expected = {f"adms/{name}" for name in modules_in(ROOT / "adms")}
        expected |= {f"adms/patches/{name}" for name in modules_in(ROOT / "patches")}
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        assert {name for name in names if name.endswith(".py")} == expected
        assert "adms/py.typed" in names
        assert any(name.endswith("licenses/LICENSE") for name in names)

        target = tmp_path / "installed"
        pip("install", "--no-deps", "--target", target, wheel)
        code = f"import sys; sys.path.insert(0, {str(target)!r}); import adms.patches as p"
        file = run(bare_python, "-c", f"{code}; print(p.__file__)", folder=tmp_path)
        assert Path(file.strip()) == target / "adms" / "patches" / "__init__.py"

    # From the checkout's own folder too: there ./adms, which has no patches, is found first.
    def test_editable(self, checkout: Path, bare_python: Path, tmp_path: Path) -> None:
        pip("--python", bare_python, "install", "--no-deps", "--ignore-installed", "-e", checkout)
        for folder in (tmp_path, checkout):
            file = run(
                bare_python, "-c", "import adms.patches as p; print(p.__file__)", folder=folder
            )
            assert Path(file.strip()) == checkout / "patches" / "__init__.py"

    def test_checkout_under_pytest(self, checkout: Path, bare_python: Path) -> None:
        tests = checkout / "tests"
        tests.mkdir()
        (tests / "test_import.py").write_text(
            "import adms.patches\n\n\n"
            "def test_import():\n"
            f"    assert adms.patches.__file__ == {str(checkout / 'patches' / '__init__.py')!r}\n"
        )
        for folder, name in ((checkout, "tests"), (tests, "test_import.py")):
            run(bare_python, "-m", "pytest", "-q", name, folder=folder)
