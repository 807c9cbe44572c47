"""The gate in front of a release: poisoned candidates stay out, the last good one stays, passports, rollback."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from model import adapters, exam, passport
from model.exam import Marks
from server import checkpoint as store
from server import events, publish, release, rounds, signing
from server.settings import SettingsRejected
from tests.server import fakes
from tests.server.fakes import Clock, FakeGrid, honest

Reply = RecordDict | Error | Exception | None


def counts(after: float, rows: int = 300, seed: int = 0) -> dict[str, Any]:
    """What a clinic counts: 70 % right with what is installed, `after` with the candidate."""
    draw = np.random.default_rng(seed)
    luck, groups = draw.random(rows), [f"p{number // 5}" for number in range(rows)]
    reliant = [True] * rows
    first = Marks(list(luck < 0.7), [0.7] * rows, reliant)
    second = Marks(list(luck < after), [min(after, 0.999)] * rows, reliant)
    return dict(exam.count(first, first, second, groups, 4).record())


class Clinics(FakeGrid):
    """Clinics that examine: `share` right answers of each candidate, by round."""

    def __init__(self, share: dict[int, float]) -> None:
        super().__init__({node: honest(0.01) for node in (1, 2, 3)})
        self.share = share
        self.round = 0

    def examined(self, node: int, message: Message) -> Reply:
        digest = str(message.content.config_records["config"]["sha256"])
        self.round = int(message.metadata.group_id)
        found = counts(self.share.get(self.round, 0.8), seed=node)
        return RecordDict({"counts": MetricRecord(found), "config": ConfigRecord({"sha256": digest})})

    def kinds(self) -> list[str]:
        return [message.metadata.message_type for message in self.sent]


def run(tmp_path: Path, tiny: Path, grid: FakeGrid, **values: object) -> store.RoundCheckpoint:
    key = signing.signing_key(tmp_path / "certs")
    chosen = fakes.settings(tmp_path / "rounds", tiny, signing_key=str(key), **values)
    clock = Clock()
    return rounds.federate(grid, chosen, sleep=clock.sleep, clock=clock)


@contextmanager
def crash(monkeypatch: pytest.MonkeyPatch, function: str) -> Iterator[None]:
    """The run inside ends where it would call this function of publish."""
    with monkeypatch.context() as patch:
        patch.setattr(publish, function, lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            yield


def happened(tmp_path: Path, kind: str) -> list[dict]:
    return [event for event in events.read(tmp_path / "rounds")[0] if event["event"] == kind]


def issued(tmp_path: Path) -> list[tuple[int, str]]:
    rows = json.loads((tmp_path / "rounds/releases/issued.json").read_text())
    assert [row["serial"] for row in rows] == sorted({row["serial"] for row in rows})
    return [(row["round"], row["kind"]) for row in rows]


def record(tmp_path: Path, number: int) -> dict[str, Any]:
    """The verified record of a release's passport."""
    folder = tmp_path / f"rounds/releases/round-{number:05d}"
    public = passport.public_key(tmp_path / "certs" / passport.PUBLIC)
    spec = adapters.spec(folder)
    return passport.verify((folder / passport.FILE).read_text(), public, adapters.sha256(folder), spec.base_sha256)


def test_a_good_candidate_is_released_with_a_passport_that_says_everything(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=2)
    found = record(tmp_path, 2)
    assert found["verdict"] == "passed" and found["round"] == 2 and all(rule["kept"] for rule in found["rules"])
    assert [(place["name"], place["rows"], place["bits"]) for place in found["places"]] == [
        (f"clinic-{node}", 300, 4) for node in (1, 2, 3)
    ]
    assert found["limits"] == {"points": 2.0, "ece": 0.02, "rows": 200, "reliance": "right", "gate": "auto"}
    page = (tmp_path / "rounds/releases/round-00002" / passport.TEXT).read_text()
    assert "examined and released" in page and "clinic-2: 300 questions on 60 pictures at 4 bits" in page
    assert len(happened(tmp_path, "examined")) == 3 and len(happened(tmp_path, "installed")) == 3


def test_a_candidate_that_got_worse_is_refused_and_the_last_good_one_stays(tmp_path: Path, tiny: Path) -> None:
    """F7: three points lower is not released, nobody is sent it, and a later good one is."""
    grid = Clinics({2: 0.66})
    run(tmp_path, tiny, grid, num_server_rounds=2, release_every=1)
    assert issued(tmp_path) == [(1, "release")] and grid.kinds().count("query") == 3
    refused = happened(tmp_path, "not-released")[0]
    assert refused["round"] == 2 and "right answers" in refused["reason"]
    folder = tmp_path / "rounds/refused/round-00002"
    assert "REFUSED" in (folder / passport.TEXT).read_text()
    assert json.loads((folder / passport.FILE).read_text())["signature"] is None
    assert not (tmp_path / "rounds/releases/round-00002").exists() and record(tmp_path, 1)["verdict"] == "passed"
    run(tmp_path, tiny, Clinics({}), num_server_rounds=3)
    assert issued(tmp_path) == [(1, "release"), (3, "release")]


