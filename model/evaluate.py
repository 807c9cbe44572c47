"""Let a backend answer a dataset, and score the answers strictly.

`answer_all` and `accuracy` work in memory; `run` is `afya-model evaluate`: it appends every batch to answers.jsonl,
goes on where it was stopped, refuses to mix two models in one folder, and writes report.json. Questions about one
picture are put in one batch, so that the picture is encoded once. Not covered: plots, calibration, other judges.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from model import data, files, metrics
from model.backend_choice import open_backend
from model.backends import Answer, Request, TorchBackend
from model.data import Sample
from model.metrics import Report, Row

if TYPE_CHECKING:
    from model.onnx_backend import OnnxBackend

ANSWERS, MANIFEST, REPORT = "answers.jsonl", "run.json", "report.json"
_PACKAGES = ("afya", "torch", "transformers", "peft", "bitsandbytes", "onnxruntime", "numpy")
_GIB = 2**30


class EvaluationError(RuntimeError):
    """An evaluation cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """What to evaluate and how; `limit` takes the first rows only, `compare` is another run's answers.jsonl."""

    model: Path
    data: Path
    out: Path
    bits: int
    images: Path | None = None
    adapter: Path | None = None
    batch: int = 32
    limit: int | None = None
    max_new_tokens: int = 64
    device: str | None = None
    compare: Path | None = None
    progress: bool = True


def answer_batches(
    backend: Any, samples: Sequence[Sample], batch: int = 32, *, max_new_tokens: int = 64
) -> Iterator[list[tuple[int, Answer]]]:
    """Answer all samples batch by batch, yielding (place in `samples`, Answer) pairs; rows of one image go together.

    `backend` is a Backend, or what `llava.load` returned.
    """
    answering = backend if hasattr(backend, "generate") else TorchBackend.wrap(backend)
    order = sorted(range(len(samples)), key=lambda n: (samples[n].group, len(samples[n].question), n))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        pictures: dict[object, np.ndarray] = {}
        requests = []
        for place in places:
            sample = samples[place]
            key = sample.image if isinstance(sample.image, Path) else id(sample.image)
            if key not in pictures:
                pictures[key] = data.load_rgb(sample)
            requests.append(Request(pictures[key], sample.question, sample.history, max_new_tokens))
        finished = [item for item in answering.generate(requests) if isinstance(item, tuple)]
        yield [(places[index], answer) for index, answer in finished]


def answer_all(
    backend: Any, samples: Sequence[Sample], batch: int = 32, *, max_new_tokens: int = 64, progress: bool = False
) -> list[Answer]:
    """One Answer per sample, in the order of `samples`; nothing is written."""
    answers: dict[int, Answer] = {}
    with _bar(len(samples), 0, progress) as bar:
        for finished in answer_batches(backend, samples, batch, max_new_tokens=max_new_tokens):
            answers.update(finished)
            bar.update(len(finished))
    return [answers[place] for place in range(len(samples))]


def accuracy(
    backend: Any, samples: Sequence[Sample], batch: int = 64, *, max_new_tokens: int = 32, progress: bool = False
) -> Report:
    """Strict scores of a backend or loaded model on samples, in memory; for many short evaluations.

    An answer longer than `max_new_tokens` counts as wrong unless the reference is cut off at the same place.
    """
    answers = answer_all(backend, samples, batch, max_new_tokens=max_new_tokens, progress=progress)
    return metrics.score(rows(samples, [answer.text for answer in answers]), resamples=2000)


def rows(samples: Sequence[Sample], texts: Sequence[str | None] | None = None) -> list[Row]:
    """Scorer rows of samples with their answers, given in the same order (None: not answered)."""
    given = texts if texts is not None else [None] * len(samples)
    return [
        Row(s.id, s.answer, text, s.answer_type, s.group, s.meta.get("content_type") or s.meta.get("topic", ""))
        for s, text in zip(samples, given, strict=True)
    ]


def score_files(dataset: Path, files_of_answers: Sequence[Path]) -> dict[str, Any]:
    """Scores of answers that were made elsewhere, and of several runs their mean; rows are matched by id."""
    references = rows(data.read(dataset, dataset.parent))  # the images are not looked at
    runs, reports = [], {}
    for path in files_of_answers:
        given = [(row["question_id"], row["text"]) for row in _answers(path)[0]]
        matched, counts = metrics.match(references, given)
        runs.append(matched)
        reports[str(path)] = metrics.score(matched, counts=counts).to_dict()
    mean = {name: dataclasses.asdict(part) if part else None for name, part in metrics.average(runs).items()}
    return {"runs": reports, "mean": mean}


def _bar(total: int, done: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="row", desc="answers", disable=not shown, mininterval=0.5)


