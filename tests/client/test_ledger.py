"""The privacy ledger: epsilon as another accountant reckons it, the stop at the budget, kills, damage, two at once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client import ledger, sealed
from client.ledger import Entry
from client.limits import Refused
from model.data import Sample
from tests.conftest import REPOSITORY
from tests.model.signed import TRAPS, at_once

# (noise, sampling rate, steps) of each round, delta, and what dp-accounting 0.6.0 gives for it: its RdpAccountant over
# GaussianDpEvent, PoissonSampledDpEvent and SelfComposedDpEvent, with its default orders.
REFERENCE: list[tuple[list[tuple[float, float, int]], float, float]] = [
    ([(1.0, 0.1, 40)], 1e-5, 5.391951),
    ([(1.0, 0.1, 40)] * 3, 1e-5, 8.594114),
    ([(1.0, 0.25, 40)] * 2, 1e-5, 17.955849),
    ([(0.8, 0.05, 500)], 1e-6, 14.919412),
    ([(2.0, 0.3, 60), (1.0, 0.1, 40), (4.0, 1.0, 8)], 1e-5, 9.182807),
    ([(1.0, 1.0, 8)], 1e-5, 16.512876),
    ([(6.0, 0.02, 10)], 1e-5, 0.036451),
]


def cost(number: int = 1, steps: int = 8) -> Entry:
    return ledger.entry(number, 4.0, 0.2, steps)


@pytest.mark.parametrize(("rounds", "delta", "expected"), REFERENCE)
def test_epsilon_is_that_of_another_accountant_within_one_percent(
    afya_home: Path, rounds: list[tuple[float, float, int]], delta: float, expected: float
) -> None:
    for number, (noise, rate, steps) in enumerate(rounds, 1):
        spent = ledger.charge(afya_home, ledger.entry(number, noise, rate, steps), 100.0, delta)
    assert spent == pytest.approx(expected, rel=0.01)
    assert ledger.epsilon(ledger.read(afya_home), delta) == spent


def test_a_round_of_no_steps_is_refused_and_locks_nothing(afya_home: Path) -> None:
    with pytest.raises(Refused, match="nothing was trained"):
        ledger.charge(afya_home, cost(steps=0), 8.0, 1e-5)
    ledger.charge(afya_home, cost(), 8.0, 1e-5)
    assert len(ledger.read(afya_home)) == 1


@pytest.mark.parametrize("order", [1.8, 2.5, 4.0, 11.5])
def test_the_accountant_is_exact_at_every_order(order: float) -> None:
    """Against the integral itself (Mironov, Talwar and Zhang 2019, arXiv:1908.10530), one step of rate q."""
    import numpy as np
    from opacus.accountants.analysis import rdp

    q, noise = 0.2, 1.0
    z = np.linspace(-30, 60, 400_001)
    mixed = (1 - q) + q * np.exp((2 * z - 1) / (2 * noise**2))
    moment = np.trapezoid(np.exp(-(z**2) / (2 * noise**2)) / (noise * np.sqrt(2 * np.pi)) * mixed**order, z)
    found = rdp.compute_rdp(q=q, noise_multiplier=noise, steps=1, orders=[order])[0]
    assert found == pytest.approx(np.log(moment) / (order - 1), rel=1e-9)


def test_the_budget_is_a_hard_stop_and_a_refusal_costs_nothing(afya_home: Path) -> None:
    charged = 0
    while ledger.epsilon([*ledger.read(afya_home), cost()], 1e-5) <= 1.0:
        charged += 1
        assert ledger.charge(afya_home, cost(charged), 1.0, 1e-5) <= 1.0
    with pytest.raises(Refused, match="privacy budget does not allow this round") as caught:
        ledger.charge(afya_home, cost(), 1.0, 1e-5)
    assert "of 1 is spent" in str(caught.value)
    assert charged > 0 and len(ledger.read(afya_home)) == charged
    with pytest.raises(Refused):
        ledger.check(afya_home, cost(), 1.0, 1e-5)
    with pytest.raises(Refused):  # less would fit, and that is what steps are for; more never does
        ledger.charge(afya_home, cost(steps=80), 1.0, 1e-5)
    assert len(ledger.read(afya_home)) == charged


def test_a_stricter_delta_counts_for_what_was_spent_before(afya_home: Path) -> None:
    ledger.charge(afya_home, cost(), 8.0, 1e-5)
    assert ledger.epsilon(ledger.read(afya_home), 1e-9) > ledger.epsilon(ledger.read(afya_home), 1e-5)


@pytest.mark.parametrize("damage", ["half", "changed", "gone", "negative", "garbage"])
def test_a_ledger_that_is_not_what_was_written_stops_training(afya_home: Path, damage: str) -> None:
    ledger.charge(afya_home, cost(), 8.0, 1e-5)
    path = afya_home / "privacy/ledger.json"
    text = path.read_text()
    rows = json.loads(text)["entries"]
    if damage == "gone":
        path.unlink()
    else:
        negative = [{**rows[0], "steps": -5}]
        made = {
            "half": text[: len(text) // 2],
            "changed": text.replace('"steps": 8', '"steps": 1'),
            "negative": json.dumps({"entries": negative, "sha256": ledger._digest(negative)}),
            "garbage": "[]",
        }
        path.write_text(made[damage])
    for call in (ledger.check, ledger.charge):
        with pytest.raises(ledger.LedgerDamaged, match=r"privacy ledger .* cannot be read"):
            call(afya_home, cost(), 8.0, 1e-5)


def test_rounds_side_by_side_are_all_counted(afya_home: Path) -> None:
    threads = [threading.Thread(target=ledger.charge, args=(afya_home, cost(n), 50.0, 1e-5)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.round for row in ledger.read(afya_home)) == list(range(8))


KILLED = """
import os, sys
from pathlib import Path
from client import ledger
calls, last = 0, int(sys.argv[2])
def counted(name):
    real = getattr(os, name)
    def call(*a, **k):
        global calls
        calls += 1
        if calls == last:
            os._exit(9)
        return real(*a, **k)
    setattr(os, name, call)
