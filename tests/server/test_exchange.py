"""Messages over a SuperLink that fails for a while, or for good."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import events, exchange, rounds
from tests.server import fakes


def failing(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://127.0.0.1/v1")
    return httpx.HTTPStatusError("failed", request=request, response=httpx.Response(status, request=request))


class Busy(fakes.FakeGrid):
    """Every call fails until `until` on the clock of the test."""

    def __init__(self, clock: fakes.Clock, until: float, error: Callable[[], Exception]) -> None:
        super().__init__({n: fakes.honest() for n in (1, 2, 3)})
        self.clock, self.until, self.error = clock, until, error

    def _maybe(self) -> None:
        if self.clock.now < self.until:
            raise self.error()

    def get_nodes(self) -> Any:
        self._maybe()
        return super().get_nodes()

    def push_messages(self, messages: Any) -> Any:
        self._maybe()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Any) -> Any:
        numbers = list(message_ids)
        if len(self.sent) <= 3 and self.until < 40:  # and once more in the middle of the first round
            self.until = 40.0
        self._maybe()
        return super().pull_messages(numbers)


def single(tmp_path: Path, tiny: Path, until: float, error: Callable[[], Exception]) -> Any:
    clock = fakes.Clock()
    chosen = fakes.settings(tmp_path, tiny, num_server_rounds=1, gate="off")
    return rounds.Federation(Busy(clock, until, error), chosen, sleep=clock.sleep, clock=clock).single()


def test_a_superlink_that_fails_for_a_while_costs_the_round_nothing(tmp_path: Path, tiny: Path) -> None:
    after = single(tmp_path, tiny, 20.0, lambda: failing(500))
    assert [row.clinic for row in after.accepted] == ["clinic-1", "clinic-2", "clinic-3"]


@pytest.mark.parametrize(
    "error",
    [lambda: failing(403), lambda: httpx.ConnectError("gone"), lambda: failing(500)],
    ids=["refuses", "is gone", "fails for good"],
)
def test_one_that_refuses_is_gone_or_fails_for_good_ends_the_run(
    tmp_path: Path, tiny: Path, error: Callable[[], Exception]
) -> None:
    with pytest.raises(httpx.HTTPError):
        single(tmp_path, tiny, exchange.BUSY + 30, error)


def test_a_round_says_whom_it_waits_for(tmp_path: Path, tiny: Path) -> None:
    clock = fakes.Clock()
    grid = fakes.FakeGrid({n: fakes.honest() for n in (1, 2, 3)})
    grid.online = {1, 2}
    chosen = fakes.settings(tmp_path, tiny, num_server_rounds=1, gate="off")
    after = rounds.Federation(grid, chosen, sleep=clock.sleep, clock=clock).single()
    assert not after.changed
    told = [event for event in events.read(tmp_path)[0] if event["event"] == "waiting"]
    assert [(event["clinics"], event["needed"]) for event in told] == [(["clinic-1", "clinic-2"], 3)]


def test_a_clinic_that_left_is_told_from_one_whose_training_failed() -> None:
    from flwr.common.constant import ErrorCode

    from server import strategy

    assert strategy.NODE_UNAVAILABLE == ErrorCode.NODE_UNAVAILABLE
