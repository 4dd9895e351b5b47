"""Joining the cluster that RAY_ADDRESS names, or starting one on this machine."""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import ray

from m2ray.chain.stopping import GOES_ON, sigterm_kept, spared_by_hangup, undisturbed
from m2ray.errors import ClusterError
from m2ray.storage import remedy_for

_SOCKET_BYTES = 107
"""Of the path of a socket, on Linux."""

_RAYS_PART = "/m2ray-12345678/r/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""What stands behind the temporary folder in the longest path of a socket of Ray's."""

_REMOVE_S, _LOOK_S = 10.0, 0.05

START_S = 300.0
"""What Ray may take to be there or to say why not; its own limits add up to half of that."""

_SHORT = ("/tmp", "/var/tmp")  # noqa: S108 - a folder of this user alone is made in it


@contextmanager
def cluster(connect_timeout_s: float, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (in a job: the job's own), or start one on this machine and end it after. A process that is
    connected to Ray by itself stays so; calls in several threads share what the first of them joined or started, and the last one ends it.

    One that is started here listens on the loopback interface alone (m2ray/chain/__init__.py), and what it keeps lies in a folder that no other
    user may enter: Ray opens its own folder to everybody, so that lies in one which it does not know. It is the temporary folder's, or, where
    that has too long a name for sockets, /tmp's, which `say` is told.

    Raises:
        ClusterError: the named cluster does not answer, or refuses the token; or none can be started here; or it fails later.
    """
    with _SHARED.use(connect_timeout_s, say):
        try:
            yield
        except ray.exceptions.RayError as error:  # Ray itself is gone: a stage's failure is handled where it happens
            raise ClusterError(
                f"Ray failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
                f"Often a node ran out of memory, or has no room left in /dev/shm or the temporary folder: m2ray doctor tells. {GOES_ON}",
            ) from error


@contextmanager
def cluster_ahead(connect_timeout_s: float, say: Callable[[str], None]) -> Iterator[Future[None]]:
    """Begin to join or start it in a thread, beside what follows, and hold it until the context ends. What is given is done once it is there, and
    fails as `cluster` would (`wait_for`); `cluster` shares it.

    Ray gives up by itself where something lacks. One that hangs is left to that thread, for which the program does not wait at its end.
    """
    begun: Future[None] = Future()
    is_over, deadline = threading.Event(), time.monotonic() + START_S
    with ExitStack() as at_the_end, ExitStack() as stack:
        at_the_end.callback(is_over.set)
        held = _SHARED.use(connect_timeout_s, say), stack, begun, is_over
        threading.Thread(target=_hold, args=held, name="cluster", daemon=True).start()
        try:
            yield begun
        finally:
            if not begun.done():
                say("Ray is being started, and ends as soon as it is there.")
            with undisturbed():
                wait([begun], max(0.0, deadline - time.monotonic()))
            if not begun.done():
                say(f"Ray is not there after {START_S:g} s, and is left behind.")


def _hold(using: AbstractContextManager[None], stack: ExitStack, begun: Future[None], is_over: threading.Event) -> None:
    """Enter what others end, and stay until they have: Ray asks the kernel to kill its processes with the thread that started them, and what then
    ends Ray waits for them in vain.
    """
    try:
        stack.enter_context(using)
    except BaseException as error:  # noqa: BLE001 - handed to whoever waits for it
        begun.set_exception(error)
    else:
        begun.set_result(None)
    while not is_over.wait(START_S):
        pass
    stack.close()  # what came after they had given up


def wait_for(begun: Future[None]) -> None:
    """Wait for what `cluster_ahead` gave. Raises ClusterError as `cluster` does, and where it hangs."""
    try:
        begun.result(START_S)
    except TimeoutError as error:
        raise _late() from error


def _late() -> ClusterError:
    return ClusterError(f"Ray is not there after {START_S:g} s.", f"m2ray doctor tells what may keep it. {GOES_ON}")


def require_cluster() -> None:
    """Raise ClusterError unless a cluster is named or joined: a chain outlives whoever uses it."""
    if not (os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        raise ClusterError(
            "A warm chain lives in a Ray cluster, and RAY_ADDRESS names none.",
            "Set RAY_ADDRESS. On one machine: ray start --head --node-ip-address=127.0.0.1, then RAY_ADDRESS=127.0.0.1:6379; and RAY_AUTH_MODE=token before "
            "both where there is ~/.ray/auth_token.",
        )


class _Shared:
    """The cluster that calls of this process have joined or started, and how many of them use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ours: ExitStack | None = None
        self._users = 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """While another thread joins or starts it, that one is waited for. Raises ClusterError: it hangs."""
        if not self._lock.acquire(timeout=START_S):
            raise _late()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def use(self, connect_timeout_s: float, say: Callable[[str], None]) -> Iterator[None]:
        """Raises ClusterError."""
        with self._locked(), sigterm_kept():
            if not ray.is_initialized():  # else whoever called m2ray.extract has a cluster, and keeps it, or another call has
                self._ours, self._users = _connected(connect_timeout_s, say), 0
            ours = self._ours
            self._users += 1
        try:
            yield
        finally:
            with undisturbed(), self._lock:
                if self._ours is ours:
                    self._users -= 1
                    if ours is not None and not self._users:
                        self._ours = None
                        ours.close()


_SHARED = _Shared()


def _connected(connect_timeout_s: float, say: Callable[[str], None]) -> ExitStack:
    """What ends the connection that is made here. Raises ClusterError."""
    with ExitStack() as stack:
        if os.environ.get("RAY_ADDRESS"):
            stack.callback(ray.shutdown)
            _join(connect_timeout_s)
        else:
            folder = stack.enter_context(_private_folder(_short_folder(say)))
            stack.callback(ray.shutdown)
            _start(folder / "r")
        return stack.pop_all()


def _short_folder(say: Callable[[str], None]) -> Path:
    """The temporary folder, or another one where its path is too long for Ray's sockets. Raises ClusterError if there is none."""
    named, most_bytes = Path(tempfile.gettempdir()), _SOCKET_BYTES - len(_RAYS_PART)
    if len(os.fsencode(named)) <= most_bytes:
        return named
    too_long = f"The temporary folder {named} has too long a path for Ray's sockets: more than {most_bytes} bytes"
    for place in map(Path, _SHORT):
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            say(f"{too_long}. Ray's files lie in {place} instead; TMPDIR names another folder.")
            return place
    raise ClusterError(f"{too_long}, and {' and '.join(_SHORT)} cannot be written.", "Set TMPDIR to a folder of a shorter name.")


@contextmanager
def _private_folder(place: Path) -> Iterator[Path]:
    """A folder of this user alone in `place`, with permission 0700, for as long as the context lasts."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="m2ray-", dir=place))
    except OSError as error:
        raise ClusterError(f"Ray needs the temporary folder {place}: {error.strerror}.", remedy_for(error, place)) from error
    try:
        yield folder
    finally:
        deadline = time.monotonic() + _REMOVE_S
        while folder.exists() and time.monotonic() < deadline:  # Ray's agents end a moment after it, and write until then
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(_LOOK_S)


def _start(folder: Path) -> None:
    try:
        with spared_by_hangup():
            ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), logging_level="ERROR", log_to_driver=True)
    except Exception as error:
        # Ray says by Exception itself, of no narrower type, that a process of its own did not start in time: on a full disk, for one.
        if type(error) is not Exception and not isinstance(error, OSError | ray.exceptions.RayError | RuntimeError | ValueError):
            raise
        raise ClusterError(
            f"Ray could not be started on this machine: {str(error).rstrip('.')}. {_room(folder)}",
            "If that is little, free some, or set TMPDIR to a folder of a short name on another disk; if the machine is busy, wait. Then run the same command again.",
        ) from error


def _room(folder: Path) -> str:
    """What Ray needs room in, and what is left there."""
    left = [(place, shutil.disk_usage(place).free) for place in (folder.parent.parent, Path("/dev/shm")) if place.is_dir()]  # noqa: S108
    return f"Free: {', '.join(f'{num_bytes:,} bytes in {place}' for place, num_bytes in left)}."


def _join(timeout_s: float) -> None:
    address = os.environ["RAY_ADDRESS"]
    try:
        host, separator, port = address.rpartition(":")
        if separator and port.isdigit() and "/" not in host:
            # Ray itself goes on trying for minutes where nothing listens.
            socket.create_connection((host, int(port)), timeout_s).close()
            _require_token(address, timeout_s)
        ray.init(logging_level="ERROR", log_to_driver=True)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"The Ray cluster at RAY_ADDRESS={address!r} cannot be joined: {(str(error).splitlines() or [type(error).__name__])[0].rstrip('.')}.",
            "Check the address (HEAD:6379) and the token, or unset RAY_ADDRESS to run on this machine.",
        ) from error


def _require_token(address: str, timeout_s: float) -> None:
    """Ask for no more than the cluster's id. Ray itself would offer a token that is refused for 20 s, and print a line each second.

    Raises:
        ClusterError: the token is refused, or there is none. Whatever else is wrong is left to Ray.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(
                    f"The Ray cluster at RAY_ADDRESS={address!r} refuses the token of this process, or its lack of one.",
                    "Set RAY_AUTH_MODE=token, which takes the token of ~/.ray/auth_token, as `ray start` does; if the cluster's is another, RAY_AUTH_TOKEN or "
                    "RAY_AUTH_TOKEN_PATH too. Or unset RAY_ADDRESS to run on this machine.",
                ) from error
