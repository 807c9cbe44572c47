"""The bad line that other tests and `scripts/soak` put before a clinic: speed, cuts, silence, and what it counts."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from scripts.soak_parts.line import END, RESET, Line


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """Where a server sends back whatever comes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve(one: socket.socket) -> None:
            with one, contextlib.suppress(OSError):
                while data := one.recv(65536):
                    one.sendall(data)

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield listening.getsockname()


def through(line: Line) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=10)


def back(one: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (piece := one.recv(65536)):
        got += piece
    return got


def test_bytes_pass_unchanged_and_are_counted_each_way(echo: tuple[str, int]) -> None:
    sent = bytes(range(256)) * 1000
    with Line(echo) as line, through(line) as one:
        one.sendall(sent)
        one.shutdown(socket.SHUT_WR)
        assert back(one, len(sent)) == sent and one.recv(1) == b""
        assert (line.bytes_up, line.bytes_down, line.bytes) == (len(sent), len(sent), 2 * len(sent))
        assert (line.connections, line.cuts) == (1, 0)


def test_connections_share_the_speed_of_the_line(echo: tuple[str, int]) -> None:
    start = time.monotonic()
    with Line(echo, kbit=4000) as line, through(line) as one, through(line) as other:
        for each in (one, other):
            each.sendall(b"x" * 100_000)
        assert len(back(one, 100_000)) == len(back(other, 100_000)) == 100_000
    assert time.monotonic() - start >= 0.4  # 200 kB at 500 kB/s


def test_a_reset_is_an_error_and_an_orderly_end_is_not(echo: tuple[str, int]) -> None:
    with Line(echo) as line:
        for how, number in ((RESET, 1), (END, 2)):
            with through(line) as one:
                one.sendall(b"x")
                assert one.recv(1) == b"x"
                line.cut(how)
                if how == RESET:
                    with pytest.raises(ConnectionResetError):
                        one.recv(1)
                else:
                    assert one.recv(1) == b""
            assert line.cuts == number
        line.cut()
        assert line.cuts == 2  # nothing was open


def test_cuts_come_after_the_bytes_that_were_said(echo: tuple[str, int]) -> None:
    with Line(echo, cut_after=[10_000, 30_000]) as line:
        for expected in (10_000, 40_000):
            with through(line) as one, contextlib.suppress(OSError):
                one.sendall(b"x" * 100_000)
                back(one, 100_000)
            assert expected <= line.bytes < expected + 3 * 4096
        with through(line) as one:
            one.sendall(b"x" * 100_000)
            assert len(back(one, 100_000)) == 100_000
        assert line.cuts == 2


def test_cuts_come_by_the_clock(echo: tuple[str, int]) -> None:
    with Line(echo, cut_every=0.05) as line, through(line) as one, pytest.raises(ConnectionResetError):
        one.recv(1)


def test_a_line_that_is_down_takes_nobody_and_a_silent_one_passes_nothing(echo: tuple[str, int]) -> None:
    with Line(echo) as line:
        line.down(0.3)
        with through(line) as one, pytest.raises(ConnectionResetError):
            one.recv(1)
        assert (line.bytes, line.connections) == (0, 0)
        line.down(0)
        with through(line) as one:
            line.silent(0.3)
            start = time.monotonic()
            one.sendall(b"x")
            assert one.recv(1) == b"x" and time.monotonic() - start >= 0.3
