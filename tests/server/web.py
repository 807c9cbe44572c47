"""A small web server for tests of downloads: Range, cut connections, refusals, on a free port of loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """What is served (`files` by path) and how badly: bytes after which a path's answers are cut, statuses in turn."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.statuses: dict[str, list[int]] = {}
        self.tags: dict[str, str] = {}
        self.no_range = False
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def ranges(self, path: str) -> list[str]:
        """The Range header of each request for `path`."""
        return [value for name, value in self.asked if name == path]


@contextmanager
def serve() -> Iterator[Site]:
    """Run a site until the block ends."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that hangs up is part of the tests
                super().handle()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            site.asked.append((self.path, wanted))
            status = site.statuses[self.path].pop(0) if site.statuses.get(self.path) else 200
            data = site.files.get(self.path)
            if data is None or status != 200:
                self.answer(404 if data is None else status, b"", {})
                return
            tag = site.tags.get(self.path, '"1"')
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not site.no_range else 0
            if self.headers.get("If-Range", tag) != tag:
                start = 0
            if start and start >= len(data):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = {"ETag": tag}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206 if start else 200, data[start:], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            cut = site.cut.get(self.path)
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None and cut < len(body):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
