"""Fetching from a folder, from a server that cuts connections, and from a stand-in of the hub."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model import fetch as fetching
from model import fetch_hub
from model.fetch import FetchError, fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 1200, "part/empty.txt": b""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a manifest."""
    folder = tmp_path / "source"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    rows = [{"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in CONTENT.items()]
    (folder / "manifest.json").write_text(json.dumps({"revision": "r7", "files": rows}))
    return folder


def complete(out: Path) -> bool:
    return all((out / n).read_bytes() == d for n, d in CONTENT.items()) and not list(out.rglob("*.partial"))


class Server(SimpleHTTPRequestHandler):
    """Knows ranges; closes the connection after `cut` bytes of a weight file, as long as there are `cuts` left."""

    folder: Path
    cut, cuts, ranges = 0, 0, True
    asked: list[str] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = type(self).folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, first, given = path.read_bytes(), 0, self.headers.get("Range")
        type(self).asked.append(f"{path.name} {given}")
        if given and self.ranges:
            first = int(given.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        rest = data[first:]
        if path.suffix == ".safetensors" and self.cuts:
            type(self).cuts -= 1
            rest = rest[: self.cut]
        self.wfile.write(rest)


@pytest.fixture
def server(source: Path) -> Iterator[tuple[str, type[Server]]]:
    handler = type("Here", (Server,), {"folder": source, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.time, "sleep", lambda _: None)


def test_a_folder_is_copied_and_checked(source: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    found = fetch(str(source), out, progress=lambda *row: seen.append(row))
    assert complete(out) and (found.revision, found.files, found.new_bytes) == ("r7", 3, found.bytes)
    assert seen[-1][1] <= seen[-1][2]
    facts = json.loads((out / "fetched.json").read_text())
    assert (facts["revision"], facts["source"], len(facts["files"])) == ("r7", "source", 3)
    assert fetch(str(source), out).new_bytes == 0, "what is there is not copied again"
    with pytest.raises(FetchError, match="of revision r7, not r8"):
        fetch(str(source), out, "r8")


def test_a_folder_without_a_manifest_is_pinned_by_its_content(source: Path, tmp_path: Path) -> None:
    (source / "manifest.json").unlink()
    first, second = fetch(str(source), tmp_path / "a"), fetch(str(source), tmp_path / "b")
    assert complete(tmp_path / "a") and first.revision == second.revision
    (source / "config.json").write_text("{ }")
    assert fetch(str(source), tmp_path / "c").revision != first.revision


def test_a_changed_file_is_refused_and_removed(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_bytes(b"x" * len(CONTENT["model.safetensors"]))
    with pytest.raises(FetchError, match=r"model\.safetensors is not what its list says"):
        fetch(str(source), tmp_path / "out")
    left = [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert left == ["config.json"], "what was right stays"


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_taken_up_again(server: Any, tmp_path: Path, ranges: bool) -> None:
    address, handler = server
    handler.cut, handler.cuts, handler.ranges = 100_000, 3, ranges
    found = fetch(address, tmp_path / "out")
    assert complete(tmp_path / "out") and found.revision == "r7"
    assert f"model.safetensors bytes={100_000}-" in handler.asked


def test_a_fetch_that_gave_up_goes_on_later(server: Any, tmp_path: Path) -> None:
    address, handler = server
    out = tmp_path / "out"
    handler.cut, handler.cuts = 0, 100
    (out / "part").mkdir(parents=True)
    (out / "model.safetensors.partial").write_bytes(CONTENT["model.safetensors"][:1000])
    with pytest.raises(FetchError, match="run the same command again"):
        fetch(address, out)
    assert (out / "model.safetensors.partial").stat().st_size == 1000
    handler.cuts = 0
    found = fetch(address, out)
    assert complete(out) and found.new_bytes == len(CONTENT["model.safetensors"]) - 1000


def test_a_server_with_wrong_bytes_is_refused(server: Any, source: Path, tmp_path: Path) -> None:
    address, _ = server
    (source / "model.safetensors").write_bytes(b"y" * len(CONTENT["model.safetensors"]))
    with pytest.raises(FetchError, match="not what its list says"):
        fetch(address, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(FetchError, match=r"no model\.safetensors"):
        fetch(address, tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", ""])
def test_a_list_cannot_name_files_elsewhere(source: Path, tmp_path: Path, name: str) -> None:
    rows = [{"name": name, "size": 1, "sha256": "0" * 64}]
    (source / "manifest.json").write_text(json.dumps({"files": rows}))
    with pytest.raises(FetchError, match="outside the folder"):
        fetch(str(source), tmp_path / "out")


def test_what_cannot_be_fetched_is_said(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, match in (
        ("tinyllava-1.5b", {}, "not pinned yet"),
        ("tinyllava-med-f", {}, "no published address"),
        ("somebody/some-model", {}, "at a commit only"),
        ("somebody/some-model", {"revision": "main"}, "at a commit only"),
        ("http://example.org/model", {}, "only https"),
        ("ftp://example.org/model", {}, "only https"),
        ("no such thing", {}, "no known model"),
    ):
        with pytest.raises(FetchError, match=match):
            fetch(name, tmp_path / "out", **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(FetchError, match="GiB free"):
        fetch(str(source), tmp_path / "out")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A hub of one repository; what its client writes can be changed."""
    import huggingface_hub

    sent = {"config.json": b"{}", "model.safetensors": b"weights"}
    weights = SimpleNamespace(sha256=hashlib.sha256(b"weights").hexdigest(), size=7)
    small = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # what git says of b"{}"
    rows = [
        SimpleNamespace(rfilename="config.json", lfs=None, blob_id=small, size=2),
        SimpleNamespace(rfilename="model.safetensors", lfs=weights, blob_id="-", size=7),
        SimpleNamespace(rfilename="model.gguf", lfs=weights, blob_id="-", size=7),
    ]

    class Api:
        def model_info(self, name: str, *, revision: str, files_metadata: bool) -> Any:
            assert files_metadata and revision == COMMIT
            return SimpleNamespace(siblings=rows)

    def download(name: str, *, revision: str, local_dir: Path, ignore_patterns: list[str]) -> None:
        assert revision == COMMIT and "*.gguf" in ignore_patterns
        for file, data in sent.items():
            (local_dir / file).write_bytes(data)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return sent


def test_the_hub_is_asked_for_a_commit_and_checked(hub: Any, tmp_path: Path) -> None:
    found = fetch("tinyllava-1.5b", tmp_path / "out", COMMIT)
    facts = json.loads((tmp_path / "out" / "fetched.json").read_text())
    assert (found.files, found.new_bytes, found.revision) == (2, 9, COMMIT)
    assert (facts["preset"], facts["source"]) == ("tinyllava-1.5b", "bczhou/TinyLLaVA-1.5B")
    assert fetch_hub.git_hash(tmp_path / "out" / "config.json") == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_the_hub_sent_wrong_is_removed(hub: Any, tmp_path: Path, name: str) -> None:
    hub[name] = b"??"
    with pytest.raises(FetchError, match=f"{name} is not what the hub lists"):
        fetch("somebody/some-model", tmp_path / "out", COMMIT)
    assert not (tmp_path / "out" / name).exists()
