"""The house and its rooms: who may import whom, which dependency has which door, how large a room may grow.

Reads the source with `ast`; only the last tests import anything, each in a fresh interpreter.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"model": set(), "server": {"model"}, "client": {"model"}, "kiosk": {"model"}}
PACKAGES = tuple(MAY_IMPORT)

# The only modules that may import a dependency whose next version is likely to break us (patterns of file names).
DOORS = {
    "transformers": [
        "model/llava.py",
        "model/build.py",
        "model/adapters.py",
        "model/decode.py",
        "model/checkpoint_config.py",
        "model/checkpoint_tokenizer.py",
        "model/onnx_source.py",
        "model/pixels.py",
        "model/quantized_torch.py",
        "client/batches.py",
        "server/data_check.py",
        "server/train.py",
    ],
    "peft": ["model/attach.py", "client/trainer.py", "server/stage_model.py"],
    "bitsandbytes": ["model/llava.py"],
    "triton": ["model/cuda_kernels.py"],
    "flwr": [
        "client/app.py",
        "client/supernode.py",
        *(f"server/{name}.py" for name in ("app", "exchange", "pulling", "release", "rounds")),
    ],
    "deepspeed": ["server/train.py", "server/stage.py", "server/stage_model.py"],
    "streamlit": ["kiosk/app.py", "kiosk/views*.py", "server/page.py"],
    "sqlite_utils": ["kiosk/store.py", "kiosk/schema.py"],
    "pydicom": ["model/dicom.py", "model/deid.py", "model/voi.py", "model/jpeg_frame.py"],
    "gdcm": ["model/jpeg_frame.py"],
    "PIL": [
        "model/images.py",
        "model/pixels.py",
        "model/_decode_child.py",
        "model/raster.py",
        "model/jpeg_frame.py",
        "model/data.py",
        "model/phantom*.py",
    ],
}
# Modules that a program without torch may use, and the four commands, whose --help must answer at once.
LIGHT = ["files", "presets", "images", "deid", "metrics", "phantoms", "data", "prompts", "adapters", "installed"]
LIGHT += ["conversations", "rows", "sizes"]
COMMANDS = ["model.cli", "server.cli", "client.cli", "kiosk.cli"]
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed", "flwr", "streamlit", "pandas"}
HEAVY |= {"matplotlib", "altair", "onnxruntime"}
# Streamlit puts kiosk/ itself first on sys.path: these names would hide packages there.
HIDING = {"model", "client", "server", "secrets", "queue", "pages"}
# Calls that run what a file says: nothing that persists or travels may need them.
UNSAFE = {"torch.save", "torch.load", "pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads", "eval", "exec"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """Every imported module of a tree with its relative level and its line, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, node.lineno


def on_type_checking_only(tree: ast.Module) -> set[int]:
    """Lines under `if TYPE_CHECKING:`; they never run."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body
        for line in range(child.lineno, (child.end_lineno or child.lineno) + 1)
    }


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    forbidden = set(PACKAGES) - MAY_IMPORT[package] - {package} | {"tests"}
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in sources(package)
        for module, level, line in imports(parse(path))
        if level == 0 and module.split(".")[0] in forbidden
    ]
    assert not wrong, f"{package} may import {MAY_IMPORT[package] or 'none of ours'}"


def test_imports_are_absolute() -> None:
    wrong = [f"{name(p)}:{line}" for p in sources(*PACKAGES, "tests") for _, lv, line in imports(parse(p)) if lv]
    assert not wrong


@pytest.mark.parametrize("dependency", DOORS)
def test_a_fast_moving_dependency_has_one_door(dependency: str) -> None:
    wrong = [
        f"{name(path)}:{line}"
        for path in sources(*PACKAGES)
        if not any(fnmatch(name(path), door) for door in DOORS[dependency])
        for module, _, line in imports(parse(path))
        if module.split(".")[0] == dependency and line not in on_type_checking_only(parse(path))
    ]
    assert not wrong, f"{dependency} goes through {DOORS[dependency]}"


@pytest.mark.parametrize("dependency", DOORS)
def test_every_door_is_used(dependency: str) -> None:
    users = [name(p) for p in sources(*PACKAGES) if dependency in {m.split(".")[0] for m, _, _ in imports(parse(p))}]
    assert not [door for door in DOORS[dependency] if not any(fnmatch(user, door) for user in users)]


def test_every_module_says_what_it_is() -> None:
    paths = [path for path in sources(*PACKAGES, "tests", "scripts") if path.read_text(encoding="utf-8").strip()]
    assert not [name(path) for path in paths if not ast.get_docstring(parse(path))]


def test_no_file_and_no_function_outgrows_its_reader() -> None:
    long = []
    for path in sources(*PACKAGES, "tests", "scripts"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{name(path)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not name(path).startswith("tests/"):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size >= MAX_FUNCTION_LINES:
                    long.append(f"{name(path)}:{node.lineno} {node.name}: {size} lines, under {MAX_FUNCTION_LINES}")
    assert not long, "\n".join(long)


def test_public_functions_are_annotated_and_described() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None]
                if bare or node.returns is None or not ast.get_docstring(node):
                    wrong.append(f"{name(path)}:{node.lineno} {node.name}")
    assert not wrong


def test_nothing_swallows_every_error() -> None:
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sources(*PACKAGES, "scripts")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]
    assert not wrong


def test_nothing_that_persists_is_pickled() -> None:
    wrong = [
        f"{name(path)}:{node.lineno} {ast.unparse(node.func)}"
        for path in sources(*PACKAGES)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE and not weights_only(path, node)
    ]
    assert not wrong


def weights_only(path: Path, call: ast.Call) -> bool:
    """The one exception: published checkpoints that are pickles, read once, at import, as tensors and nothing else."""
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    return name(path) == "model/checkpoint_source.py" and options.get("weights_only") == "True"


def test_the_kiosk_hides_no_other_package() -> None:
    assert not [name(path) for path in (ROOT / "kiosk").iterdir() if path.stem in HIDING]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `statement`."""
    program = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_no_torch(module: str) -> None:
    assert not loaded_by(f"import model.{module}") & {"torch", "transformers"}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_answers_before_anything_heavy_is_imported(module: str) -> None:
    help_text = f"from click.testing import CliRunner; r = CliRunner().invoke({module}.main, ['--help'])"
    assert not loaded_by(f"import {module}; {help_text}; assert r.exit_code == 0") & HEAVY
