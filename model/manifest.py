"""The manifest of a quantized model folder: what it was made from and how, and the size and hash of every file.

`verify` holds a folder against its manifest before anything in it is used. Not covered: who made it (no signature).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model import files
from model.llava import ModelError

NAME, FORMAT = "manifest.json", 1


def describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files in a folder, by name."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256_file(folder / name)}
        for name in sorted(names)
    }


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest; call last, when every file it lists is complete."""
    content = json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True) + "\n"
    files.write_atomic(folder / NAME, content.encode())


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a manifest, so was written by `afya-model quantize`."""
    return (Path(folder) / NAME).is_file()


def read(folder: Path) -> dict[str, Any]:
    """The manifest's content. Raises ModelError where it is missing, damaged or of a newer format."""
    path = Path(folder) / NAME
    try:
        found = json.loads(path.read_bytes())
        listed, edition = found["files"], found["format"]
        complete = all(isinstance(part["bytes"], int) and len(part["sha256"]) == 64 for part in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is missing or damaged ({error}); run afya-model quantize again.") from error
    if edition != FORMAT or not complete or any(Path(name).name != name for name in listed):
        raise ModelError(f"{path} has format {edition}, this version reads {FORMAT}; run afya-model quantize again.")
    return dict(found)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all there and unchanged. Raises ModelError naming the first that is not.

    Reads every byte: about a second for each gigabyte.
    """
    found = read(folder)
    for name, part in found["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise ModelError(f"{path} is missing; run afya-model quantize again or copy the whole folder.")
        if path.stat().st_size != part["bytes"] or files.sha256_file(path) != part["sha256"]:
            raise ModelError(f"{path} is damaged: not the file that was written; copy the folder again.")
    return found
