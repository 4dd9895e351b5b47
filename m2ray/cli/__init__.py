"""The `m2ray` command. Each subcommand has its own file, imported only when it is called."""

import importlib
import traceback
from typing import Any

import click

from m2ray import __version__
from m2ray.errors import M2rayError

_COMMANDS = ("plan", "bench", "extract", "submit", "inspect", "verify", "doctor")


class Command(click.Command):
    """A subcommand whose m2ray errors end as one paragraph and exit code 1, or as a trace with --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, callback=_remember_debug, help="Show the trace of an error.")
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except M2rayError as error:
            if ctx.meta.get("m2ray.debug"):
                traceback.print_exc()
            click.secho(f"Error: {error}", fg="red", err=True)
            ctx.exit(1)


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["m2ray.debug"] = True


class _Commands(click.Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"m2ray.cli.{name}").command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the trace of an error.")
def main() -> None:
    """Extract per-layer activations of large decoder-only models into Parquet."""
