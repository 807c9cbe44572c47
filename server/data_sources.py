"""The official releases of SLAKE, VQA-RAD and PathVQA as `Sample`s, by official split: train, validate, test.

PathVQA's own release keeps its questions in pickles, which run what they hold when opened; its Parquet, JSON, JSON
lines or CSV form (columns image, question, answer) is read instead. Not here: writing train and test files
(`server.data_build`).
"""

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import files
from model.data import DataError, Sample, read_slake, read_vqa_rad
from model.rows import load_rows

SPLITS = ("train", "validate", "test")
Splits = dict[str, list[Sample]]
_PLACES = ("imgs", "images", "VQA_RAD Image Folder", "")  # where the releases keep their pictures, beside the questions


def split_of(name: str) -> str | None:
    """The official split that a file's name tells (train, val..., test), or None."""
    word = name.lower()
    found = [split for split, mark in (("train", "train"), ("validate", "val"), ("test", "test")) if mark in word]
    return found[0] if len(found) == 1 else None


def slake(source: Path, language: str = "en") -> Splits:
    """SLAKE's train, validate and test files in a folder (or one file); `language` is en, zh or both."""
    parts: Splits = {}
    for path in _files(source, (".json",)):
        split = _split(path)
        kept = [row for row in _with_images(path, read_slake) if language == "both" or _language(row) == language]
        parts.setdefault(split, []).extend(kept)
    return parts


def _language(row: Sample) -> str:
    """The row's own word for its language, else Chinese where the question has a Chinese character."""
    return row.meta.get("q_lang") or ("zh" if any("\u4e00" <= letter <= "\u9fff" for letter in row.question) else "en")


def vqa_rad(source: Path) -> Splits:
    """VQA-RAD's one public file (or files by split); `phrase_type` test_... marks the official test rows."""
    parts: Splits = {}
    for path in _files(source, (".json",)):
        named = split_of(path.name)
        for row in _with_images(path, read_vqa_rad):
            marked = "test" if row.meta.get("phrase_type", "").startswith("test") else "train"
            parts.setdefault(named or marked, []).append(row)
    return parts


def path_vqa(source: Path, images: Path) -> Splits:
    """PathVQA as Parquet, JSON, JSON lines or CSV; pictures inside a Parquet file are written to `images`/path_vqa."""
    parts: Splits = {}
    for path in _files(source, (".parquet", ".json", ".jsonl", ".csv")):
        rows = _parquet(path, images) if path.suffix == ".parquet" else _with_images(path, _path_rows)
        parts.setdefault(_split(path), []).extend(rows)
    return {split: [replace(row, id=f"{split}_{n}") for n, row in enumerate(rows)] for split, rows in parts.items()}


def _path_rows(path: Path, images: Path) -> list[Sample]:
    rows = _csv(path) if path.suffix == ".csv" else load_rows(path)
    return [_path_row(row, images / _cell(row, "image", path, n), path, n) for n, row in enumerate(rows)]


def _path_row(row: dict[str, Any], image: Path, path: Path, number: int) -> Sample:
    """One PathVQA row; its release has no answer types, so yes and no are closed and everything else is open."""
    answer = _cell(row, "answer", path, number)
    kind = "closed" if answer.lower() in {"yes", "no"} else "open"
    question = _cell(row, "question", path, number)
    return Sample(str(number), image, question, answer, kind, f"path-vqa/{image.name}", "path-vqa")


def _cell(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if value is None:
        raise DataError(f"{path} row {number} has no '{key}'; PathVQA rows need image, question and answer.")
    return str(value).strip()


def _csv(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as CSV ({error}); give it with columns image,question,answer."
        ) from error


def _parquet(path: Path, images: Path) -> list[Sample]:
    """Rows of a Parquet file, its pictures written once each under a name made from their content."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow to be read; install it, or give PathVQA as JSON or CSV.") from error
    folder = images / "path_vqa"
    folder.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=64, columns=["image", "question", "answer"]):
                for row in batch.to_pylist():
                    place = _picture(row.get("image"), folder, path, len(samples))
                    samples.append(_path_row(row, place, path, len(samples)))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a Parquet file of image, question and answer ({error}).") from error
    return samples


def _picture(cell: Any, folder: Path, path: Path, number: int) -> Path:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(f"{path} row {number} holds no picture; a Parquet file has to carry the bytes of its images.")
    suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
    place = folder / (hashlib.sha256(data).hexdigest()[:24] + suffix)
    if not place.exists():
        files.write_atomic(place, data)
    return place


def _files(source: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The question files of a release: the file given, or those of a folder. Raises `DataError`."""
    if source.is_file() and source.suffix in suffixes:
        yield source
        return
    if source.suffix == ".pkl" or (source.is_dir() and not _inside(source, suffixes) and _inside(source, (".pkl",))):
        raise DataError(
            f"{source} holds pickles, which can run any program when opened; "
            "give PathVQA in its Parquet, JSON or CSV form instead."
        )
    found = _inside(source, suffixes) if source.is_dir() else []
    if not found:
        raise DataError(f"{source} holds no {' or '.join(suffixes)} file; give the folder or file of the release.")
    yield from found


def _inside(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Question files directly in a folder or in its data/, qas/ or split folders."""
    found = [p for pattern in ("*", "data/*", "qas/*", "qas/*/*") for p in folder.glob(pattern)]
    return sorted(p for p in found if p.suffix in suffixes and p.is_file())


def _split(path: Path) -> str:
    split = split_of(path.name)
    if split is None:
        raise DataError(f"{path} does not say its split; its name has to contain train, val or test.")
    return split


def _with_images(path: Path, reader: Callable[[Path, Path], list[Sample]]) -> list[Sample]:
    """Rows with the pictures found at the usual places beside the file. Raises `DataError` when no place has any."""
    rows = reader(path, Path())
    names = [row.image for row in rows[:50] if isinstance(row.image, Path)]
    for folder in (path.parent, path.parent.parent):
        for place in _PLACES:
            if any((folder / place / name).is_file() for name in names):
                return reader(path, folder / place)
    if not names:
        return []
    raise DataError(
        f"The images of {path} are not beside it (looked for {names[0]} in imgs/ and images/); put them there."
    )
