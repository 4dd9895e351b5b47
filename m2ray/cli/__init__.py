"""The `m2ray` command. Each subcommand has its own file, imported only when it is called."""

import errno
import importlib
import sys
import traceback
from typing import Any

import click

from m2ray import __version__
from m2ray.cli.output import between_words, escaped_output, say
from m2ray.errors import M2rayError, did_you_mean, shown
from m2ray.extras import naming_extras

_COMMANDS = ("plan", "bench", "extract", "submit", "serve", "chains", "inspect", "report", "verify", "export", "doctor")

_CTRL_C = 130
"""The exit code of what Ctrl-C ended, as shells have it."""


class Command(click.Command):
    """A subcommand whose m2ray errors end as one paragraph and exit code 1, or as a trace with --debug.

    Args:
        kept: what is said beside "Stopped by Ctrl-C.", where the interrupt itself says nothing else.
    """

    def __init__(self, *args: Any, kept: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept = kept
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, callback=_remember_debug, help="Show the trace of an error.")
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with naming_extras():
                return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            click.echo(err=True)  # behind the "^C" of a terminal
            say(f"Stopped by Ctrl-C. {stopped.args[0] if stopped.args else self._kept}".strip(), err=True)
            ctx.exit(_CTRL_C)
        except M2rayError as error:
            self._fail(ctx, str(error))
        except OSError as error:
            if error.errno == errno.EPIPE or error.errno is None:  # click ends quietly where nobody reads on
                raise
            at = f": {error.filename}" if error.filename else ""
            self._fail(ctx, shown(f"{error.strerror}{at}. {self._kept}".rstrip()))

    def _fail(self, ctx: click.Context, text: str) -> None:
        if ctx.meta.get("m2ray.debug"):
            traceback.print_exc()
        click.echo(between_words(f"Error: {text}", sys.stderr), err=True)  # m2ray's own line ends alone
        ctx.exit(1)


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["m2ray.debug"] = True


class _Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        with escaped_output():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # while a command's file is imported
            say("Stopped by Ctrl-C.", err=True)
            ctx.exit(_CTRL_C)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            meant = did_you_mean(name, _COMMANDS).rstrip() or f"The commands are {', '.join(_COMMANDS)}."
            ctx.fail(f"There is no command {shown(name)!r}. {meant}")
        return super().resolve_command(ctx, args)

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
