"""The demo's kiosk: a home with a few cases of every clinic and the federated adapter, served on loopback.

The cases are copied from the clinics' own kiosks of this run. Not here: how a kiosk works (the package `kiosk`).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

from kiosk import export, queries
from kiosk.records import NewImage
from kiosk.store import CaseStore
from model import adapters
from model.backends import Answer
from scripts.demo_parts import cases
from scripts.demo_parts.plan import DemoFailed, Plan

PORT = 8501
TRIED = 20  # ports tried from PORT on


def prepare(plan: Plan) -> Path:
    """Make the home; returns it."""
    home = plan.work / "kiosk"
    cases.open_home(home, "Afya demo", plan)
    store = CaseStore(home / "kiosk.db")
    adapter: Path | None = None
    try:
        for clinic in sorted((plan.work / "clinics").iterdir()):
            source = CaseStore(clinic / "kiosk.db")
            try:
                for number in range(1, plan.kiosk_cases + 1):
                    _copy(source, store, number)
            finally:
                source.close()
            adapter = adapter or adapters.current(clinic)
        export.reconcile(store, home)
    finally:
        store.close()
    if adapter is not None:
        import json

        adapters.install(home, adapter, evidence=json.loads((adapter / adapters.RELEASE).read_bytes()))
    return home


def _copy(source: CaseStore, target: CaseStore, case_id: int) -> None:
    """One case with its questions, answers, reviews and consent."""
    case = queries.case(source, case_id)
    picture = NewImage(queries.image(source, case_id), case.format, case.frame, case.frames, case.fields)
    new_id = 0
    for turn in case.turns:
        if new_id:
            turn_id = target.add_turn(new_id, turn.question, turn.asked_by)
        else:
            new_id, turn_id = target.add_case(picture, case.author, turn.question)
        target.answer_turn(turn_id, _answer(turn))
        target.review(turn_id, turn.verdict, turn.reviewed_by or case.author, turn.correction)
    last = case.consents[-1]
    target.add_consent(new_id, last.state, last.author, looked=bool(last.looked))


def _answer(turn: queries.Turn) -> Answer:
    return Answer(
        text=turn.answer or "",
        confidence=turn.confidence or 0.0,
        image_reliant=None,
        tokens=turn.tokens or 0,
        seconds=turn.seconds or 0.0,
        first_token_seconds=turn.first_token_seconds or 0.0,
        peak_bytes=turn.peak_bytes or 0,
        backend=turn.backend or "",
        reason=turn.reason or "",
        bits=turn.bits or 0,
        device=turn.device or "",
        model_id=turn.model_id or "",
        base_sha256=turn.base_sha256 or "",
        adapter_sha256=turn.adapter_sha256,
        finish_reason="stop",
    )


def free_port(first: int = PORT) -> int:
    """The first free port on loopback from `first` on. Raises DemoFailed when none of `TRIED` is."""
    for port in range(first, first + TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise DemoFailed(f"No port from {first} to {first + TRIED - 1} is free for the kiosk; end a program that uses one.")


def run(home: Path, port: int) -> int:
    """Serve until the kiosk is stopped; returns its exit code."""
    command = [sys.executable, "-c", "from kiosk.cli import main; main()", "start", "--port", str(port)]
    child = subprocess.Popen(command, env={**os.environ, "AFYA_HOME": str(home)})
    try:
        return child.wait()
    finally:
        child.terminate()
        child.wait()
