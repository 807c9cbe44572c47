"""A clinic's bad line: a TCP relay on loopback that is slow, is cut, goes down, falls silent, and counts what passed.

It relays bytes as they are, TLS included. Up is from whoever connects to the target, down is back; each direction has
its own speed, shared by all connections in turn. Not covered: delay and loss of single packets, and that a
real line may keep more data waiting than the two machines' own buffers hold here.
"""

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

PIECE = 4096  # bytes that pass at once: 0.13 s at 256 kbit/s
FAREWELL = 1.0  # seconds after an orderly end in which the other side may hang up by itself
RESET, END = "reset", "end"  # how a connection dies: an error at both ends, or what looks like its orderly end

Pair = tuple[asyncio.StreamWriter, asyncio.StreamWriter]


class Line:
    """Relays from `port` on loopback to `target` (host, port) at `kbit` kbit/s each way (0: as fast as it goes).

    `cut_after` cuts every connection each time so many bytes have passed, both directions together: one number for
    always, or numbers one after the other. `cut_every` does so every so many seconds. `how` is RESET or END. Use it
    as a context manager; every method may be called from any thread.
    """

    def __init__(
        self,
        target: tuple[str, int],
        kbit: float = 0.0,
        *,
        cut_after: int | Iterable[int] = (),
        cut_every: float = 0.0,
        how: str = RESET,
    ) -> None:
        self.target, self.kbit, self.cut_every, self.how = target, kbit, cut_every, how
        self.port = 0
        self.bytes_up = self.bytes_down = 0  # what passed
        self.connections = self.cuts = 0  # connections that were made; cuts that hit at least one
        self.plan(cut_after)
        self._free = {"up": 0.0, "down": 0.0}  # when the next piece may leave
        self._silent_until = self._down_until = 0.0
        self._pairs: set[Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where to connect, as HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def bytes(self) -> int:
        """Bytes that passed in both directions."""
        return self.bytes_up + self.bytes_down

    def plan(self, cut_after: int | Iterable[int]) -> None:
        """Cut from now on after these numbers of bytes, in place of those planned before; () is never."""
        self._limits: Iterator[int] = itertools.repeat(cut_after) if isinstance(cut_after, int) else iter(cut_after)
        self._limit, self._since_cut = next(self._limits, 0), 0

    def cut(self, how: str | None = None) -> None:
        """Cut every open connection now; new ones are taken at once."""
        asyncio.run_coroutine_threadsafe(self._cut(how or self.how), self._loop).result()

    def down(self, seconds: float, how: str | None = None) -> None:
        """Cut every connection and refuse new ones for so long."""
        self._down_until = time.monotonic() + seconds
        self.cut(how)

    def silent(self, seconds: float) -> None:
        """Let nothing pass for so long, without ending any connection."""
        self._silent_until = time.monotonic() + seconds

    def __enter__(self) -> "Line":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.cut_every:
            self._clock = asyncio.create_task(self._cut_by_clock())

    async def _stop(self) -> None:
        if self._server:
            self._server.close()
        for pair in list(self._pairs):
            _end(pair, RESET)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _cut_by_clock(self) -> None:
        while True:
            await asyncio.sleep(self.cut_every)
            await self._cut(self.how)

    async def _cut(self, how: str) -> None:
        self._since_cut = 0
        self.cuts += bool(self._pairs)
        for pair in list(self._pairs):
            self._pairs.discard(pair)
            _end(pair, how)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: both directions until either side hangs up or the line is cut."""
        pair = (writer, writer)
        try:
            if time.monotonic() < self._down_until:
                return _end(pair, RESET)
            far_reader, far_writer = await asyncio.open_connection(*self.target)
            pair = (writer, far_writer)
            self._pairs.add(pair)
            self.connections += 1
            await asyncio.gather(self._pass(reader, pair, "up"), self._pass(far_reader, pair, "down"))
        except (OSError, asyncio.CancelledError):  # the relay itself is stopped by cancelling
            _end(pair, RESET)
        finally:
            self._pairs.discard(pair)
            for one in pair:
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, pair: Pair, way: str) -> None:
        writer = pair[way == "up"]
        while piece := await reader.read(PIECE):
            await self._turn(way, len(piece))
            if pair not in self._pairs:
                return  # cut while this piece was under way
            writer.write(piece)
            await writer.drain()
            await self._count(way, len(piece))
        if pair in self._pairs:
            writer.write_eof()

    async def _turn(self, way: str, count: int) -> None:
        """Wait until `count` bytes have gone this way at the line's speed."""
        while (silent := self._silent_until - time.monotonic()) > 0:
            await asyncio.sleep(silent)
        if self.kbit:
            now = time.monotonic()
            self._free[way] = max(now, self._free[way]) + count / (self.kbit * 125)
            await asyncio.sleep(self._free[way] - now)

    async def _count(self, way: str, count: int) -> None:
        if way == "up":
            self.bytes_up += count
        else:
            self.bytes_down += count
        self._since_cut += count
        if self._limit and self._since_cut >= self._limit:
            self._limit = next(self._limits, 0)
            await self._cut(self.how)


def _end(pair: Pair, how: str) -> None:
    """End both sides of a connection: with a reset at once, or with what looks like an orderly end."""
    loop = asyncio.get_running_loop()
    for writer in pair:
        if how == END and not writer.is_closing():
            with contextlib.suppress(OSError):
                writer.write_eof()
            loop.call_later(FAREWELL, writer.transport.abort)
        else:
            with contextlib.suppress(OSError):
                line = writer.get_extra_info("socket")
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
