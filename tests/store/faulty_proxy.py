"""A loopback HTTP proxy before a real S3 server that misbehaves on request: what a store or the network between does to clients."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_S = 1.0
_EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@dataclass
class FaultyProxy:
    """Hands requests on as they are (signatures hold: the Host header stays the client's), but for the faults asked for.

    `faults` are used up one a request that `applies_to` (method, path) chooses: "503" answers so without handing on, "drop" closes
    the connection unanswered, "lose" hands on and then closes it unanswered, "cut" sends half of the answer's body, "hang" hands on
    and never answers, "slow" waits `SLOW_S` first, "expired" says that the credentials are.
    `lasting` befalls every request for as long as it is set.
    `before_create` is called with the path of each request that bears If-None-Match, `before_put` with the path of each PUT and the
    client's port; where that returns True, the request is not handed on. `seen` counts requests by method, `payloads` are what the
    signatures of PUTs say of their bodies.
    """

    upstream: str
    endpoint: str = "http://127.0.0.1"
    faults: deque[str] = field(default_factory=deque)
    applies_to: Callable[[str, str], bool] = lambda method, path: True
    before_create: Callable[[str], object] = lambda path: None
    before_put: Callable[[str, int], bool] = lambda path, port: False
    lasting: str | None = None
    seen: dict[str, int] = field(default_factory=dict)
    payloads: set[str | None] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        """Take connections, on the same port every time."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", urlsplit(self.endpoint).port or 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def refuse(self) -> None:
        """Take no connection any more, as if nobody were there."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.seen[method] = self.seen.get(method, 0) + 1
            return self.faults.popleft() if self.faults and self.applies_to(method, path) else self.lasting


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients that are killed leave broken connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: apart, each answer waits for a delayed acknowledgement
    proxy: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        """Silent."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT":
            self.proxy.payloads.add(self.headers.get("x-amz-content-sha256"))
        fault = self.proxy.next_fault(self.command, self.path)
        if fault == "503":
            self._answer(503, "Service Unavailable", [("Content-Type", "application/xml")], b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "expired":
            self._answer(400, "Bad Request", [("Content-Type", "application/xml")], _EXPIRED)
            return
        if fault == "slow":
            self.proxy.ended.wait(SLOW_S)
        if fault == "drop" or (self.command == "PUT" and self.proxy.before_put(self.path, self.client_address[1])):
            self.close_connection = True
            return
        if "If-None-Match" in self.headers:
            self.proxy.before_create(self.path)
        connection = HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content, headers = answer.read(), answer.getheaders()
        except OSError:  # the server is gone
            self.close_connection = True
            return
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
    proxy = FaultyProxy(upstream_endpoint)
    proxy.listen()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        proxy.refuse()
