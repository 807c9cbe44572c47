"""What travels to the clinics: the code of two packages and the project file, no data, no weights, no test."""

import io
import zipfile
from pathlib import Path

from server.link import Link
from server.runs import stage
from tests.conftest import REPOSITORY


def test_the_bundle_holds_exactly_the_code_of_server_and_client(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    folder = stage(Link(tmp_path / "certs", tmp_path / "state"))
    for name in ("server/data.json", "client/patient.jsonl", "server/notes.md", "server/test_x.py"):
        (folder / name).write_text("{}")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        found = {name for name in bundle.namelist() if not name.startswith(".info/")}
    packages = [path for package in ("server", "client") for path in (REPOSITORY / package).rglob("*.py")]
    assert found == {"pyproject.toml"} | {str(path.relative_to(REPOSITORY)) for path in packages}
