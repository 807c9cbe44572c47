"""Rounds: alternating factors, drop-outs, deadlines, resuming after a crash, release. One process, a still clock."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from model import adapters, wire
from server import aggregate, events, rounds
from server import checkpoint as store
from server.settings import SettingsRejected
from tests.conftest import REPOSITORY
from tests.server import fakes
from tests.server.fakes import Clock, FakeGrid, honest


def run(tmp_path: Path, tiny: Path, grid: FakeGrid, **values: object) -> store.RoundCheckpoint:
    clock = Clock()
    chosen = fakes.settings(tmp_path / "rounds", tiny, **values)
    return rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)


def kinds(tmp_path: Path, kind: str) -> list[dict]:
    return [event for event in events.read(tmp_path / "rounds")[0] if event["event"] == kind]


def test_rounds_train_b_then_a_and_leave_the_other_factor_bit_identical(tmp_path: Path, tiny: Path) -> None:
    grid = FakeGrid({node: honest(0.01 * node) for node in (1, 2, 3)})
    after = run(tmp_path, tiny, grid, num_server_rounds=2)
    start = wire.rounded(adapters.initial(tiny, 2, 16.0, "decoder", 0))
    assert [event["factor"] for event in kinds(tmp_path, "round")] == ["B", "A"]
    for name, array in after.state.items():
        np.testing.assert_allclose(array - start[name], 0.02, atol=1e-5)  # B is rounded before A's turn
    middle = store.load(tmp_path / "rounds/round-00001")
    sent = wire.rounded(middle.state)
    assert all(np.array_equal(middle.state[n], start[n]) for n in start if adapters.factor(n) == "A")
    assert all(np.array_equal(after.state[n], sent[n]) for n in start if adapters.factor(n) == "B")
    assert after.bytes_down == 3 * adapters.state_bytes(start) / 2, "16 bits a value on the wire"
    assert len(kinds(tmp_path, "installed")) == 3


def test_a_skipped_round_does_not_change_whose_turn_it_is(tmp_path: Path, tiny: Path) -> None:
    """Training A while B is still zero would move nothing: the turn follows the updates, not the round number."""

    def lazy(node: int, message: Message) -> RecordDict | None:
        return None if fakes.asked(message)[0] == 1 else honest()(node, message)

    grid = FakeGrid({1: honest(), 2: honest(), 3: lazy})
    after = run(tmp_path, tiny, grid, num_server_rounds=3)
    assert [event["factor"] for event in kinds(tmp_path, "round")] == ["B", "B", "A"]
    assert (after.round, after.updates) == (3, 2)


def test_clinics_that_fail_half_of_the_rounds_cost_rounds_and_nothing_else(tmp_path: Path, tiny: Path) -> None:
    chance = random.Random(1)

    def flaky(node: int, message: Message) -> RecordDict | None:
        return None if chance.random() < 0.5 else honest()(node, message)

    grid = FakeGrid(dict.fromkeys(range(1, 6), flaky))
    clock = Clock()
    chosen = fakes.settings(tmp_path / "rounds", tiny, num_server_rounds=20, round_deadline=30.0)
    after = rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)
    done = kinds(tmp_path, "round-done")
    assert len(done) == 20 and all(event["seconds"] <= 31 for event in done)
    assert after.updates == sum(event["changed"] for event in done)
    assert 0 < after.updates < 20


def test_too_few_clinics_online_are_waited_for_as_long_as_the_setting_says(tmp_path: Path, tiny: Path) -> None:
    grid = FakeGrid({1: honest(), 2: honest(), 3: honest()})
    grid.online = {1}
    after = run(tmp_path, tiny, grid, num_server_rounds=1, wait_hours=30 / 3600)
    assert not after.changed and after.seconds <= 31
    assert kinds(tmp_path, "not-released")


def test_a_night_in_which_clinics_are_off_costs_no_round_and_leaves_them_their_time(tmp_path: Path, tiny: Path) -> None:
    clock, evening = Clock(), 5 * 3600.0
    grid = FakeGrid({node: honest() for node in (1, 2, 3)})
    grid.online = {1}

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        grid.online = {1} if clock() < evening else {1, 2, 3}

    chosen = fakes.settings(tmp_path / "rounds", tiny, num_server_rounds=1, round_deadline=60.0, wait_hours=72.0)
    after = rounds.federate(grid, chosen, sleep=sleep, clock=clock)
    assert after.changed and len(after.accepted) == 3
    (told,) = kinds(tmp_path, "waiting")
    assert told["clinics"] == ["clinic-1"] and told["seconds"] == 72 * 3600


def test_rounds_of_which_none_can_be_read_are_not_begun_anew(tmp_path: Path, tiny: Path) -> None:
    clinics = {node: honest(0.01) for node in (1, 2, 3)}
    run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=6)
    folders = sorted((tmp_path / "rounds").glob("round-*"))
    kept = [(folder / store.MANIFEST).read_bytes() for folder in folders]
    for folder in folders:
        (folder / store.MANIFEST).write_bytes(b"{}")
    with pytest.raises(store.CheckpointDamaged, match=r"none of them can be read .* Put a copy back"):
        run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=7)
    assert sorted((tmp_path / "rounds").glob("round-*")) == folders
    (folders[-1] / store.MANIFEST).write_bytes(kept[-1])
    assert run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=7).updates == 7


def test_a_clinic_weighs_as_many_patients_as_it_has_however_much_it_asks_about_each(tmp_path: Path, tiny: Path) -> None:
    def asks(number: int) -> fakes.Clinic:
        def answer(node: int, message: Message) -> RecordDict:
            arrays, which = fakes.moved(message, 0.01), fakes.asked(message)[0]
            return fakes.reply(arrays, which, 60 * number, **{"num-cases": 60})

        return answer

    after = run(tmp_path, tiny, FakeGrid({1: asks(12), 2: asks(12), 3: asks(3)}), num_server_rounds=1)
    assert [(row.weight, row.cases, row.examples) for row in after.accepted] == [
        (pytest.approx(1 / 3), 60, count) for count in (720, 720, 180)
    ]


def test_what_16_bits_cost_is_recorded_beside_the_error(tmp_path: Path, tiny: Path) -> None:
    after = run(tmp_path, tiny, FakeGrid({n: honest(0.01 + n * 1e-5) for n in (1, 2, 3)}), num_server_rounds=1)
    exact, sent = after.state, wire.rounded(after.state)
    pairs = [(exact[b] @ exact[a], sent[b] @ sent[a]) for b, a in aggregate.layers(exact)]
    apart = np.sqrt(sum(float(np.square(one - other).sum()) for one, other in pairs))
    assert after.quality["rounding"] == pytest.approx(after.spec.alpha / after.spec.rank * apart, rel=1e-3)
    assert after.quality["error"] < after.quality["rounding"] < 0.01 * after.quality["ideal"]


def test_rounds_of_long_ago_are_kept_in_short(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WHOLE", 3)
    after = run(tmp_path, tiny, FakeGrid({n: honest(0.001) for n in (1, 2, 3)}), num_server_rounds=5, gate="off")
    first, *_, last = after.history
    assert first == {
        "round": 1,
        "changed": True,
        "accepted": [{"clinic": f"clinic-{n}"} for n in (1, 2, 3)],
        "rejected": [],
    }
    assert [len(row) > 4 for row in after.history] == [False, False, True, True, True]
    assert last["accepted"][0]["metrics"]
    kept, _ = store.latest(tmp_path / "rounds")
    assert kept is not None and kept.history == after.history


def test_a_clinic_that_was_away_comes_back_into_the_current_round(tmp_path: Path, tiny: Path) -> None:
    grid = FakeGrid({1: honest(), 2: honest(), 3: honest(), 4: honest()})

    def gate(node: int, message: Message) -> RecordDict:
        grid.online = {1, 2, 3} if fakes.asked(message)[0] < 4 else {1, 2, 3, 4}
        return honest()(node, message)

    grid.clinics[1] = gate
    grid.online = {1, 2, 3}
    run(tmp_path, tiny, grid, num_server_rounds=5)
    asked = [fakes.asked(m)[0] for m in grid.sent if m.metadata.dst_node_id == 4 and m.metadata.message_type == "train"]
    assert asked == [5]


def test_a_finished_run_goes_on_from_its_last_round(tmp_path: Path, tiny: Path) -> None:
    clinics = {node: honest(0.01) for node in (1, 2, 3)}
    run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=2)
    grid = FakeGrid(clinics)
    after = run(tmp_path, tiny, grid, num_server_rounds=3)
    assert [fakes.asked(m)[0] for m in grid.sent if m.metadata.message_type == "train"] == [3, 3, 3]
    assert after.updates == 3 and len(after.history) == 3


def test_a_damaged_last_round_is_repeated_from_the_one_before(tmp_path: Path, tiny: Path) -> None:
    clinics = {node: honest(0.01) for node in (1, 2, 3)}
    whole = run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=3)
    (tmp_path / "rounds/round-00003" / adapters.WEIGHTS).write_bytes(b"")
    again = run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=3)
    assert "round-00003" in kinds(tmp_path, "checkpoint-skipped")[0]["reason"]
    assert all(np.array_equal(again.state[name], array) for name, array in whole.state.items())


@pytest.mark.parametrize(
    "values", [{"rank": 3}, {"targets": "decoder+tower"}, {"alpha": 8.0}, {"base_sha256": "0" * 64}]
)
def test_another_adapter_is_not_mixed_into_the_same_folder(tmp_path: Path, tiny: Path, values: dict) -> None:
    clinics = {node: honest() for node in (1, 2, 3)}
    run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=1)
    before = sorted(p.name for p in (tmp_path / "rounds").iterdir())
    with pytest.raises(SettingsRejected):
        run(tmp_path, tiny, FakeGrid(clinics), num_server_rounds=2, **values)
    assert sorted(p.name for p in (tmp_path / "rounds").iterdir()) == before


def test_release_every_round_and_a_clinic_that_refuses(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(node: int, message: Message) -> RecordDict:
        return (
            RecordDict({"config": ConfigRecord({"refused": "another base\x07"})})
            if node == 2
            else installs(node, message)
        )

    installs = fakes.installs
    monkeypatch.setattr(fakes, "installs", refuse)
    after = run(tmp_path, tiny, FakeGrid({n: honest() for n in (1, 2, 3)}), num_server_rounds=2, release_every=1)
    assert [event["round"] for event in kinds(tmp_path, "release")] == [1, 2]
    assert [event["clinic"] for event in kinds(tmp_path, "not-installed")] == ["clinic-2", "clinic-2"]
    state, spec = adapters.load(tmp_path / "rounds/releases/round-00002")
    assert spec == replace(after.spec, alpha=16.0)
    assert all(np.array_equal(state[name], array) for name, array in wire.rounded(after.state).items())


def _killed(root: Path, tiny: Path, last: int) -> tuple[int, list[str]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.server.killed_run", str(root), str(tiny), str(last)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert done.returncode in (0, 9), done.stderr[-2000:]
    return done.returncode, lines[0] if lines else []


@pytest.mark.slow
def test_a_server_killed_anywhere_resumes_and_ends_with_the_same_adapter(tmp_path: Path, tiny: Path) -> None:
    """Killed at five points of the run; resuming repeats at most one round and gives the adapter of an unbroken run."""
    code, result = _killed(tmp_path / "whole", tiny, 0)
    assert code == 0 and result[1] == "4"
    whole = store.load(tmp_path / "whole/round-00004")
    count = int(result[3])
    for number, share in enumerate((0.15, 0.4, 0.55, 0.7, 0.9)):
        root = tmp_path / f"run-{number}"
        assert _killed(root, tiny, int(count * share))[0] == 9
        found, skipped = store.latest(root)
        assert found is not None and skipped == []
        code, result = _killed(root, tiny, 0)
        assert code == 0 and int(result[2]) == 3 * (4 - found.round)
        after = store.load(root / "round-00004")
        assert after.updates == whole.updates
        assert all(np.array_equal(after.state[name], array) for name, array in whole.state.items())
        assert adapters.sha256(root / "round-00004") == adapters.sha256(tmp_path / "whole/round-00004")
