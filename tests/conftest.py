"""What every test gets: a home folder of its own, no network, and the open data where it is present."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Set at import, before any test module can import a library that reads them once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    DS_ACCELERATOR="cpu",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",  # idle threads must not spin: servers, clients and the tests share two cores
)
# torch and OpenMP read this once, too: two threads, so that a small machine stays usable.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))


@pytest.fixture(autouse=True)
def afya_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clinic's home of this test alone; nothing in the user's own ~/.afya or ~/.flwr is read or written."""
    home = tmp_path / "afya-home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("AFYA_HOME", str(home))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr-home"))
    return home


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the open data (SLAKE, VQA-RAD, DICOM): $AFYA_SHARED, else `shared` beside the repository."""
    folder = Path(os.environ.get("AFYA_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("the open data is not here: set AFYA_SHARED to the folder that holds data/ (README, Data)")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder of the reference format (32 px, 2 layers), built once for the whole run."""
    from tests.tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")
