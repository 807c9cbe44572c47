"""Round files: what was written comes back bit for bit, and no byte of it can be another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_arrays

from model import bundle
from model.adapters import AdapterRejected
from model.bundle import BundleRejected
from model.npy import read_exact


def sign(data: bytes) -> bytes:
    """A stand-in for a key: enough to see that it is asked about the right bytes."""
    import hashlib

    return hashlib.sha256(b"secret" + data).digest()


def verify(record: dict[str, Any], signature: bytes, signed: bytes) -> None:
    if signature != sign(signed):
        raise BundleRejected("forged")


def made(folder: Path) -> Path:
    arrays = {"lora_B": np.arange(12, dtype=np.float32), "lora_A": np.ones(3, np.float32)}
    bundle.write(folder / "r.afya", "round", {"n": 1, "x": 0.1}, arrays, sign)
    return folder / "r.afya"


@settings(max_examples=30, deadline=None)
@given(
    any_arrays(np.float32, st.integers(0, 50)),
    st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, record: dict) -> None:
    path = tmp_path_factory.mktemp("b") / "f"
    digest = bundle.write(path, "reply", record, {"lora_A": array}, sign)
    found = bundle.read(path, "reply", verify)
    assert found.record == record and found.digest == digest
    sent = found.arrays["lora_A"]
    assert (sent.shape, sent.dtype, sent.stype) == (array.shape, "float32", "numpy.ndarray")
    assert read_exact(sent.data, array.shape, "float32").tobytes() == array.tobytes()


def test_no_byte_can_be_another_and_no_end_can_be_cut(tmp_path: Path) -> None:
    path = made(tmp_path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((BundleRejected, AdapterRejected)):
            bundle.read(path, "round", verify)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(BundleRejected):
            bundle.read(path, "round", verify)
    path.write_bytes(data + b"x")
    with pytest.raises(BundleRejected, match="something added"):
        bundle.read(path, "round", verify)


def test_another_kind_a_large_file_a_folder_and_nothing_are_said(tmp_path: Path) -> None:
    path = made(tmp_path)
    with pytest.raises(BundleRejected, match="is a round, not a reply"):
        bundle.read(path, "reply", verify)
    with pytest.raises(BundleRejected, match="more than the 100"):
        bundle.read(path, "round", verify, 100)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleRejected):
            bundle.read(place, "round", verify)


@pytest.mark.parametrize("change", [{"bytes": -1}, {"bytes": 1 << 60}, {"shape": ["x"]}, {"name": 3}, {"dtype": None}])
def test_a_line_that_claims_the_impossible_is_refused_even_with_a_signature(tmp_path: Path, change: dict) -> None:
    import base64

    path = made(tmp_path)
    mark, line, _, body = path.read_bytes().split(b"\n", 3)
    head = json.loads(line)
    head["arrays"][0] |= change
    line = json.dumps(head).encode() + b"\n"
    signature = base64.b64encode(sign(b"afya round file\n" + line))
    path.write_bytes(mark + b"\n" + line + signature + b"\n" + body)
    with pytest.raises(BundleRejected):
        bundle.read(path, "round", verify)


def test_only_a_file_of_the_same_kind_and_clinic_is_written_over(tmp_path: Path) -> None:
    path = made(tmp_path)
    bundle.check_replaceable(tmp_path / "new", "round")
    bundle.check_replaceable(path, "round")
    (tmp_path / "letter.txt").write_text("Dear colleague")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    others = [(path, "reply", ""), (path, "round", "key"), (tmp_path, "round", "")]
    others += [(tmp_path / name, "round", "") for name in ("letter.txt", "nowhere")]
    for place, kind, key in others:
        with pytest.raises(BundleRejected, match="is there already and is something else; choose another name"):
            bundle.check_replaceable(place, kind, key)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    path = made(tmp_path / "stick")
    before = path.read_bytes()

    def broken(data: bytes) -> bytes:
        raise RuntimeError("no key")

    with pytest.raises(RuntimeError):
        bundle.write(path, "round", {}, {}, broken)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["r.afya"]