def test_without_evidence_the_setting_decides_and_the_passport_says_so(tmp_path: Path, tiny: Path) -> None:
    silent = FakeGrid({node: honest(0.01) for node in (1, 2, 3)})
    run(tmp_path, tiny, silent, num_server_rounds=1)
    found = record(tmp_path, 1)
    assert found["verdict"] == "not examined" and "no clinic has a sealed set" in found["summary"]
    assert [row["reason"] for row in found["silent"]] == ["the sealed set is too small"] * 3
    run(tmp_path, tiny, silent, num_server_rounds=2, gate="require")
    assert happened(tmp_path, "not-released")[0]["round"] == 2
    before = len(silent.sent)
    run(tmp_path, tiny, silent, num_server_rounds=3, gate="off")
    assert "evaluate" not in {message.metadata.message_type for message in silent.sent[before:]}
    assert "gate is off" in record(tmp_path, 3)["summary"]


def test_what_travels_with_a_release_does_not_grow_with_the_rounds() -> None:
    away = [{"clinic": f"clinic-{n}", "reason": "no reply before the deadline"} for n in range(40)]
    came = [{"clinic": "north", "weight": 1.0, "metrics": {"loss-before": 2.0, "loss-after": 1.0}}]
    rows = tuple({"round": n, "changed": True, "accepted": came, "rejected": away} for n in range(1, 3001))
    found = release.evidence(
        dataclasses.replace(fakes.first(), round=3000, history=rows, config={"signing_key": "/secret"})
    )
    assert len(json.dumps(found)) < 30_000 and "secret" not in json.dumps(found)
    assert found["rejected_in_all"] == 120_000 and found["rejected"][-1]["round"] == 3000
    assert found["contributed"] == ["north"] and [row["round"] for row in found["loss"]] == list(range(2981, 3001))


def test_a_refusal_stays_when_nobody_can_examine_again(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({2: 0.4}), num_server_rounds=2, release_every=1)
    assert issued(tmp_path) == [(1, "release")] and (tmp_path / "rounds/refused/round-00002").is_dir()
    silent = FakeGrid({node: honest(0.01) for node in (1, 2, 3)})
    run(tmp_path, tiny, silent, num_server_rounds=2)
    assert issued(tmp_path) == [(1, "release")]
    last = happened(tmp_path, "not-released")[-1]
    assert last["round"] == 2 and "refused before" in last["reason"] and "beyond chance" in last["reason"]
    run(tmp_path, tiny, Clinics({2: 0.9}), num_server_rounds=2)  # examined again, and better
    assert issued(tmp_path) == [(1, "release"), (2, "release")]
    assert not (tmp_path / "rounds/refused/round-00002").exists()


