"""`m2ray submit`: hand an extraction to a Ray cluster as a job, follow its log, return its exit code."""

import asyncio
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click

from m2ray.cli import Command
from m2ray.cli.extract import config_options, read_config, require_absolute
from m2ray.cli.output import say
from m2ray.errors import ClusterError, ConfigError

_ENTRYPOINT = Path("jobs/extract.py")
_CTRL_C = 130


@click.command(cls=Command)
@config_options
@click.option(
    "--address", envvar="RAY_API_SERVER_ADDRESS", default="http://127.0.0.1:8265", show_default=True, help="The cluster's dashboard."
)
@click.option(
    "--working-dir", type=click.Path(path_type=Path), default=Path(), help="Folder that travels to the cluster; holds jobs/extract.py."
)
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is accepted.")
def command(toml_path: Path | None, address: str, working_dir: Path, no_wait: bool, **flags: Any) -> None:
    """Submit `m2ray extract` with the same options as a job of a Ray cluster.

    Follows the job's log and returns its exit code. Ctrl-C asks whether to stop the job or to leave it running.
    """
    if not (working_dir / _ENTRYPOINT).is_file():
        raise ConfigError(f"{working_dir.resolve()} has no {_ENTRYPOINT}.", "Give a checkout of m2ray as --working-dir.")
    given = {name: value for name, value in flags.items() if value is not None}
    local_toml = working_dir / toml_path if toml_path else None
    require_absolute(read_config(local_toml, given))
    words = ["python", str(_ENTRYPOINT), *([str(toml_path)] if toml_path else [])]
    words += [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))]
    client = _client(address)
    job_id: str = client.submit_job(entrypoint=shlex.join(words), runtime_env={"working_dir": str(working_dir.resolve())})
    say(f"Job {job_id} was submitted to {address}.")
    if no_wait:
        return
    try:
        sys.exit(_follow(client, job_id))
    except (KeyboardInterrupt, click.Abort):  # Ctrl-C at the question, or once more
        sys.exit(_runs_on(job_id))


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address, headers=_token_header())
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"No Ray dashboard answers at {address}: {error}", "Check --address and the token.") from error


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
