"""A local HTTP server that serves a folder, counts requests, and fails on demand."""

import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.loopback import Loopback


class Handler(BaseHTTPRequestHandler):
    """Handles HEAD and GET, also of ranges; a request uses up the first fault in the list of its file."""

    def do_HEAD(self):
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.end_headers()

    def do_GET(self):
        server = self.server
        name = self.path.lstrip("/")
        with server.lock:
            server.counts[name] += 1
            fault = server.faults[name].pop(0) if server.faults[name] else server.always
        if fault == "hang":  # accepts the connection, sends nothing
            server.closing.wait(60)
            return
        if isinstance(fault, int) or not (server.folder / name).is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = (server.folder / name).read_bytes()
        time.sleep(server.delay)
        if (part := self.headers.get("Range")) and server.ranges:
            first, last = map(int, part.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        if fault != "short":  # without a length, the body ends with the connection
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self._send(data, fault)

    def _send(self, data: bytes, fault: str | None) -> None:
        half = len(data) // 2
        if fault == "flip":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        if fault in ("stall", "cut", "short"):
            data = data[:half]
        self.wfile.write(data)
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait(60)

    def log_message(self, *_):
        pass


class Server(Loopback):
    """Serves `folder` until the `with` block ends.

    Attributes:
        faults: name -> faults of its next requests: an HTTP status, "hang", "stall", "cut", "short" or "flip"
        always: fault of all other requests
        ranges: whether it sends parts of files
        counts: name -> requests
        delay: seconds before an answer
    """

    def __init__(self, folder: Path):
        super().__init__(Handler)
        self.folder, self.counts, self.faults, self.always, self.delay = folder, Counter(), defaultdict(list), None, 0
        self.ranges = True
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __exit__(self, *error):
        self.closing.set()
        super().__exit__(*error)
