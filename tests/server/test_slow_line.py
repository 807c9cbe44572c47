"""A clinic behind a bad line: transfers of known size through a real server, proxy and SuperNode, with cuts on the way.

Fast, so that it ends soon: 16 Mbit/s. At true size and speed: `python -m scripts.soak_parts.transfer --kbit 256`.
"""

import random
from collections.abc import Iterator

import pytest

from client import node
from scripts.soak_parts.line import END, RESET
from scripts.soak_parts.transfer import Office, Transfer, office

SIZE = 2 << 20
CHUNK = int(node.SMALL["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"])
CUTS = 12
GREETING = 8 << 10  # bytes of a new TLS connection and of the headers of a call
OTHER = 64 << 10  # bytes of asking for messages and signs of life, which go by time
SECONDS = 120.0


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A server and its one clinic behind a line of 16 Mbit/s."""
    with office(tmp_path_factory.mktemp("away"), kbit=16_000) as here:
        yield here


@pytest.fixture(scope="module")
def whole(away: Office) -> Transfer:
    """A transfer without a cut: what all others are held against."""
    found = away.transfer(SIZE, SECONDS)
    assert found.cuts == 0
    assert SIZE < found.bytes_down < 1.1 * SIZE + OTHER and SIZE < found.bytes_up < 1.1 * SIZE + OTHER
    return found


def sent_twice(found: Transfer, whole: Transfer) -> int:
    """Bytes that passed the line beyond those of a transfer without a cut."""
    return found.bytes_down + found.bytes_up - whole.bytes_down - whole.bytes_up


@pytest.mark.slow
def test_a_line_that_is_cut_again_and_again_sends_at_most_one_chunk_twice_for_each_cut(
    away: Office, whole: Transfer
) -> None:
    def limits() -> Iterator[int]:
        chance = random.Random(0)
        for number in range(CUTS):
            away.line.how = (RESET, END)[number % 2]
            yield chance.randint(CHUNK // 2, 3 * CHUNK)

    away.line.plan(limits())
    found = away.transfer(SIZE, SECONDS)
    assert found.cuts == CUTS
    assert found.bytes_down > whole.bytes_down - OTHER and found.bytes_up > whole.bytes_up - OTHER
    assert sent_twice(found, whole) <= CUTS * (CHUNK + GREETING) + OTHER, (found, whole)


@pytest.mark.slow
def test_a_clinic_that_is_killed_while_it_receives_and_cut_off_while_it_sends_finishes(
    away: Office, whole: Transfer
) -> None:
    line, then = away.line, (away.line.bytes_down, away.line.bytes_up)
    done: list[str] = []

    def strike() -> None:
        if not done and line.bytes_down - then[0] > SIZE // 2:
            done.append("killed")
            away.leave()
            away.join()
        elif len(done) == 1 and line.bytes_up - then[1] > SIZE // 2:
            done.append("cut off")
            line.down(2.0)

    found = away.transfer(SIZE, SECONDS, strike)
    assert done == ["killed", "cut off"]
    assert found.bytes_down <= 2 * whole.bytes_down  # what a node had received ends with it
    assert found.bytes_up - whole.bytes_up <= CHUNK + GREETING + OTHER
