"""Arrays that came over the network: the npy header is held against what is expected before a byte is decoded.

A header of 150 bytes can claim 149 GiB, declare objects, or differ from what the message says; each is refused here.
Not covered: whether the values make sense. `model.adapters.check` looks at those.
"""

import ast
import struct

import numpy as np

from model.adapters import AdapterRejected

_MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0 is what NumPy writes for every plain array
_MAX_HEADER = 4096  # bytes; a header of a plain float array takes 128


def read_exact(data: bytes, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Decode an npy file that must hold exactly this shape and dtype in C order; nothing else is allocated.

    Raises AdapterRejected with the reason: no npy file, other shape, other dtype, more or fewer bytes than declared.
    """
    if data[: len(_MAGIC)] != _MAGIC or len(data) < 10:
        raise AdapterRejected("the array is not in npy format 1.0")
    (length,) = struct.unpack("<H", data[8:10])
    if length > _MAX_HEADER or len(data) < 10 + length:
        raise AdapterRejected("the array's npy header is truncated or too long")
    try:
        header = ast.literal_eval(data[10 : 10 + length].decode("latin1").strip())
        found = (tuple(header["shape"]), str(header["descr"]), bool(header["fortran_order"]))
        odd = set(header) != {"shape", "descr", "fortran_order"}
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise AdapterRejected("the array's npy header is not valid") from error
    expected = np.dtype(dtype)
    if odd or found[0] != shape:
        raise AdapterRejected(f"the array has shape {str(found[0])[:60]}, expected {shape}")
    if found[1] != expected.str or found[2]:
        raise AdapterRejected(f"the array has dtype {found[1][:30]!r}, expected {expected.str!r} in C order")
    body = data[10 + length :]
    if len(body) != int(np.prod(shape, dtype=np.int64)) * expected.itemsize:
        raise AdapterRejected("the array holds another number of bytes than its header declares")
    return np.frombuffer(body, expected).reshape(shape).copy()
