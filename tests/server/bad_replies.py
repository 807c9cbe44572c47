"""Every way in which a clinic's reply can be wrong, by name: what it sends and a word of the reason it must be given.

The rows are those with which the stock strategies of Flower 1.41 follow the attacker, crash or end the run.
"""

import struct
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from tests.server.fakes import asked, moved, reply

Bad = Callable[[int, Message], RecordDict | Error | Exception | None]


def _changed(change: Callable[[np.ndarray], np.ndarray]) -> Bad:
    """The first array of an honest reply goes through `change`."""

    def answer(node: int, message: Message) -> RecordDict:
        arrays = moved(message, 0.01)
        name = min(arrays)
        return reply({**arrays, name: change(arrays[name])}, asked(message)[0])

    return answer


def _examples(value: object, step: float = 0.01) -> Bad:
    return lambda node, message: reply(moved(message, step), asked(message)[0], value)


def _cases(value: object) -> Bad:
    return lambda node, message: reply(moved(message, 0.01), asked(message)[0], **{"num-cases": value})


def _npy(header: str, body: bytes) -> bytes:
    text = header.encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def _raw(data: Callable[[np.ndarray], bytes], declared: tuple[str, ...] | None = None) -> Bad:
    """The first array's bytes are `data`, while the message declares what was asked for."""

    def answer(node: int, message: Message) -> RecordDict:
        arrays: dict = moved(message, 0.01)
        name = min(arrays)
        real = arrays[name]
        arrays[name] = Array(dtype="float32", shape=tuple(real.shape), stype="numpy.ndarray", data=data(real))
        return reply(arrays, asked(message)[0])

    return answer


def _keys(node: int, message: Message) -> RecordDict:
    arrays = moved(message, 0.01)
    arrays["evil"] = arrays.pop(min(arrays))
    return reply(arrays, asked(message)[0])


def _other_factor(node: int, message: Message) -> RecordDict:
    number, factor, state = asked(message)
    return reply({name: a for name, a in state.items() if not name.endswith(factor)}, number)


def _records(node: int, message: Message) -> RecordDict:
    content = reply(moved(message, 0.01), asked(message)[0])
    content["more"] = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    return content


def _no_metrics(node: int, message: Message) -> RecordDict:
    content = reply(moved(message, 0.01), asked(message)[0])
    del content["metrics"]
    return content


def _many_metrics(node: int, message: Message) -> RecordDict:
    return reply(moved(message, 0.01), asked(message)[0], **{f"m{i}": 1.0 for i in range(100)})


def _object(real: np.ndarray) -> bytes:
    return _npy(f"{{'descr': '|O', 'fortran_order': False, 'shape': {tuple(real.shape)}, }}", b"\x80\x04N.")


def _huge(real: np.ndarray) -> bytes:
    return _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 200000), }", b"")


def _short(real: np.ndarray) -> bytes:
    return _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(real.shape)}, }}", real.tobytes()[:-4])


BAD: dict[str, tuple[Bad, str]] = {
    "NaN weight": (_changed(lambda a: np.full_like(a, np.nan)), "non-finite"),
    "Inf weight": (_changed(lambda a: np.full_like(a, np.inf)), "non-finite"),
    "1,000 with 10^9 examples": (_examples(10**9, 1000.0), "num-examples"),
    "1,000 with 1,000 examples": (_examples(1000, 1000.0), "norm"),
    "negative examples": (_examples(-39), "num-examples"),
    "no examples": (_examples(0), "num-examples"),
    "examples NaN": (_examples(float("nan")), "num-examples"),
    "examples 3.5": (_examples(3.5), "num-examples"),
    "examples a list": (_examples([1, 2]), "num-examples"),
    "no patients": (_cases(0), "num-cases"),
    "more patients than examples": (_cases(11), "num-cases"),
    "patients NaN": (_cases(float("nan")), "num-cases"),
    "beyond 16 bits": (_changed(lambda a: np.full_like(a, 1e5)), "16 bits"),
    "another key": (_keys, "keys"),
    "the other factor": (_other_factor, "keys"),
    "one record more": (_records, "record"),
    "no metrics": (_no_metrics, "record"),
    "a hundred metrics": (_many_metrics, "metrics"),
    "another shape": (_changed(lambda a: np.zeros(3, np.float32)), "shape"),
    "a shape that broadcasts": (_changed(lambda a: np.full(1, 5.0, np.float32)), "shape"),
    "another dtype": (_changed(lambda a: a.astype(np.float64)), "dtype"),
    "100 times the size": (_changed(lambda a: np.zeros(a.size * 100, np.float32)), "shape"),
    "a header that claims 149 GiB": (_raw(_huge), "shape"),
    "an array of objects": (_raw(_object), "dtype"),
    "fewer bytes than declared": (_raw(_short), "bytes"),
    "bytes that are no array": (_raw(lambda a: b"PK\x03\x04"), "npy"),
    "an empty array": (_raw(lambda a: b""), "npy"),
    "an older round": (lambda n, m: reply(moved(m, 0.01), asked(m)[0] - 1), "round"),
    "an empty reply": (lambda n, m: RecordDict({}), "record"),
    "only metrics": (lambda n, m: RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "record"),
    "an error": (lambda n, m: Error(0, "out of memory\x1b[31m"), "out of memory"),
    "a refusal": (lambda n, m: RecordDict({"config": ConfigRecord({"refused": "lr is 1000.0"})}), "lr is 1000.0"),
    "a reply that cannot be put together": (lambda n, m: KeyError("children"), "unreadable"),
    "no reply": (lambda n, m: None, "no reply"),
}
