"""`m2ray submit`: hand an extraction to a Ray cluster as a job, follow its log, return its exit code."""

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import m2ray
from m2ray.cli import Command
from m2ray.cli.extract import config_options, read_config, require_absolute
from m2ray.cli.output import say
from m2ray.config import ExtractConfig
from m2ray.errors import ClusterError, shown

_CTRL_C = 130
_LOCAL = "http://127.0.0.1:8265"
_CHECK = "Check --address: where `ray start --head` says that the dashboard is, such as http://HEAD:8265."


@click.command(cls=Command)
@config_options
@click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    help=f"The cluster's dashboard, or its head as Ray names it (HEAD:6379); default: RAY_ADDRESS, else {_LOCAL}.",
)
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder that travels to the cluster too, where relative prompts lie; default: none.",
)
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is accepted.")
def command(toml_path: Path | None, address: str | None, working_dir: Path | None, no_wait: bool, **flags: Any) -> None:
    """Submit `m2ray extract` with the same options as a job of a Ray cluster, with this m2ray: the cluster has to have what it needs alone.

    Follows the job's log and returns its exit code. Ctrl-C asks whether to stop the job or to leave it running.
    """
    config = read_config(toml_path, flags)
    require_absolute(config, *(() if working_dir else ("prompts", "chat_template")))
    address = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    with _told_in_short(address, _CHECK):
        client = _client(address)
        job_id: str = client.submit_job(entrypoint=_entrypoint(config), runtime_env=_runtime_env(working_dir))
    say(f"Job {job_id} was submitted to {address}.")
    if no_wait:
        return
    try:
        with _told_in_short(address, f"Job {job_id} runs on, if the cluster does. Its log: ray job logs --follow {job_id}"):
            sys.exit(_follow(client, job_id))
    except (KeyboardInterrupt, click.Abort):  # Ctrl-C at the question, or once more
        sys.exit(_runs_on(job_id))


def _entrypoint(config: ExtractConfig) -> str:
    """The job's command: every option that was given, from the file or by its flag, as a flag. -P: no m2ray of the folder where it starts."""
    words = ["python", "-P", "-m", "m2ray.cli", "extract", "--in-job"]
    for name, value in config.model_dump(mode="json", exclude_unset=True).items():
        flag = f"--{name.replace('_', '-')}"
        if ExtractConfig.model_fields[name].annotation is bool:
            words += [flag] if value else []
        else:
            words.append(f"{flag}={value if isinstance(value, str) else json.dumps(value)}")
    return shlex.join(words)


def _runtime_env(working_dir: Path | None) -> dict[str, Any]:
    """What travels: this very package, and the folder that was named."""
    brought = {"py_modules": [str(Path(m2ray.__file__).parent)], "excludes": ["__pycache__"]}
    return brought | ({"working_dir": str(working_dir.resolve())} if working_dir else {})


def _client(address: str) -> Any:
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else Ray takes RAY_ADDRESS, whatever it is told here
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # which packages it makes and uploads
    return JobSubmissionClient(address, headers=_token_header())


@contextmanager
def _told_in_short(address: str, remedy: str) -> Iterator[None]:
    """A dashboard that cannot be reached, or refuses, as one paragraph.

    Raises:
        ClusterError: with `remedy`, or, where a token is missing or wrong, with how one is given.
    """
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        given = "does not take the token that it was given" if os.environ.get("RAY_AUTH_TOKEN") else "asks for a token"
        raise ClusterError(
            f"The Ray dashboard at {address} {given}.",
            "Set RAY_AUTH_MODE=token, which takes the token of ~/.ray/auth_token; if the cluster's is another, RAY_AUTH_TOKEN to it or RAY_AUTH_TOKEN_PATH "
            "to the file that holds it.",
        ) from error
    except (click.Abort, BrokenPipeError):  # Ctrl-C, and nobody who reads what is printed: RuntimeError and OSError of another kind
        raise
    except (ClientError, OSError, RayError, RuntimeError, ValueError) as error:  # requests' own errors are OSErrors
        why = shown(next(iter(str(error).splitlines()), type(error).__name__)).rstrip(".")
        raise ClusterError(f"The Ray dashboard at {address} cannot be used: {why}.", remedy) from error


def _token_header() -> dict[str, str]:
    """Nothing unless a token is in the environment: Ray's client finds the token file by itself."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _follow(client: Any, job_id: str) -> int:
    """Print the log until the job ends. Returns the driver's exit code, or 130 if it was left running."""
    while True:
        try:
            asyncio.run(_print_log(client, job_id))
            break
        except KeyboardInterrupt:
            if click.confirm(f"\nStop job {job_id}? Finished shards are kept either way.", default=False, err=True):
                client.stop_job(job_id)
                continue
            return _runs_on(job_id)
    info = client.get_job_info(job_id)
    say(f"Job {job_id}: {str(info.status).lower()}.")
    if str(info.status) == "SUCCEEDED":
        return 0
    return _why_it_failed(info.driver_exit_code, info.message or "")


def _runs_on(job_id: str) -> int:
    click.echo(err=True)
    say(f"Job {job_id} runs on. Its log: ray job logs --follow {job_id}; to stop it: ray job stop {job_id}", err=True)
    return _CTRL_C


def _why_it_failed(exit_code: int | None, message: str) -> int:
    """Say what a driver could not say itself. Returns the exit code as a shell has it."""
    ended_by = _signal_of(exit_code)
    if exit_code is None or ended_by:
        killed = f"was ended by {ended_by.name}" if ended_by else "is gone"
        why = "" if ended_by else f" ({(message.splitlines() or ['Ray does not say why'])[0]})"
        say(
            f"Its driver {killed}{why}: most often a node ran out of memory. Committed shards are kept: submit the same command again.",
            err=True,
        )
    return 1 if exit_code is None else exit_code if exit_code > 0 else 128 - exit_code


def _signal_of(exit_code: int | None) -> signal.Signals | None:
    """What a driver was ended by: Ray itself says so by a negative exit code, the shell around the driver by 128 and more. 130 is the driver's own."""
    number = -exit_code if exit_code is not None and exit_code < 0 else (exit_code or 0) - 128
    return signal.Signals(number) if number in set(signal.Signals) and exit_code != _CTRL_C else None


async def _print_log(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        click.echo(lines, nl=False)
