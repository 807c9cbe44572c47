"""Before an adapter answers at the kiosk: passport, base and canary; and the way back, timed with the real model."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kiosk.adapter_watch import AdapterWatch
from kiosk.cli import main
from model import adapters, installed, passport, verified
from model.backends import Request, TorchBackend
from model.llava import base_sha256
from tests.model.signed import TRAPS, at_once

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)


@pytest.fixture
def backend(tiny: Path) -> TorchBackend:
    return TorchBackend(tiny, 4, device="cpu")


def trust(home: Path) -> None:
    (home / "federation").mkdir(mode=0o700)
    pem = KEY.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (home / "federation" / passport.PUBLIC).write_bytes(pem)


def put(
    home: Path, tmp_path: Path, base: Path, number: int, key: object = KEY, step: float = 0.004, kind: str = "release"
) -> str:
    """Install an adapter of round `number` whose passport `key` has signed (None: it has no passport)."""
    state = {n: a + np.float32(step * number) for n, a in adapters.initial(base, 4, 8, "decoder", 0).items()}
    folder = tmp_path / f"a{number}"
    adapters.save(folder, state, adapters.spec_of(state, 8, base_sha256(base)))
    record = {"round": number, "serial": number, "verdict": "passed", "adapter_sha256": adapters.sha256(folder)}
    record |= {"kind": kind}
    text = passport.sign({**record, "base_sha256": base_sha256(base)}, key) if key else None
    return installed.install(home, folder, evidence={"round": number}, passport=text)


def test_signed_adapters_answer_and_all_others_leave_the_former_one(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend
) -> None:
    trust(afya_home)
    watch = AdapterWatch(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    watch.refresh(backend)
    assert (watch.name, watch.notice, watch.unsigned) == (first, None, None)
    digest = backend.adapter_sha256
    bad = {2: (None, "no readable passport"), 3: (OTHER, "another key")}
    for number, (key, words) in bad.items():
        put(afya_home, tmp_path, tiny, number, key)
        watch.refresh(backend)
        assert watch.name == first and backend.adapter_sha256 == digest
        assert words in (watch.notice or "") and f"the earlier one ({first}) answers instead" in (watch.notice or "")
    fourth = put(afya_home, tmp_path, tiny, 4)
    place = afya_home / "adapters" / fourth / passport.FILE
    place.write_text(place.read_text().replace('"verdict": "passed"', '"verdict": "praised"'))
    watch.refresh(backend)
    assert watch.name == first and "was changed" in (watch.notice or "")
    fifth = put(afya_home, tmp_path, tiny, 5)
    watch.refresh(backend)
    assert (watch.name, watch.notice) == (fifth, None)


def test_an_adapter_of_another_base_is_refused_though_it_is_signed(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend
) -> None:
    trust(afya_home)
    state = adapters.initial(tiny, 4, 8, "decoder", 0)
    spec = adapters.spec_of(state, 8, base_sha256(tiny))
    adapters.save(tmp_path / "x", state, dataclasses.replace(spec, base_sha256="ab" * 32))
    record = {"serial": 1, "adapter_sha256": adapters.sha256(tmp_path / "x"), "base_sha256": "ab" * 32}
    installed.install(afya_home, tmp_path / "x", evidence={"round": 1}, passport=passport.sign(record, KEY))
    watch = AdapterWatch(afya_home)
    watch.refresh(backend)
    assert watch.name is None and backend.adapter_sha256 is None
    assert "another base model" in (watch.notice or "")


def test_an_adapter_that_no_longer_looks_at_the_picture_is_refused(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend
) -> None:
    """Signed and of this base, and yet with it every picture gives the same scores: the canary sees it."""
    trust(afya_home)
    watch = AdapterWatch(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    watch.refresh(backend)
    digest = backend.adapter_sha256
    put(afya_home, tmp_path, tiny, 2, step=0.5)
    watch.refresh(backend)
    assert watch.name == first and backend.adapter_sha256 == digest
    assert "look alike" in (watch.notice or "") and (watch.notice or "").endswith("ask for another release.")


def test_without_a_key_unsigned_adapters_answer_and_are_called_so(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend
) -> None:
    watch = AdapterWatch(afya_home)
    name = put(afya_home, tmp_path, tiny, 1, None)
    watch.refresh(backend)
    assert watch.name == name and watch.notice is None and "unsigned" in (watch.unsigned or "")


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_place_of_the_pointer_stops_neither_the_kiosk_nor_a_command(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend, trap: Callable[[Path], None]
) -> None:
    trust(afya_home)
    watch = AdapterWatch(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    watch.refresh(backend)
    trap(afya_home / "adapters" / installed.POINTER)
    at_once(lambda: watch.refresh(backend))
    assert watch.name == first and f"the earlier one ({first}) answers instead" in (watch.notice or "")
    code, text = at_once(lambda: call("list"))
    assert code == 1 and "damaged" in text
    at_once(lambda: AdapterWatch(afya_home).refresh(TorchBackend(tiny, 4, device="cpu")))


class Exchanging(TorchBackend):
    """A backend beside which a hostile client puts `files` into `place` at the last moment before they are loaded."""

    files: Path | None = None
    place: Path

    def swap_adapter(self, folder: Path | None) -> None:
        if self.files:
            shutil.copytree(self.files, self.place, dirs_exist_ok=True)
        super().swap_adapter(folder)


def test_files_that_are_exchanged_after_the_check_never_answer(afya_home: Path, tmp_path: Path, tiny: Path) -> None:
    trust(afya_home)
    name = put(afya_home, tmp_path, tiny, 1)
    backend = Exchanging(tiny, 4, device="cpu")
    state = {n: a + np.float32(0.01) for n, a in adapters.initial(tiny, 4, 8, "decoder", 0).items()}
    adapters.save(tmp_path / "forged", state, adapters.spec_of(state, 8, base_sha256(tiny)))
    backend.files, backend.place = tmp_path / "forged", afya_home / "adapters" / name
    watch = AdapterWatch(afya_home)
    watch.refresh(backend)
    assert adapters.sha256(backend.place) == adapters.sha256(tmp_path / "forged")
    assert (watch.name, watch.notice, backend.adapter_sha256) == (name, None, adapters.sha256(tmp_path / "a1"))
    put(afya_home, tmp_path, tiny, 2, step=0.5)  # the canary refuses it, and the former one comes back: which?
    watch.refresh(backend)
    assert "look alike" in (watch.notice or "")
    assert (watch.name, backend.adapter_sha256) == (name, adapters.sha256(tmp_path / "a1"))


def test_an_older_release_answers_only_where_somebody_here_went_back_to_it(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend
) -> None:
    trust(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    pointer = afya_home / "adapters" / installed.POINTER
    withdrawn = pointer.read_text()
    second = put(afya_home, tmp_path, tiny, 2)
    watch = AdapterWatch(afya_home)
    watch.refresh(backend)
    (afya_home / "adapters" / second / passport.FILE).unlink()
    pointer.write_text(withdrawn)
    watch.refresh(backend)
    assert watch.name == second and f"this kiosk has seen number 2 ({second})" in (watch.notice or "")
    again = AdapterWatch(afya_home)  # the kiosk was started anew: what answered last, never the older one
    again.refresh(TorchBackend(tiny, 4, device="cpu"))
    assert again.name == second and "this kiosk has seen number 2" in (again.notice or "")
    code, text = call("rollback", "--to", first, "--yes")
    assert code == 0 and first in text
    for kiosk in (watch, again, AdapterWatch(afya_home)):
        kiosk.refresh(backend)
        assert (kiosk.name, kiosk.notice) == (first, None)


def test_a_home_that_cannot_be_written_keeps_the_former_adapter_and_says_so(
    afya_home: Path, tmp_path: Path, tiny: Path, backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(afya_home)
    first = put(afya_home, tmp_path, tiny, 1)
    watch = AdapterWatch(afya_home)
    watch.refresh(backend)
    put(afya_home, tmp_path, tiny, 2)

    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(verified.tempfile, "mkdtemp", full)
        watch.refresh(backend)
    assert watch.name == first and "verified cannot be written (No space left on device)" in (watch.notice or "")
    assert backend.adapter_sha256 == adapters.sha256(tmp_path / "a1")


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["adapter", *arguments])
    return done.exit_code, done.output


def test_the_commands_list_and_go_back(afya_home: Path, tmp_path: Path, tiny: Path) -> None:
    assert "without an adapter" in call("list")[1]
    first = put(afya_home, tmp_path, tiny, 1, None)
    assert "unsigned" in call("list")[1]
    trust(afya_home)
    second, third = put(afya_home, tmp_path, tiny, 2), put(afya_home, tmp_path, tiny, 3)
    code, text = call("list", "--json")
    rows = {row["name"]: row for row in json.loads(text)}
    assert code == 0 and rows[third]["current"] and rows[second]["verdict"] == "passed"
    assert "no readable passport" in rows[first]["problem"]
    assert f"Go back to {second}?" in call("rollback")[1]
    code, text = call("rollback", "--yes")
    assert code == 0 and second in text and adapters.current(afya_home) == afya_home / "adapters" / second
    code, text = call("rollback", "--to", first, "--yes")
    assert code == 1 and "no readable passport" in text
    assert adapters.current(afya_home) == afya_home / "adapters" / second
    assert call("rollback", "--yes")[0] == 0 and adapters.current(afya_home) is None
    assert "as it was installed" in call("list")[1]
    assert call("rollback", "--to", "round-9999-x", "--yes")[0] == 1


def test_going_back_goes_to_ever_earlier_rounds(afya_home: Path, tmp_path: Path, tiny: Path) -> None:
    trust(afya_home)
    names = [put(afya_home, tmp_path, tiny, number) for number in (1, 2, 3)]
    for name in (names[1], names[0]):
        code, text = call("rollback", "--yes")
        assert code == 0 and name in text
    assert "as it was installed" in call("rollback", "--yes")[1]


def test_after_the_coordinator_went_back_the_one_before_is_not_the_one_it_took_back(
    afya_home: Path, tmp_path: Path, tiny: Path
) -> None:
    trust(afya_home)
    names = [put(afya_home, tmp_path, tiny, number) for number in (1, 2, 3)]
    put(afya_home, tmp_path, tiny, 2, kind="rollback")
    assert adapters.current(afya_home) == afya_home / "adapters" / names[1]
    assert installed.before(afya_home) == names[0]


@pytest.mark.slow
def test_the_reference_model_answers_with_the_former_adapter_within_ten_seconds(
    afya_home: Path, tmp_path: Path
) -> None:
    from model.presets import reference_path

    base = reference_path()
    trust(afya_home)
    backend = TorchBackend(base, 4)
    watch = AdapterWatch(afya_home)
    first = put(afya_home, tmp_path, base, 1, step=0.002)
    put(afya_home, tmp_path, base, 2, step=0.002)
    watch.refresh(backend)
    assert watch.notice is None
    start = time.monotonic()
    assert call("rollback", "--yes")[0] == 0
    watch.refresh(backend)
    request = Request(np.full((64, 64, 3), 90, np.uint8), "Is there a mass?", (), 8)
    answer = next(item[1] for item in backend.generate([request]) if isinstance(item, tuple))
    seconds = time.monotonic() - start
    print(f"from the command to the first answer: {seconds:.2f} s")
    assert watch.name == first and answer.adapter_sha256 == adapters.sha256(afya_home / "adapters" / first)
    assert seconds < 10
