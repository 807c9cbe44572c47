"""The consent gate: keeps $AFYA_HOME/training/ equal to what was reviewed and may be used for training, and no more.

A turn's files are there if and only if the turn was confirmed or corrected, the latest consent of its case is
"training", and nothing in it looks like it names a person (`held_back`). Order makes this safe at every instant: what
must go is deleted *before* the withdrawal is saved, what may come is written *after* the consent is saved; a crash in
between leaves too little, never too much, and `reconcile` on the next start adds what is missing. The training client
reads the folder and never this database. Does not cover names that `model.deid` does not recognise in a text, nor
writing in a picture that the person who looked at it did not see.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kiosk import queries
from kiosk.records import Trainable
from kiosk.store import CaseStore, StoreError
from model.deid import identifiers, training_use
from model.files import sync_folder, write_atomic

FOLDER = "training"


@dataclass(frozen=True)
class Changes:
    """How many samples a reconciliation wrote and removed, how many there are now, and cases with damaged pictures."""

    written: int
    removed: int
    samples: int
    damaged: tuple[int, ...] = ()


def set_consent(store: CaseStore, home: Path, case_id: int, state: str, author: str, looked: bool = False) -> None:
    """Save a consent decision and bring the folder in line at once; a withdrawal removes the files first.

    `looked` says that the author saw no name written in the picture; where `needs_look`, nothing leaves without it.
    """
    with _folder(home) as folder:
        if state != "training" or not looked:
            _remove(folder, {_sample_id(row) for row in queries.trainable(store, case_id)})
            _drop_unused_images(folder)
        store.add_consent(case_id, state, author, looked)
        _write(store, folder, queries.trainable(store, case_id))


def review(
    store: CaseStore, home: Path, turn_id: int, verdict: str, author: str, correction: str | None = None
) -> None:
    """Save a verdict and bring the folder in line at once; files of the earlier verdict are removed first."""
    with _folder(home) as folder:
        case_id = queries.turn(store, turn_id).case_id
        _remove(folder, {_sample_id(row) for row in queries.trainable(store, case_id) if row.turn_id == turn_id})
        _drop_unused_images(folder)
        store.review(turn_id, verdict, author, correction)
        _write(store, folder, queries.trainable(store, case_id))


def reconcile(store: CaseStore, home: Path) -> Changes:
    """Make the folder what the database says, whatever a crash or a curious hand left there. Runs on every start."""
    with _folder(home) as folder:
        rows = [row for row in queries.trainable(store) if _may_leave(row)]
        damaged = {row.case_id for row in rows if not _readable(store, row.case_id)}
        rows = [row for row in rows if row.case_id not in damaged]
        wanted = {_sample_id(row) for row in rows}
        for stray in (folder / "samples").iterdir():
            if stray.suffix != ".json" or stray.name.startswith("."):
                stray.unlink()
        removed = _remove(folder, {path.stem for path in (folder / "samples").iterdir()} - wanted)
        written = _write(store, folder, rows)
        _drop_unused_images(folder)
        return Changes(written, removed, len(wanted), tuple(sorted(damaged)))


def needs_look(kind: str, fields: Mapping[str, str | int | float]) -> bool:
    """Whether a person has to look for a name in the picture: photographs, and kinds of study that often carry one."""
    return kind != "DICOM" or training_use(fields).verdict == "ask"


def held_back(row: Trainable) -> str | None:
    """Why a reviewed and consented turn may not be used, as a sentence for the screen; None when it may."""
    fields = json.loads(row.fields)
    if training_use(fields).verdict == "refuse":
        return training_use(fields).sentence
    if needs_look(row.format, fields) and not row.looked:
        return "Nobody has looked yet whether a name is written in the picture."
    for what, text in (("question", row.question), ("answer", row.answer)):
        if found := identifiers(text):
            part = text[found[0].start : found[0].end]
            return f"The {what} seems to name a person or a date ({part}), so it is not used."
    return None


def answer_type(question: str, answer: str) -> str:
    """ "closed" for yes/no answers and for a choice the question itself offers ("left or right?"), else "open"."""
    plain = re.sub(r"[^\w\s]", " ", answer.casefold()).split()
    if plain in (["yes"], ["no"]):
        return "closed"
    words = re.sub(r"[^\w\s]", " ", question.casefold()).split()
    choice = "or" in words and bool(plain) and any(words[i : i + len(plain)] == plain for i in range(len(words)))
    return "closed" if choice else "open"


@contextlib.contextmanager
def _folder(home: Path) -> Iterator[Path]:
    """The training folder, created, with no other thread or process changing it meanwhile."""
    folder = home / FOLDER
    for name in ("samples", "images"):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(home / ".training.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _sample_id(row: Trainable) -> str:
    return f"case-{row.case_id}-turn-{row.turn_id}"


def _may_leave(row: Trainable) -> bool:
    """Whether nothing about a reviewed and consented turn holds it back."""
    return held_back(row) is None


def _readable(store: CaseStore, case_id: int) -> bool:
    """False for a case whose picture is damaged: it stays out, and does not keep the kiosk from starting."""
    try:
        queries.image(store, case_id)
    except StoreError:
        return False
    return True


def _write(store: CaseStore, folder: Path, rows: list[Trainable]) -> int:
    """Write the samples that are missing or different, the picture before the sample that names it."""
    written = 0
    for row in filter(_may_leave, rows):
        content = {"id": _sample_id(row), "image": f"images/{row.image_sha256}.png", "question": row.question}
        content |= {"answer": row.answer, "answer_type": answer_type(row.question, row.answer)}
        content |= {"group": row.image_sha256, "source": "kiosk", "consented_at": row.consented_at}
        data = json.dumps(content, ensure_ascii=False, indent=1).encode()
        image = folder / content["image"]
        sample = folder / "samples" / f"{content['id']}.json"
        png = queries.image(store, row.case_id)
        if not _same(image, png):
            write_atomic(image, png)
        if not _same(sample, data):
            write_atomic(sample, data)
            written += 1
    return written


def _same(path: Path, data: bytes) -> bool:
    """Whether the file is there with exactly these bytes; a link is never taken for the file."""
    return path.is_file() and not path.is_symlink() and path.read_bytes() == data


def _remove(folder: Path, ids: set[str]) -> int:
    """Delete samples so that they stay deleted after a power cut; says how many there were."""
    found = [path for name in sorted(ids) if (path := folder / "samples" / f"{name}.json").exists()]
    for path in found:
        path.unlink()
    if found:
        sync_folder(folder / "samples")
    return len(found)


def _drop_unused_images(folder: Path) -> None:
    """Delete every picture that no sample names."""
    used = set()
    for path in (folder / "samples").glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged sample names nothing; it is rewritten
            used.add(os.path.basename(json.loads(path.read_text(encoding="utf-8"))["image"]))
    unused = [path for path in (folder / "images").iterdir() if path.name not in used]
    for path in unused:
        path.unlink()
    if unused:
        sync_folder(folder / "images")