def run(settings: Settings) -> dict[str, Any]:
    """Evaluate into `settings.out`, going on where an earlier run stopped; returns what report.json says.

    Raises DataError, ModelError, AdapterRejected, ScoreError or EvaluationError with one plain sentence.
    """
    everything = data.read(settings.data, settings.images)
    samples = everything[: settings.limit]
    compared = _answers(settings.compare)[0] if settings.compare else None
    references = rows(samples)
    metrics.match(references, [])  # ids that stand for two questions are refused before the work starts
    backend = open_backend(settings.model, settings.bits, settings.adapter, settings.device)
    manifest = _manifest(settings, everything, backend)
    settings.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with _opened(settings.out, manifest) as (stream, earlier, torn):
        known = {row["question_id"] for row in earlier}
        todo = [sample for sample in samples if sample.id not in known]
        with _bar(len(samples), len(samples) - len(todo), settings.progress) as bar:
            for finished in answer_batches(backend, todo, settings.batch, max_new_tokens=settings.max_new_tokens):
                _append(stream, [_line(todo[place], answer) for place, answer in finished])
                bar.update(len(finished))
    speed = {"rows": len(todo), "seconds": round(time.perf_counter() - began, 3), "torn_lines_dropped": torn}
    answers, _ = _answers(settings.out / ANSWERS)
    matched, counts = metrics.match(references, [(row["question_id"], row["text"]) for row in answers])
    report = {
        "scores": metrics.score(matched, counts=counts).to_dict(),
        "measured": _measured(settings, backend, answers, speed),
        **manifest,
    }
    if compared is not None:
        before, _ = metrics.match(references, [(row["question_id"], row["text"]) for row in compared])
        report["flips"] = metrics.flips(before, matched)
    files.write_atomic(settings.out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def _manifest(settings: Settings, samples: Sequence[Sample], backend: TorchBackend | OnnxBackend) -> dict[str, Any]:
    """What must be the same for two runs to share a folder."""
    pictures = sorted({sample.image for sample in samples if isinstance(sample.image, Path)})
    digest = hashlib.sha256()
    for picture in pictures:
        try:
            digest.update(bytes.fromhex(files.sha256_file(picture)))
        except OSError as error:
            raise EvaluationError(f"Image {picture} cannot be read; check --images.") from error
    content = "\n".join(json.dumps([s.id, s.question, s.answer, s.history]) for s in samples)
    return {
        "model": backend.loaded.path.name,
        "base_sha256": backend.loaded.base_sha256,
        "adapter_sha256": backend.adapter_sha256,
        "bits": settings.bits,
        "backend": backend.name,
        "device": backend.loaded.device,
        "max_new_tokens": settings.max_new_tokens,
        "data_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "images_sha256": digest.hexdigest(),
    }


def _measured(
    settings: Settings, backend: TorchBackend | OnnxBackend, answers: Sequence[Any], speed: dict[str, Any]
) -> Any:
    details = [row["metadata"] for row in answers]
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "scorer": "strict exact match after normalisation; 95 % bootstrap intervals over images",
        "decoding": "greedy",
        "reason": backend.reason,
        "batch": settings.batch,
        "this_run": speed,
        "static_mib": round(backend.static_bytes / 2**20, 2),
        "peak_gib": round(max((d["memory_usage"] for d in details), default=0.0), 4),
        "mean_tokens": round(float(np.mean([d["tokens_generated"] for d in details] or [0])), 2),
        "cut_off": sum(d["finish_reason"] == "length" for d in details),
        "versions": versions,
    }


@contextmanager
def _opened(out: Path, manifest: dict[str, Any]) -> Iterator[tuple[IO[bytes], list[Any], int]]:
    """The answers file of this very run, open for appending, with what it holds; a torn last line is cut off."""
    with open(out / ANSWERS, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(
                f"Another evaluation is writing to {out}; wait for it or choose another --out."
            ) from error
        _same_run(out, manifest)
        earlier, whole = _answers(out / ANSWERS)
        torn = stream.tell() > whole
        stream.truncate(whole)
        yield stream, earlier, int(torn)


def _same_run(out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into a new folder; refuse a folder that belongs to something else."""
    path = out / MANIFEST
    if not path.exists():
        if (out / ANSWERS).stat().st_size:
            raise EvaluationError(f"{out / ANSWERS} was made by something else; choose an empty folder with --out.")
        files.write_atomic(path, (json.dumps(manifest, indent=2) + "\n").encode())
        return
    try:
        former = json.loads(path.read_text())
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged; choose an empty folder with --out.") from error
    other = [f"{key} {former.get(key)}, now {value}" for key, value in manifest.items() if former.get(key) != value]
    if other:
        raise EvaluationError(f"{out} holds answers of another run ({other[0]}); choose an empty folder with --out.")


def _answers(path: Path) -> tuple[list[Any], int]:
    """The whole lines of an answers file and how many bytes they are; what follows the last newline is left out."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}); give the path of an answers.jsonl."
        ) from error
    whole = content.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
            found.append({**row, "question_id": str(row["question_id"]), "text": row["text"]})
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} line {number} is no answer; remove the line or start anew.") from error
    return found, whole


def _append(stream: IO[bytes], lines: Sequence[dict[str, Any]]) -> None:
    stream.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def _line(sample: Sample, answer: Answer) -> dict[str, Any]:
    """One line of answers.jsonl; `memory_usage` in GiB and seconds from the start of the batch."""
    return {
        "question_id": sample.id,
        "prompt": sample.question,
        "text": answer.text,
        "answer_id": uuid.uuid4().hex,
        "model_id": answer.model_id,
        "metadata": {
            "inference_time": round(answer.seconds, 4),
            "first_token_time": round(answer.first_token_seconds, 4),
            "tokens_generated": answer.tokens,
            "memory_usage": round(answer.peak_bytes / _GIB, 4),
            "finish_reason": answer.finish_reason,
            "confidence": round(answer.confidence, 6),
        },
    }
