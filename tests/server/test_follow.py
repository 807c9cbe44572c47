"""Following a run: its last words are read even when they come while Flower is asked for the run's state."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.federation import free_ports
from server import follow as following
from server import link, runs
from server.events import Events


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that runs fast, so that the state is asked for at once."""
    moments = iter(range(0, 100_000, 20))
    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda seconds: None))
    monkeypatch.setattr(runs, "submit", lambda *_: 7)


def follow(root: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Any) -> None:
    def status(*_: object) -> str:
        meanwhile()
        return "finished:completed"

    monkeypatch.setattr(runs, "run_status", status)
    following.follow(SimpleNamespace(state=root), root, {}, True)


@pytest.mark.usefixtures("quick")
def test_events_written_while_the_state_was_asked_for_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Events(tmp_path)
    follow(tmp_path, monkeypatch, lambda: events.add("finished", round=2, updates=2))
    assert '"event": "finished"' in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_run_that_ended_without_a_word_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(link.LinkError, match="ended before its rounds were done"):
        follow(tmp_path, monkeypatch, lambda: None)


def test_nothing_is_submitted_before_the_server_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower would start a server of its own, without TLS, and run the rounds there."""
    monkeypatch.setattr(runs, "flwr", lambda *_, **__: pytest.fail("Flower was called"))
    with pytest.raises(link.LinkError, match="afya-server start"):
        runs.submit(link.Link(tmp_path / "certs", tmp_path / "state"), {})
    assert not (tmp_path / "state").exists()


@pytest.mark.usefixtures("quick")
def test_the_events_of_another_run_are_not_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Events(tmp_path)

    def meanwhile() -> None:
        for run, kind in ((6, "finished"), (6, "failed"), (7, "refused")):
            monkeypatch.setattr(Events, "run", run)
            log.add(kind, reason="Another run is at work")

    with pytest.raises(link.LinkError, match="Another run is at work"):
        follow(tmp_path, monkeypatch, meanwhile)
    capsys.readouterr()


@pytest.mark.usefixtures("quick")
def test_who_interrupts_is_told_that_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        follow(tmp_path, monkeypatch, interrupt)
    assert ended.value.code == 130 and "The run goes on without this window" in capsys.readouterr().err


def test_a_server_that_has_stopped_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "flwr", lambda *_, **__: pytest.fail("Flower was called"))
    link.configure(link.Link(tmp_path / "certs", tmp_path, free_ports(1)[0]))
    with pytest.raises(link.LinkError, match="is not running"):
        runs.submit(link.existing(tmp_path / "certs", tmp_path), {})