def test_a_release_that_a_crash_left_out_is_made_up_for(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crash(monkeypatch, "release_now"):
        run(tmp_path, tiny, Clinics({}), num_server_rounds=4, release_every=2)
    run(tmp_path, tiny, Clinics({}), num_server_rounds=4, release_every=2)
    assert issued(tmp_path) == [(2, "release"), (4, "release")]


def test_fewer_rounds_than_are_done_is_no_run(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=3)
    with pytest.raises(SettingsRejected, match="3 rounds are done"):
        run(tmp_path, tiny, Clinics({}), num_server_rounds=2)
    assert issued(tmp_path) == [(3, "release")]


def test_a_release_that_a_power_cut_left_under_its_former_name_is_found(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=2, release_every=1)
    place = tmp_path / "rounds/releases/round-00001"
    place.rename(place.with_name(".round-00001.former"))
    run(tmp_path, tiny, Clinics({}), rollback=-1)
    assert issued(tmp_path)[-1] == (1, "rollback") and record(tmp_path, 1)["kind"] == "rollback"


def test_replies_that_are_not_believed_do_not_count(tmp_path: Path, tiny: Path) -> None:
    class Odd(Clinics):
        def examined(self, node: int, message: Message) -> Reply:
            if node == 1:
                return RecordDict({"counts": MetricRecord({"rows": 10**9}), "config": ConfigRecord({"sha256": "x"})})
            good = super().examined(node, message)
            assert isinstance(good, RecordDict)
            if node == 2:
                good["counts"]["rows"] = 999
            return good if node < 4 else RecordDict({"counts": good["counts"], "config": ArrayRecord({})})

    grid = Odd({})
    grid.clinics[4] = honest(0.01)
    grid.online.add(4)
    run(tmp_path, tiny, grid, num_server_rounds=1)
    found = record(tmp_path, 1)
    assert [place["name"] for place in found["places"]] == ["clinic-3"]
    assert [row["name"] for row in found["silent"]] == ["clinic-1", "clinic-2", "clinic-4"]
    assert "another adapter" in found["silent"][0]["reason"] and "not believed" in found["silent"][1]["reason"]


def test_the_servers_own_data_is_examined_and_counts_alone(tmp_path: Path, tiny: Path) -> None:
    from model import phantoms
    from tests.client.clinic import fill

    home = fill(tmp_path / "own", phantoms.make(4, ["plain"], seed=5, size=48), tiny)
    grid = FakeGrid({node: honest(0.01) for node in (1, 2, 3)})
    run(tmp_path, tiny, grid, num_server_rounds=1, gate_data=str(home / "training"), gate_points=100.0, gate_ece=1.0)
    found = record(tmp_path, 1)
    assert [place["name"] for place in found["places"]] == ["server"] and found["verdict"] == "passed"
    with pytest.raises(SettingsRejected, match="gate-data"):
        run(tmp_path, tiny, grid, num_server_rounds=2, gate_data=str(tmp_path / "nowhere.json"))


def test_rollback_issues_the_release_before_again_under_a_new_number(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=3, release_every=1)
    first = record(tmp_path, 2)
    grid = Clinics({})
    after = run(tmp_path, tiny, grid, rollback=-1)
    assert after.round == 3 and set(grid.kinds()) == {"query"}
    again = record(tmp_path, 2)
    assert issued(tmp_path) == [(1, "release"), (2, "release"), (3, "release"), (2, "rollback")]
    assert again["serial"] > first["serial"] and again["adapter_sha256"] == first["adapter_sha256"]
    assert again["kind"] == "rollback" and "Rolled back from round 3" in again["summary"]
    assert happened(tmp_path, "rolled-back")[0]["round"] == 2
    run(tmp_path, tiny, Clinics({}), rollback=-1)
    assert issued(tmp_path)[-1] == (1, "rollback")
    run(tmp_path, tiny, Clinics({}), rollback=3)
    assert issued(tmp_path)[-1] == (3, "rollback")
    for to in (9, 7):
        with pytest.raises(SettingsRejected, match="no such earlier release"):
            run(tmp_path, tiny, Clinics({}), rollback=to)


def test_rollback_refuses_a_release_that_was_changed(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=2, release_every=1)
    folder = tmp_path / "rounds/releases/round-00001"
    state, spec = adapters.load(folder)
    adapters.save(folder, {name: array * 2 for name, array in state.items()}, dataclasses.replace(spec))
    with pytest.raises(SettingsRejected, match="not what was released"):
        run(tmp_path, tiny, Clinics({}), rollback=-1)
    assert issued(tmp_path)[-1] == (2, "release")


def test_the_key_is_private_made_once_and_handed_out(tmp_path: Path) -> None:
    from server.certs import CertsError

    for name in ("north", "south"):
        (tmp_path / "certs/clinics" / name).mkdir(parents=True)
    written = signing.hand_out(tmp_path / "certs")
    assert {path.name for path in written} == {"release.key", "release.pub"} and len(written) == 4
    key = tmp_path / "certs/release.key"
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    assert signing.hand_out(tmp_path / "certs") == [] and key.read_bytes() == before
    key.chmod(0o644)
    with pytest.raises(CertsError, match="chmod 600"):
        signing.load(key)
    key.chmod(0o600)
    key.write_bytes(b"nonsense")
    with pytest.raises(CertsError, match="no readable key"):
        signing.load(key)


def test_an_adapter_that_no_round_has_changed_is_not_released_again(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path, tiny, Clinics({}), num_server_rounds=2)
    lonely = Clinics({})
    lonely.online = {1}
    run(tmp_path, tiny, lonely, num_server_rounds=3)  # below the quorum: nothing changes
    assert issued(tmp_path) == [(2, "release")] and "released after round 2 already" in last_word(tmp_path)
    run(tmp_path, tiny, Clinics({}), num_server_rounds=3, gate="off")
    assert issued(tmp_path) == [(2, "release")]
    run(tmp_path, tiny, FakeGrid({node: honest(0.01) for node in (1, 2, 3)}), num_server_rounds=4, gate="off")
    run(tmp_path, tiny, FakeGrid({node: honest(0.01) for node in (1, 2, 3)}), num_server_rounds=4)  # nobody can examine
    assert issued(tmp_path) == [(2, "release"), (4, "release")]
    run(tmp_path, tiny, Clinics({}), num_server_rounds=4)  # examined at last: released with that evidence
    assert issued(tmp_path) == [(2, "release"), (4, "release"), (4, "release")]
    assert record(tmp_path, 4)["verdict"] == "passed"


def last_word(tmp_path: Path) -> str:
    return str(happened(tmp_path, "not-released")[-1]["reason"])


def test_a_release_that_a_crash_kept_from_the_clinics_is_brought_again(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with crash(monkeypatch, "bring"):
        run(tmp_path, tiny, Clinics({}), num_server_rounds=2)
    grid = Clinics({})
    run(tmp_path, tiny, grid, num_server_rounds=2)
    assert issued(tmp_path) == [(2, "release")] and len(happened(tmp_path, "installed")) == 3
    assert "evaluate" not in grid.kinds()
    run(tmp_path, tiny, Clinics({}), num_server_rounds=2)
    assert len(happened(tmp_path, "installed")) == 3
