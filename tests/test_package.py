"""What an installed Afya consists of: the four packages with recipes and reference model, and nothing else."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "server", "client", "kiosk")
LIST = """
from setuptools import Distribution
distribution = Distribution({"script_name": "build"})
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
print(*build.get_outputs(include_bytecode=False), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of an installation, relative to site-packages, as the build backend lists them (nothing is built)."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests", "pyproject.toml", "README.md", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)  # the backend writes its notes beside them, not into the repository
    done = subprocess.run([sys.executable, "-c", LIST], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = [line.split("build/lib/", 1)[1] for line in done.stdout.splitlines() if line.startswith("build/lib/")]
    return set(listed)


def test_every_module_is_installed(installed: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert not modules - installed


def test_recipes_and_the_reference_model_are_installed(installed: set[str]) -> None:
    kept = [*(ROOT / "server" / "recipes").rglob("*.*"), *(ROOT / "model" / "reference").glob("*")]
    assert not {path.relative_to(ROOT).as_posix() for path in kept if path.is_file()} - installed


def test_no_test_and_no_data_is_installed(installed: set[str]) -> None:
    assert {path.split("/")[0] for path in installed} == set(PACKAGES)
    suffixes = {Path(path).suffix for path in installed if "/reference/" not in path}
    assert suffixes <= {".py", ".toml", ".json", ".css", ".path", ".service"}


def test_the_four_commands_are_declared() -> None:
    found = {e.name: e.value for e in entry_points(group="console_scripts") if e.name.startswith("afya-")}
    assert found == {f"afya-{package}": f"{package}.cli:main" for package in PACKAGES}


def declared(*extras: str) -> set[str]:
    """Distributions that `pip install afya[extras]` names, in lower case, without their versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {line.split(">")[0].split("=")[0].lower() for line in lines}


@pytest.mark.parametrize("room", [*PACKAGES, "tests"])
def test_whatever_is_imported_is_declared(room: str) -> None:
    extras = {"model": ["gpu"], "tests": ["kiosk", "client", "server", "dev"]}.get(room, [room])
    providers = packages_distributions()
    imported = {
        module.split(".")[0]
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    foreign = imported - set(sys.stdlib_module_names) - {*PACKAGES, "tests", "scripts", ""}
    assert not {m for m in foreign if not {d.lower() for d in providers.get(m, [])} & declared(*extras)}
