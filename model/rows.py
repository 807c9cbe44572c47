"""Rows of a dataset file: JSON or JSON lines read whole, the one error of datasets, the spellings of answer types.

Knows nothing of what a row means; `model.data` and `model.conversations` do.
"""

import json
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A dataset or a row of it cannot be used; the message says which and what to do."""


def answer_type(value: object) -> str:
    """Map the spellings found in the wild ("CLOSED ", "close", "OPEN") to open, closed or unknown."""
    word = str(value or "").strip().lower()
    return {"open": "open", "closed": "closed", "close": "closed"}.get(word, "unknown")


def load_list(path: Path) -> list[Any]:
    """The list in a JSON file, or the lines of a .jsonl file; its rows may be anything. Raises `DataError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the path of a JSON dataset.") from error
    try:
        if path.suffix == ".jsonl":
            return _lines(data)
        rows = json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON (line {error.lineno}); repair or download it again.") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON text ({error}); repair or download it again.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} is not a list of rows; SLAKE, VQA-RAD and LLaVA files are JSON lists of objects.")
    return rows


def _lines(data: bytes) -> list[Any]:
    """One row a line; a fault is raised with the file's own line number."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, "\n" * (number - 1), number - 1) from error
    return rows


def load_rows(path: Path) -> list[dict[str, Any]]:
    """As `load_list`, where every row has to be an object. Raises `DataError`."""
    rows = load_list(path)
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not a list of rows; SLAKE, VQA-RAD and LLaVA files are JSON lists of objects.")
    return rows