for name in ("fsync", "replace", "open"):
    counted(name)
for number in (1, 2):
    ledger.charge(Path(sys.argv[1]), ledger.entry(number, 4.0, 0.2, 8), 8.0, 1e-5)
    print("update", number, "leaves", flush=True)
print("calls", calls)
"""


@pytest.mark.slow
def test_killed_anywhere_every_update_that_left_is_in_the_ledger(tmp_path: Path) -> None:
    def run(home: Path, last: int) -> tuple[int, list[str]]:
        home.mkdir()
        line = [sys.executable, "-c", KILLED, str(home), str(last)]
        done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env={**os.environ})
        assert done.returncode in (0, 9), done.stderr
        return done.returncode, done.stdout.splitlines()

    _, lines = run(tmp_path / "whole", 0)
    own = 24  # the last changes of the disk; those before belong to importing the accountant
    count = int(lines[-1].split()[1])
    left_at = set()
    for last in range(max(1, count - own), count + 1, 3):
        home = tmp_path / f"killed-{last}"
        code, lines = run(home, last)
        assert code == 9
        left = [int(line.split()[1]) for line in lines if line.startswith("update")]
        held = [row.round for row in ledger.read(home)]
        assert held in (left, [*left, len(left) + 1])
        left_at.add(len(left))
        ledger.charge(home, cost(9), 8.0, 1e-5)  # and it goes on
    assert 1 in left_at


@pytest.mark.parametrize("trap", TRAPS)
def test_what_a_hostile_client_leaves_for_a_ledger_or_a_seal_is_refused_at_once(
    afya_home: Path, trap: Callable[[Path], None]
) -> None:
    ledger.charge(afya_home, cost(), 8.0, 1e-5)
    for name, refused in (
        ("ledger.json", ledger.read),
        ("sealed.json", lambda home: sealed.open_to_training(home, [])),
    ):
        trap(afya_home / "privacy" / name)
        with pytest.raises(Refused, match=r"cannot be read|is damaged"):
            at_once(lambda refused=refused: refused(afya_home))


def test_a_folder_that_another_program_holds_is_refused_after_a_while(
    afya_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    with ledger.locked(afya_home):
        for call in (
            lambda: sealed.open_to_training(afya_home, []),
            lambda: ledger.charge(afya_home, cost(), 8.0, 1e-5),
        ):
            with pytest.raises(Refused, match="another program holds"):
                call()
    assert ledger.read(afya_home) == []


def test_marks_of_rounds_side_by_side_are_all_kept_under_one_key(afya_home: Path) -> None:
    blank = np.zeros((4, 4, 3), np.uint8)
    rows = [[Sample(f"{n}", blank, "Is it?", "yes", "closed", f"p{n}", "kiosk")] for n in range(12)]
    threads = [threading.Thread(target=sealed.note_training, args=(afya_home, row)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((afya_home / sealed.FILE).read_bytes())["trained"]) == len(rows)
