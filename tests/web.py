"""A real HTTP server on this machine that serves a folder by ranges and fails when told to, and a real S3 server."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class Web(ThreadingHTTPServer):
    """``faults`` are used up by the next requests: a status, "slow", "short", "flip" or "" for none.

    ``requests`` lists the path and range of each; ``ranges`` False ignores ranges, as Python's own server does.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests, self.ranges = folder, list[int | str](), list[tuple[str, str]](), True
        self.connections = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request, client_address) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address) -> None:
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Web

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append((self.path, wanted))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")  # a proxy is asked for the whole address
        if fault == "slow":
            time.sleep(0.4)
        if isinstance(fault, int) or not path.is_file():
            return self.answer(fault or 404, b"")
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if not found or not self.server.ranges:
            return self.answer(200, path.read_bytes())
        start, stop = int(found[1]), min(int(found[2]) + 1, size)
        if start >= size:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        with path.open("rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.answer(206, body, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, short=fault == "short")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, short: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if short else body)
        self.close_connection = short


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Web]:
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
