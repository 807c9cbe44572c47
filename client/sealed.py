"""A clinic's sealed set: consented samples that are never trained on, and what a candidate adapter does on them.

One picture (or patient, where known) in ten is sealed, chosen by a hash with a key that only this clinic has: no server
can know or choose them. Sealing begins when the clinic has samples of enough pictures, and then holds however few are
left; what was trained on before stays open for ever. privacy/sealed.json holds the key, whether sealing has begun, and
hashes of every picture that was trained on. Only counts leave (`model.exam_counts`), and none from a set that is small.
Not covered: a server that sends many candidates made to tell single rows apart, and a lost sealed.json, after which
other pictures are sealed.
"""

import hashlib
import hmac
import json
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
_ENOUGH = round(MIN_PICTURES * (1 - 2 * SHARE))  # of them trained on: sealing had begun, where no entry says whether
MAX_ROWS = 400  # questions of an examination; the rest of a larger set is left out, the same ones each time


@dataclass(frozen=True)
class Seal:
    """The clinic's key, the hashes of what was trained on, and whether sealing has begun."""

    key: bytes
    trained: frozenset[str]
    begun: bool = False

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
    """The samples that may be trained on; whoever trains says so first (`note_training`). Raises Refused."""
    with ledger.locked(home):
        seal = _begun(home, samples)
        return [sample for sample in samples if not _closed(seal, sample)]


def note_training(home: Path, samples: "list[Sample]") -> None:
    """Write down that these samples are trained on from now on. Raises Refused where one was sealed meanwhile."""
    with ledger.locked(home):
        seal = _read(home)
        if any(_closed(seal, sample) for sample in samples):
            raise limits.Refused("the sealed set began while this round was made ready; the next round goes on")
        _write(home, replace(seal, trained=seal.trained | {seal.mark(sample.group) for sample in samples}))


def sealed(home: Path, samples: "list[Sample]") -> "list[Sample]":
    """The sealed samples, at most `MAX_ROWS`. Raises Refused when there are too few for counts to leave."""
    with ledger.locked(home):
        seal = _begun(home, samples)
        chosen = sorted((s for s in samples if _closed(seal, s)), key=lambda s: (seal.mark(s.group), s.id))[:MAX_ROWS]
        pictures = len({sample.group for sample in chosen})
        if len(chosen) < LEAST_ROWS or pictures < LEAST_GROUPS:
            raise limits.Refused(
                f"the sealed set has {len(chosen)} questions on {pictures} pictures; counts leave this clinic from "
                f"{LEAST_ROWS} questions on {LEAST_GROUPS} pictures"
            )
    return chosen


def _begun(home: Path, samples: "Iterable[Sample]") -> Seal:
    """The clinic's seal as it is with these samples; sealing begins once, with enough pictures, and never ends."""
    seal = _read(home)
    seal = replace(seal, begun=seal.begun or len({sample.group for sample in samples}) >= MIN_PICTURES)
    _write(home, seal)
    return seal


def _closed(seal: Seal, sample: "Sample") -> bool:
    return seal.begun and seal.closed(sample.group)


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
        key, trained = bytes.fromhex(found["key"]), frozenset(map(str, found["trained"]))
        return Seal(key, trained, found["begun"] is True if "begun" in found else len(trained) >= _ENOUGH)
    except FileNotFoundError:
        return Seal(secrets.token_bytes(32), frozenset())
    except PermissionError as error:
        raise limits.Refused(ledger.closed(path)) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise limits.Refused(f"{path.name} of this clinic is damaged ({error}); put its copy back") from error


def _write(home: Path, seal: Seal) -> None:
    path = home / FILE
    record = {"key": seal.key.hex(), "begun": seal.begun, "trained": sorted(seal.trained)}
    text = json.dumps(record) + "\n"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise limits.Refused(f"{path.name} cannot be written ({error.strerror}), so nothing is trained") from error
