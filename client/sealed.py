"""A clinic's sealed set: consented samples that are never trained on, and what a candidate adapter does on them.

One picture (or patient, where known) in ten is sealed, chosen by a hash with a key that only this clinic has: no server
can know or choose them. Sealing begins when the clinic has samples of enough pictures; what was trained on
before stays open for ever: privacy/sealed.json holds the key and hashes of every picture that was trained on. Only
counts leave (`model.exam_counts`), and none from a set that is small. Not covered: a server that sends many candidates
made to tell single rows apart, and a lost sealed.json, after which other pictures are sealed.
"""

import hashlib
import hmac
import json
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client import ledger, limits
from model import adapters
from model.exam_counts import LEAST_GROUPS, LEAST_ROWS
from model.files import read_plain, write_atomic

if TYPE_CHECKING:
    from model.data import Sample

FILE = Path("privacy") / "sealed.json"
SHARE = 0.1  # of the pictures
MIN_PICTURES = 20  # below it a clinic needs every sample for training, and a tenth would say nothing
MAX_ROWS = 400  # questions of an examination; the rest of a larger set is left out, the same ones each time


@dataclass(frozen=True)
class Seal:
    """The clinic's key and the hashes of what was trained on."""

    key: bytes
    trained: frozenset[str]

    def mark(self, group: str) -> str:
        """Hash of a picture or patient under this clinic's key."""
        return hmac.new(self.key, group.encode(), hashlib.sha256).hexdigest()[:16]

    def closed(self, group: str) -> bool:
        """Whether a picture belongs to the sealed set."""
        mark = self.mark(group)
        return int(mark, 16) < SHARE * 2**64 and mark not in self.trained


def begin(home: Path, key: bytes) -> None:
    """Give a new clinic this key, so that a demonstration seals the same pictures each time; a real one draws its own.

    A clinic that has a key keeps it. Raises Refused.
    """
    with ledger.locked(home):
        if not (home / FILE).exists():
            _write(home, Seal(key, frozenset()))


def open_to_training(home: Path, samples: "list[Sample]") -> "list[Sample]":
    """The samples that may be trained on; that they were is written down before this returns. Raises Refused."""
    with ledger.locked(home):
        seal = _read(home)
        closed = _closed(seal, samples)
        rest = [sample for sample in samples if sample.group not in closed]
        _write(home, Seal(seal.key, seal.trained | {seal.mark(sample.group) for sample in rest}))
    return rest


def sealed(home: Path, samples: "list[Sample]") -> "list[Sample]":
    """The sealed samples, at most `MAX_ROWS`. Raises Refused when there are too few for counts to leave."""
    with ledger.locked(home):
        seal = _read(home)
        closed = _closed(seal, samples)
        chosen = sorted((s for s in samples if s.group in closed), key=lambda s: (seal.mark(s.group), s.id))[:MAX_ROWS]
        pictures = len({sample.group for sample in chosen})
        if len(chosen) < LEAST_ROWS or pictures < LEAST_GROUPS:
            raise limits.Refused(
                f"the sealed set has {len(chosen)} questions on {pictures} pictures; counts leave this clinic from "
                f"{LEAST_ROWS} questions on {LEAST_GROUPS} pictures"
            )
        _write(home, seal)
    return chosen


def _closed(seal: Seal, samples: "Iterable[Sample]") -> set[str]:
    groups = {sample.group for sample in samples}
    return {group for group in groups if seal.closed(group)} if len(groups) >= MIN_PICTURES else set()


def examine(config: Mapping[str, Any], arrays: Mapping[str, Any], home: Path) -> tuple[dict[str, Any], str]:
    """Counts of a candidate beside what is installed here, on the sealed set, at the kiosk's bits; and its hash.

    Minutes and memory are those of training; its hours are not, or an adapter would be released unexamined by day.
    Raises Refused with the reason; then nothing about the samples has left.
    """
    from client import memory, received
    from model.data import DataError, read_training
    from model.exam import ExamTooLong
    from model.llava import ModelError
    from model.presets import PresetMissing

    start = time.monotonic()
    known = (limits.SettingsWrong, adapters.AdapterRejected, DataError, ModelError, PresetMissing, ExamTooLong, OSError)
    try:
        allowed = limits.read_limits(home)
        end = start + 60 * allowed.max_minutes
        samples = sealed(home, read_training(home / "training"))
        with memory.capped(allowed.max_memory_mib), tempfile.TemporaryDirectory(prefix="afya-candidate-") as scratch:
            folder = Path(scratch) / "adapter"
            digest = received.unpack(config, arrays, home, folder)
            return _compare(home, samples, folder, allowed, end), digest
    except known as error:
        raise limits.Refused(str(error)) from error
    except (KeyError, TypeError, OverflowError) as error:
        raise limits.Refused(f"the candidate is not readable: {error}") from error
    except (RuntimeError, MemoryError) as error:
        raise limits.Refused(f"the examination stopped: {error}") from error


def _compare(home: Path, samples: "list[Sample]", folder: Path, allowed: limits.Limits, end: float) -> dict[str, Any]:
    """Answer the samples as this clinic's kiosk would; the kiosk goes first."""
    import torch

    from client import courtesy
    from model import backend_choice, exam, manifest

    if allowed.threads:
        torch.set_num_threads(allowed.threads)
    base = limits.base_model(home)
    asked = None if manifest.is_quantized(base) else int(limits.read_settings(home).get("bits", 4))
    backend: Any = backend_choice.open_backend(base, asked)
    if hasattr(backend.loaded, "core"):
        courtesy.between_layers(backend.loaded.model, courtesy.Courtesy(home).pause)
    bits = backend_choice.bits_of(base, asked)
    found = exam.compare(backend, samples, adapters.current(home), folder, bits=bits, end=end, say=_say)
    return dict(found.record())


def _say(text: str) -> None:
    print(text, flush=True)


def _read(home: Path) -> Seal:
    """The clinic's seal; a new key where there is none. Raises Refused for a damaged one: guessing could unseal."""
    path = home / FILE
    try:
        found = json.loads(read_plain(path.parent.resolve() / path.name, ledger.MAX_BYTES))
        return Seal(bytes.fromhex(found["key"]), frozenset(map(str, found["trained"])))
    except FileNotFoundError:
        return Seal(secrets.token_bytes(32), frozenset())
    except PermissionError as error:
        raise limits.Refused(ledger.closed(path)) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise limits.Refused(f"{path.name} of this clinic is damaged ({error}); put its copy back") from error


def _write(home: Path, seal: Seal) -> None:
    path = home / FILE
    text = json.dumps({"key": seal.key.hex(), "trained": sorted(seal.trained)}) + "\n"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise limits.Refused(f"{path.name} cannot be written ({error.strerror}), so nothing is trained") from error
