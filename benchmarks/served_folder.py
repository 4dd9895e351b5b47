"""A folder served as a bucket, each answer some milliseconds late: as much of S3 as m2ray asks for, so that a client is measured and not a server.

    with served(FOLDER, 5.0) as environment: ...     # of a process that has it, s3://any-bucket is FOLDER

It takes about 0.15 ms of one core a request, where Ceph's gateway beside its clients takes several. Nothing is signed, nothing waits for the disk.
"""

import asyncio
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_LISTED_AT_ONCE = 1000
_START_TIMEOUT_S = 60.0


@contextmanager
def served(folder: Path, delay_ms: float) -> Iterator[dict[str, str]]:
    """The variables of the environment by which clients find the folder, which another process serves on loopback for as long."""
    ports: multiprocessing.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=_serve, args=(folder, delay_ms / 1e3, ports), daemon=True)
    server.start()
    try:
        port = ports.get(timeout=_START_TIMEOUT_S)
        keys = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", **keys}
    finally:
        server.terminate()
        server.join(10)


def _serve(folder: Path, delay_s: float, ports: "multiprocessing.Queue[int]") -> None:
    async def serve() -> None:
        bucket = _Bucket(folder)
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(bucket, delay_s), "127.0.0.1", 0)
        ports.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


Answer = tuple[int, dict[str, str], bytes]


class _Bucket:
    """The folder's files as objects."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: dict[str, list[tuple[str, int]]] = {}

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(target)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        deleted = [unescape(each) for each in re.findall(r"<Key>([^<]*)</Key>", body.decode())] if method == "POST" else []
        if any(map(_leads_out, (key, query.get("prefix", ""), *deleted))):
            return _error(403, "AccessDenied")
        if method == "POST":
            return self._delete(deleted)
        if not key:
            return self._list(query)
        answers: dict[str, Callable[[], Answer]] = {
            "GET": lambda: self._get(key, headers.get("range", "")),
            "HEAD": lambda: self._get(key, ""),
            "PUT": lambda: self._put(key, body, only_if_absent=headers.get("if-none-match") == "*"),
        }
        return answers[method]()

    def _get(self, key: str, asked: str) -> Answer:
        path = self._folder / key
        if not path.is_file():
            return _error(404, "NoSuchKey")
        data = path.read_bytes()
        seen = {"ETag": f'"{path.stat().st_mtime_ns:x}"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        if not asked:
            return 200, seen, data
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return _error(416, "InvalidRange")
        return 206, {**seen, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    def _put(self, key: str, body: bytes, *, only_if_absent: bool) -> Answer:
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb" if only_if_absent else "wb") as file:
                file.write(body)
        except FileExistsError:
            return _error(412, "PreconditionFailed")
        return 200, {"ETag": f'"{path.stat().st_mtime_ns:x}"'}, b""

    def _delete(self, keys: list[str]) -> Answer:
        """All the objects that a request names."""
        for key in keys:
            (self._folder / key).unlink(missing_ok=True)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return 200, {"Content-Type": "application/xml"}, f"<DeleteResult>{deleted}</DeleteResult>".encode()

    def _list(self, query: dict[str, str]) -> Answer:
        """A page of keys. With a delimiter, the folders and files right below a prefix, in one page."""
        prefix, start = query.get("prefix", ""), int(query.get("continuation-token", 0))
        if query.get("delimiter"):
            entries = sorted(os.scandir(self._folder / prefix), key=lambda entry: entry.name)
            folders = "".join(
                f"<CommonPrefixes><Prefix>{escape(f'{prefix}{each.name}/')}</Prefix></CommonPrefixes>" for each in entries if each.is_dir()
            )
            page, more = [(f"{prefix}{each.name}", each.stat().st_size) for each in entries if each.is_file()], False
        else:
            if not start:
                self._listed[prefix] = sorted(self._files(prefix))
            folders, page = "", self._listed[prefix][start : start + _LISTED_AT_ONCE]
            more = start + _LISTED_AT_ONCE < len(self._listed[prefix])
        seen = "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>-</ETag><StorageClass>STANDARD</StorageClass>"
        keys = "".join(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size>{seen}</Contents>" for key, size in page)
        following = f"<NextContinuationToken>{start + _LISTED_AT_ONCE}</NextContinuationToken>" if more else ""
        told = f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>{keys}{folders}{following}"
        return 200, {"Content-Type": "application/xml"}, f"<ListBucketResult>{told}</ListBucketResult>".encode()

    def _files(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Key and size of each file below a folder, `prefix` with a slash at its end."""
        if (self._folder / prefix).is_dir():
            for entry in os.scandir(self._folder / prefix):
                if entry.is_dir():
                    yield from self._files(f"{prefix}{entry.name}/")
                else:
                    yield f"{prefix}{entry.name}", entry.stat().st_size


def _leads_out(key: str) -> bool:
    """Whether a key is of something outside of the folder: whoever is on this machine may ask."""
    return key.startswith("/") or ".." in key.split("/")


def _error(status: int, code: str) -> Answer:
    return status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


class _Connection(asyncio.Protocol):
    """Requests of one client, one after the other."""

    def __init__(self, bucket: _Bucket, delay_s: float) -> None:
        self._bucket = bucket
        self._delay_s = delay_s
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = self._data[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        stop = end + 4 + int(headers.get("content-length", 0))
        if len(self._data) < stop:
            return
        method, target, _ = first.split(" ")
        body = bytes(self._data[end + 4 : stop])
        del self._data[:stop]
        asyncio.get_running_loop().call_later(self._delay_s, self._send, method, self._bucket.answer(method, target, headers, body))

    def _send(self, method: str, answer: Answer) -> None:
        status, headers, body = answer
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [] if status == 204 else [f"Content-Length: {len(body)}"]
        self._transport.write("\r\n".join([*lines, "\r\n"]).encode("latin-1") + (b"" if method == "HEAD" else body))
