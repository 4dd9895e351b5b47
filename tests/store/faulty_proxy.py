"""A loopback HTTP proxy before a real S3 server that misbehaves on request: what a store or the network between does to clients."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class FaultyProxy:
    """Hands requests on as they are (signatures hold: the Host header stays the client's), but for the faults asked for.

    `faults` are used up one a request that `applies_to` (method, path) chooses: "503" answers so without handing on, "drop" closes
    the connection unanswered, "lose" hands on and then closes it unanswered, "cut" sends half of the answer's body, "hang" hands on
    and never answers.
    `before_create` is called with the path of each request that bears If-None-Match. `seen` counts requests by method.
    """

    endpoint: str
    faults: deque[str] = field(default_factory=deque)
    applies_to: Callable[[str, str], bool] = lambda method, path: True
    before_create: Callable[[str], object] = lambda path: None
    seen: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.seen[method] = self.seen.get(method, 0) + 1
            return self.faults.popleft() if self.faults and self.applies_to(method, path) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    upstream: str

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        """Silent."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.next_fault(self.command, self.path)
        if fault == "503":
            self._answer(503, "Service Unavailable", [("Content-Type", "application/xml")], b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "drop":
            self.close_connection = True
            return
        if "If-None-Match" in self.headers:
            self.proxy.before_create(self.path)
        connection = HTTPConnection(self.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content, headers = answer.read(), answer.getheaders()
        finally:
            connection.close()
        if fault == "hang":
            self.proxy.ended.wait(60)
        if fault in ("lose", "hang"):
            self.close_connection = True
            return
        self._answer(answer.status, answer.reason, headers, content, sent_bytes=len(content) // 2 if fault == "cut" else None)

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, sent_bytes: int | None = None) -> None:
        self.send_response_only(status, reason)
        kept = [pair for pair in headers if pair[0].lower() not in ("content-length", "transfer-encoding", "connection")]
        length = {name.lower(): value for name, value in headers}.get("content-length") if self.command == "HEAD" else None
        for name, value in [*kept, ("Content-Length", length or str(len(content)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:sent_bytes])
        if sent_bytes is not None:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve


@contextmanager
def faulty_proxy(upstream_endpoint: str) -> Iterator[FaultyProxy]:
    """A proxy on a free port of the loopback interface, ended after."""
    handler = type("Handler", (_Handler,), {"upstream": urlsplit(upstream_endpoint).netloc})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy = handler.proxy = FaultyProxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
