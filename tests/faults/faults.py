"""All the faults. Each is a function that strikes the run of a scene, lets it pass, and gives how many processes and nodes it killed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.faults.processes import (
    all_stages_killed,
    crash_loop,
    driver_killed,
    driver_outlived,
    job_stopped,
    killed_in_put,
    newcomer_killed,
    node_killed,
    stage_hung,
    stage_killed,
    weights_replaced,
)
from tests.faults.scene import Scene


@dataclass(frozen=True)
class Fault:
    """What is done, how often in comparison, and where it can be done."""

    name: str
    strike: Callable[[Scene], int]
    weight: int
    where: Literal["anywhere", "local", "small disk", "s3"] = "anywhere"


# -- the disk -------------------------------------------------------------------------------------------------------------


def _disk_full_briefly(scene: Scene) -> int:
    return _disk_full(scene, 0.5, 3.0)


def _disk_full_long(scene: Scene) -> int:
    return _disk_full(scene, 30.0, 30.0)


def _disk_full(scene: Scene, at_least_s: float, at_most_s: float) -> int:
    scene.disk.fill()
    scene.last(at_least_s, at_most_s)
    scene.disk.free()
    return 0


# -- the run folder -------------------------------------------------------------------------------------------------------


def _commit_lost(scene: Scene) -> int:
    """While the driver runs, which then has to stop at its end, or of a run that it has finished."""
    if scene.chance.random() < 0.5:
        scene.last(150.0, 150.0)
    scene.watcher.lose_commit(scene.chance)
    return 0


def _folder_copied_and_moved(scene: Scene) -> int:
    """The driver is killed, its folder copied, and the copy put in its place: the next driver goes on there."""
    kills = driver_killed(scene)
    if left := scene.cluster.stages_left():  # what they are at is theirs until they are gone
        scene.problems.append(f"stages outlived their driver: {left}")
    run = Path(scene.driver.output)
    copied, moved = run.with_name(f"{run.name}-copied"), run.with_name(f"{run.name}-moved")
    shutil.copytree(run, copied)
    with scene.watcher.waiting():
        run.rename(moved)
        copied.rename(run)
    shutil.rmtree(moved)
    return kills


# -- the store ------------------------------------------------------------------------------------------------------------


def _server_restarted(scene: Scene) -> int:
    assert scene.server
    scene.server.stop()
    scene.server.start()
    return 0


def _server_gone(scene: Scene) -> int:
    assert scene.server
    scene.server.stop()
    scene.last(30.0, 30.0)
    scene.server.start()
    return 0


def _server_503(scene: Scene) -> int:
    return _every_request(scene, "503")


def _server_slow(scene: Scene) -> int:
    return _every_request(scene, "slow")


def _token_expired(scene: Scene) -> int:
    return _every_request(scene, "expired")


def _every_request(scene: Scene, fault: str) -> int:
    assert scene.server
    scene.server.proxy.lasting = fault
    scene.last(2.0, 20.0)
    scene.server.proxy.lasting = None
    return 0


def _key_revoked(scene: Scene) -> int:
    assert scene.server
    scene.server.revoke_key()
    scene.last(2.0, 20.0)
    scene.server.restore_key()
    return 0


FAULTS = (
    Fault("SIGKILL of a stage", stage_killed, 6),
    Fault("SIGKILL of all stages at once", all_stages_killed, 6),
    Fault("SIGKILL of a stage and of its successor", newcomer_killed, 4),
    Fault("SIGKILL of stage after stage for 25 s", crash_loop, 2),
    Fault("SIGKILL of a stage in the middle of a put", killed_in_put, 5),
    Fault("SIGKILL of a whole node", node_killed, 2),
    Fault("SIGKILL of the driver", driver_killed, 4),
    Fault("SIGSTOP of the driver, outlived by a second one that gets Ctrl-C", driver_outlived, 1),
    Fault("SIGSTOP of a stage", stage_hung, 1, "local"),
    Fault("weights replaced, a stage killed", weights_replaced, 1, "local"),
    Fault("job stopped", job_stopped, 2),
    Fault("a commit lost", _commit_lost, 2),
    Fault("the folder copied and moved", _folder_copied_and_moved, 1, "local"),
    Fault("disk full, up to 3 s", _disk_full_briefly, 1, "small disk"),
    Fault("disk full, up to 30 s", _disk_full_long, 1, "small disk"),
    Fault("S3 server restarted", _server_restarted, 1, "s3"),
    Fault("S3 server gone for 30 s", _server_gone, 1, "s3"),
    Fault("S3 server answers 503", _server_503, 1, "s3"),
    Fault("S3 server slow", _server_slow, 1, "s3"),
    Fault("S3 token expired", _token_expired, 1, "s3"),
    Fault("S3 key revoked", _key_revoked, 1, "s3"),
)
