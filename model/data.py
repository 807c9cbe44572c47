"""Datasets as `Sample`s: readers for SLAKE, VQA-RAD, LLaVA JSON and a clinic's training folder; split by image.

Reading imports no torch. Images stay paths until `load_rgb`; `model.collate` turns samples into tensors.
Not here: downloading, building train/test files, checking a whole dataset for faults.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.conversations import TurnFault, domain_of, pairs_of, turns_of
from model.rows import DataError, answer_type, load_rows

__all__ = ["READERS", "DataError", "Sample", "answer_type", "examine", "load_rgb", "read", "split_by_group"]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    `image` is a path or an RGB array uint8 (H, W, 3); `group` names the image or patient that a split must not cut
    through; `history` holds the earlier (question, answer) turns of the same conversation.
    """

    id: str
    image: Path | np.ndarray
    question: str
    answer: str
    answer_type: str  # "open", "closed" or "unknown"
    group: str
    source: str
    history: tuple[tuple[str, str], ...] = ()
    meta: dict[str, str] = field(default_factory=dict)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row or row[key] is None:
        raise DataError(f"{where} has no '{key}'; complete or remove the row.")
    return str(row[key]).strip()


def read_slake(path: Path, images: Path) -> list[Sample]:
    """Read SLAKE 1.0 rows; `images` is the folder that holds xmlabN/source.jpg. Raises `DataError`."""
    samples = []
    for number, row in enumerate(load_rows(path)):
        where = f"{path} row {number}"
        name = _text(row, "img_name", where)
        meta: dict[str, str] = {
            k: str(row[k]) for k in ("content_type", "modality", "location", "q_lang", "base_type") if k in row
        }
        samples.append(
            Sample(
                id=str(row.get("qid", number)),
                image=images / name,
                question=_text(row, "question", where),
                answer=_text(row, "answer", where),
                answer_type=answer_type(row.get("answer_type")),
                group=f"slake/{name.split('/')[0]}",
                source="slake",
                meta=meta,
            )
        )
    return samples


def read_vqa_rad(path: Path, images: Path) -> list[Sample]:
    """Read VQA-RAD rows; `images` is the folder that holds synpicN.jpg. Raises `DataError`."""
    samples = []
    for number, row in enumerate(load_rows(path)):
        where = f"{path} row {number}"
        name = _text(row, "image_name", where)
        meta = {"content_type": str(row.get("question_type", "")), "location": str(row.get("image_organ", ""))}
        if row.get("phrase_type"):
            meta["phrase_type"] = str(row["phrase_type"])  # test_... marks the official test rows
        samples.append(
            Sample(
                id=str(row.get("qid", number)),
                image=images / name,
                question=_text(row, "question", where),
                answer=_text(row, "answer", where),
                answer_type=answer_type(row.get("answer_type")),
                group=f"vqa-rad/{name}",
                source="vqa-rad",
                meta=meta,
            )
        )
    return samples


def read_llava(path: Path, images: Path) -> list[Sample]:
    """Read LLaVA conversation JSON: one `Sample` per answer, earlier turns in `history`. Raises `DataError`."""
    samples = []
    for number, row in enumerate(load_rows(path)):
        where = f"{path} row {number}"
        name = _text(row, "image", where)
        try:
            pairs = pairs_of(turns_of(row))
        except TurnFault as fault:
            raise DataError(f"{where} {fault}") from fault
        row_id = str(row.get("id", number))
        meta = {k: str(row[k]) for k in ("domain", "question_type", "modality", "location") if row.get(k) is not None}
        meta["content_type"] = str(row.get("question_type", ""))
        if "domain" in meta:
            meta["domain"] = domain_of(row["domain"])
        for index, (question, answer) in enumerate(pairs):
            samples.append(
                Sample(
                    id=row_id if len(pairs) == 1 else f"{row_id}-{index}",
                    image=images / name,
                    question=question,
                    answer=answer,
                    answer_type=answer_type(row.get("answer_type")),
                    group=f"llava/{name}",
                    source="llava",
                    history=pairs[:index],
                    meta=meta,
                )
            )
    return samples


def read_training(folder: Path) -> list[Sample]:
    """Read a clinic's `training/` folder (samples/*.json, images/*.png), ordered by name. Raises `DataError`."""
    samples = []
    for path in sorted((folder / "samples").glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            samples.append(
                Sample(
                    id=str(row["id"]),
                    image=folder / "images" / Path(row["image"]).name,
                    question=str(row["question"]),
                    answer=str(row["answer"]),
                    answer_type=answer_type(row.get("answer_type")),
                    group=str(row.get("group") or row["image"]),
                    source=str(row.get("source", "kiosk")),
                )
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); run `afya-kiosk verify` to rebuild the folder.") from error
    return samples


READERS: dict[str, tuple[str, Callable[[Path, Path], list[Sample]]]] = {
    "slake": ("img_name", read_slake),
    "vqa-rad": ("image_name", read_vqa_rad),
    "llava": ("conversations", read_llava),
}


def read(path: Path, images: Path | None = None) -> list[Sample]:
    """Read a dataset file of any known format, told by the keys of its first row, or a clinic's training folder.

    Without `images` the usual places beside the file are tried (imgs/, images/, the file's own folder, its parent).
    """
    if path.is_dir():
        return read_training(path)
    rows = load_rows(path)
    if not rows:
        raise DataError(f"{path} holds no rows; choose another file.")
    first = set(rows[0]) | ({"conversations"} if "conversatons" in rows[0] else set())
    for mark, reader in READERS.values():
        if mark in first:
            return reader(path, images) if images else _with_found_images(path, reader)
    raise DataError(f"{path} is in no known format (SLAKE, VQA-RAD or LLaVA JSON); its keys are {sorted(first)[:6]}.")


def _with_found_images(path: Path, reader: Callable[[Path, Path], list[Sample]]) -> list[Sample]:
    places = [path.parent / "imgs", path.parent / "images", path.parent, path.parent.parent]
    for place in places:
        samples = reader(path, place)
        if isinstance(samples[0].image, Path) and samples[0].image.exists():
            return samples
    raise DataError(f"The images of {path} were not found beside it; say where they are with --images DIR.")


def split_by_group(samples: Iterable[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split so that no image is on both sides; the second part holds about `fraction` of the groups."""
    samples = list(samples)
    groups = sorted({sample.group for sample in samples})
    random.Random(seed).shuffle(groups)
    held = set(groups[: round(len(groups) * fraction)])
    return [s for s in samples if s.group not in held], [s for s in samples if s.group in held]


def examine(path: str) -> tuple[str, str]:
    """Open one picture whole: ("", SHA-256 of its RGB pixels) if it is usable, (what is wrong, "") if not.

    Never raises for a bad file, whatever its bytes do to the decoder.
    """
    import hashlib
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                picture.verify()
            with Image.open(path) as picture:
                rgb = picture.convert("RGB")
    except FileNotFoundError:
        return "missing", ""
    except Exception as error:  # decoders raise whatever comes to them on damaged bytes
        return f"unreadable ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no word'})", ""
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return "", digest.hexdigest()


def load_rgb(sample: Sample) -> np.ndarray:
    """RGB array uint8 (H, W, 3) of a dataset image (trusted files; the kiosk's uploads go through `model.images`)."""
    if isinstance(sample.image, np.ndarray):
        return sample.image
    from PIL import Image

    try:
        with Image.open(sample.image) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise DataError(f"Image {sample.image} of row {sample.id} cannot be read; check --images.") from error
