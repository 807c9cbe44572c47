"""Answers that a clinic may have missed: given once more when the SuperLink refuses a call because it has done it.

Flower's SuperNode sends a call again when the line was cut before the answer came, but in Flower 1.41 four calls
cannot be repeated: a second activation is refused and the node ends, a message is handed out once and then lost, an
object sent twice is refused with the whole reply, and a reply announced twice may be told that nothing is missing. So
the last answers of each key are remembered here, and given only where the SuperLink has let the repeated call in. The
activations are kept in a file: after a restart of the server the SuperLink still counts its nodes as there, and one
that was killed meanwhile is let in again at once. A restart forgets the rest. Not here: the signature of a call (the
SuperLink), and keys that were revoked (`server.guard`).
"""

import asyncio
import base64
import contextlib
import hashlib
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from model.files import write_atomic

FILE = "activations.json"  # in the server's state folder
REFUSED = 412  # Flower's status for an activation that it refuses, of a node that is there already as of an unknown key
TIMES = 20  # how often a message is handed out before it is believed to be one that nobody can take
PUSHES = 8  # answers to pushes that are remembered: a clinic of ours has one under way, another Flower client two
FLEET = "/v1/fleet/"
REPEATED = frozenset(FLEET + name for name in ("activate-node", "pull-messages", "push-object", "push-messages"))
ABOUT_A_MESSAGE = frozenset(FLEET + name for name in ("get-run", "get-fab", "pull-object", "confirm-message-received"))

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes]


@dataclass
class _Clinic:
    """What was last answered to one key."""

    activation: Answer | None = None
    message: Answer | None = None
    times: int = 0
    pushes: deque[tuple[bytes, Answer]] = field(default_factory=lambda: deque(maxlen=PUSHES))


class Again:
    """Remembers by key. Only what the SuperLink accepted is remembered, so keys are those of registered clinics.

    `state` is the server's folder, where the activations are kept; None keeps them nowhere.
    """

    def __init__(self, state: Path | None = None) -> None:
        self._file = state / FILE if state else None
        self._clinics = {key: _Clinic(activation=answer) for key, answer in _kept(self._file).items()}
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def lock(self, key: bytes) -> asyncio.Lock:
        """To be held while such a call of this key is with the SuperLink: a repeat must find the first one's answer."""
        return self._locks.setdefault(key, asyncio.Lock())

    def settle(self, call: str, key: bytes, body: bytes, answer: Answer) -> Answer:
        """The answer to give to a call in REPEATED that the SuperLink has answered with `answer`."""
        status = answer[0]
        clinic = self._clinics.get(key) or _Clinic()
        if call.endswith("activate-node"):
            given = _activation(clinic, answer)
        elif status != 200:
            return answer
        elif call.endswith("pull-messages"):
            given = _message(clinic, answer)
        else:
            given = _push(clinic, hashlib.sha256(call.encode() + body).digest(), answer)
        if status == 200:
            self._clinics[key] = clinic
        if status == 200 and call.endswith("activate-node"):
            self._keep()
        return given or answer

    def _keep(self) -> None:
        """Write down the activations; a disk that is full costs a clinic some minutes after two crashes, no more."""
        if self._file is None:
            return
        found = {
            key.decode("latin-1"): [[n.decode("latin-1"), v.decode("latin-1")] for n, v in clinic.activation[1]]
            + [base64.b64encode(clinic.activation[2]).decode()]
            for key, clinic in self._clinics.items()
            if clinic.activation
        }
        with contextlib.suppress(OSError):
            write_atomic(self._file, json.dumps(found).encode())

    def seen(self, call: str, key: bytes, status: int) -> None:
        """Forget a message once the clinic has confirmed it, or the SuperLink says that its run is over."""
        confirmed = status == 200 and call.endswith("confirm-message-received")
        if (confirmed or (status == 403 and call in ABOUT_A_MESSAGE)) and key in self._clinics:
            self._clinics[key].message = None


def _kept(file: Path | None) -> dict[bytes, Answer]:
    """The activations in a file; none where there is none, or a damaged one."""
    try:
        rows = json.loads(file.read_bytes()) if file else {}
        found = {}
        for key, (*headers, body) in rows.items():
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            found[key.encode("latin-1")] = (200, pairs, base64.b64decode(body))
        return found
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _activation(clinic: _Clinic, answer: Answer) -> Answer | None:
    """What a node is told that is there already: its number, as before."""
    if answer[0] == 200:
        clinic.activation = answer
    return clinic.activation if answer[0] == REFUSED else None


def _message(clinic: _Clinic, answer: Answer) -> Answer | None:
    """The message that was handed out and not confirmed, where there is no other."""
    if answer[2]:
        clinic.message, clinic.times = answer, 0
    clinic.times += 1
    return clinic.message if clinic.times <= TIMES else None


def _push(clinic: _Clinic, digest: bytes, answer: Answer) -> Answer | None:
    """The first answer to a push, where its repetition is told less: not stored, or none of the objects to send."""
    first = dict(clinic.pushes).get(digest)
    if first and len(answer[2]) < len(first[2]):
        return first
    clinic.pushes.append((digest, answer))
    return None
