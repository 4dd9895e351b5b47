"""`m2ray serve`: keep a loaded chain in the cluster of RAY_ADDRESS, or end one."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import AfterValidator, Field

from m2ray.cli import Command
from m2ray.cli.extract import metavar
from m2ray.cli.output import say, terminal
from m2ray.config import ExtractConfig
from m2ray.option_types import NonEmpty, Number, Seconds

_CONNECT_S = 30.0


def _route(text: str) -> str:
    """Raises ValueError for what Ray Serve takes for no route."""
    if not re.fullmatch(r"/([^{}]*[^{}/])?", text):
        raise ValueError("a path such as /m2: with / before it, none behind it, and no braces")
    return text


class ServeConfig(ExtractConfig):
    """The options of an extraction, so that its TOML file can be served; prompts and output may be left out."""

    prompts: NonEmpty | None = Field(None, description="Not used: a job on the chain names its own.")  # type: ignore[assignment]
    output: NonEmpty | None = Field(None, description="Not used: a job on the chain names its own.")  # type: ignore[assignment]
    name: NonEmpty | None = Field(None, description="The chain's name in the cluster; default: that of the model's folder.")
    idle_timeout_s: Seconds | None = Field(
        None, description="Seconds without a job or a request after which the chain ends; default: never."
    )
    http_port: Annotated[int, Field(gt=0, le=65535), Number] | None = Field(
        None, description="Answer requests over HTTP too, by Ray Serve, with the token of M2RAY_SERVE_TOKEN; default: not."
    )
    http_host: NonEmpty = Field("127.0.0.1", description="Where HTTP is listened for.")
    http_route: Annotated[NonEmpty, AfterValidator(_route)] = Field(
        "/", description="What stands before /v1/activations, where several chains are served."
    )


def _serve_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """[CONFIG.toml], and a flag an option."""
    for name, field in reversed(ServeConfig.model_fields.items()):
        shape: dict[str, Any] = {"is_flag": True, "default": None} if field.annotation is bool else {"metavar": metavar(field)}
        function = click.option(f"--{name.replace('_', '-')}", name, help=field.description, **shape)(function)
    return click.argument("toml_path", metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path))(function)


@click.command(cls=Command)
@_serve_options
@click.option("--stop", metavar="NAME", help="End the chain of this name instead.")
def command(toml_path: Path | None, stop: str | None, **flags: Any) -> None:
    """Load a chain that stays in the cluster, for one job after another and for requests.

    The options are those of `m2ray extract`, from CONFIG.toml or flags, and some more. Returns once the chain can be used:
    `m2ray extract --chain NAME`, `m2ray.connect(NAME)`. `m2ray chains` lists all; `m2ray serve --stop NAME` ends one.
    """
    if stop is not None:
        _stop(stop)
        return
    config = ServeConfig.from_sources(toml_path, {name: value for name, value in flags.items() if value is not None})
    from m2ray.chain.joining import require_cluster
    from m2ray.chain.progress import Progress

    require_cluster()
    from m2ray.chain.serving import serve

    http = (config.http_host, config.http_port, config.http_route) if config.http_port else None
    name = config.name or config.model.rstrip("/").rpartition("/")[2].partition("@")[0]
    with Progress(terminal()) as progress:
        serve(config, name, progress, idle_timeout_s=config.idle_timeout_s, http=http)


def _stop(name: str) -> None:
    from m2ray.chain.joining import cluster, require_cluster

    require_cluster()  # said before torch is imported
    from m2ray.chain.serving import stop

    with cluster(_CONNECT_S):
        say(stop(name))
