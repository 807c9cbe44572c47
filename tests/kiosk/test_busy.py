"""The mark that a clinician is asking: held by the kiosk's engine while it answers, and only then."""

import fcntl
import os
import threading
import time
from pathlib import Path

import numpy as np

from client.courtesy import Courtesy
from kiosk.busy import Inbox
from kiosk.inference import Engine
from kiosk.settings import Settings
from kiosk.store import CaseStore
from model.backends import Request
from tests.kiosk.conftest import picture
from tests.kiosk.fakes import BrightnessBackend


def until(asking: bool, home: Path) -> bool:
    """Whether the mark is so within five seconds."""
    end = time.monotonic() + 5
    while Courtesy(home).asking() != asking and time.monotonic() < end:
        time.sleep(0.01)
    return Courtesy(home).asking() == asking


def test_the_engine_holds_the_mark_while_it_answers(store: CaseStore, afya_home: Path) -> None:
    gate = threading.Event()
    engine = Engine(store, afya_home, Settings(answer_seconds=60), lambda: BrightnessBackend(gate))
    request = Request(np.full((8, 8, 3), 200, np.uint8), "Is it bright?")
    _, turn = store.add_case(picture(), "NA", request.question)
    assert until(False, afya_home)
    job = engine.submit(turn, request)
    assert until(True, afya_home)
    gate.set()
    assert "".join(engine.stream(job)) == "It is bright"
    assert until(False, afya_home)
    engine.stop()
    found = (afya_home / "run/asking").stat()
    assert found.st_size == 0 and found.st_mode & 0o777 == 0o644


def test_somebody_who_holds_the_lock_cannot_hold_up_an_answer(afya_home: Path) -> None:
    (afya_home / "run").mkdir()
    (afya_home / "run/asking").touch()
    foreign = os.open(afya_home / "run/asking", os.O_RDONLY)
    fcntl.flock(foreign, fcntl.LOCK_EX)
    inbox = Inbox(afya_home)
    inbox.put(1)
    start = time.monotonic()
    assert inbox.get() == 1 and time.monotonic() - start < 0.5
    os.close(foreign)
    inbox.put(2)
    assert inbox.get(block=False) == 2 and Courtesy(afya_home).asking()  # the next token took it


def test_a_link_in_the_marks_place_is_not_followed(afya_home: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("untouched")
    (afya_home / "run").mkdir()
    (afya_home / "run/asking").symlink_to(tmp_path / "secret")
    inbox = Inbox(afya_home)
    inbox.put(1)
    assert inbox.get() == 1
    assert not Courtesy(afya_home).asking() and (tmp_path / "secret").read_text() == "untouched"
