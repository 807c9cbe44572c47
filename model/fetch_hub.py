"""Fetch a model from the Hugging Face hub at a commit: the hub's own client downloads, the hashes are checked here.

The client resumes what was cut and keeps its notes in `.cache` of the folder. Weights are listed by the hub with their
SHA-256, small files with the hash git gives them; both are checked after the download.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from model import files
from model.fetch import FetchError, File

# Copies of the same weights for other programs, and pictures of the model card.
LEFT_OUT = ["*.msgpack", "*.h5", "*.ot", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.png", "*.jpg", "*.gif"]


def git_hash(path: Path) -> str:
    """The hash git gives a file's content (SHA-1 over its length and bytes), as the hub lists small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def fetch(repository: str, out: Path, revision: str) -> tuple[list[File], int]:
    """(files, new bytes) after downloading `repository` at commit `revision` into `out`. Raises FetchError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import filter_repo_objects

    before = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        snapshot_download(repository, revision=revision, local_dir=out, ignore_patterns=LEFT_OUT)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(
            f"{repository} cannot be fetched from the hub: {first} Run the command again to go on."
        ) from error
    listing, new = [], 0
    wanted = {row.rfilename: row for row in info.siblings or []}
    for name in filter_repo_objects(wanted, ignore_patterns=LEFT_OUT):
        row, path = wanted[name], out / name
        digest = files.sha256_file(path) if path.is_file() else None
        right = digest == row.lfs.sha256 if row.lfs else path.is_file() and git_hash(path) == row.blob_id
        if digest is None or not right:
            path.unlink(missing_ok=True)
            raise FetchError(f"{name} is not what the hub lists (hash); it was removed: run the command again.")
        listing.append(File(name, path.stat().st_size, digest))
        new += path.stat().st_size if before.get(path) != path.stat().st_size else 0
    return listing, new
