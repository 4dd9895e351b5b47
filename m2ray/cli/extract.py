"""`m2ray extract`: run an extraction on the cluster that RAY_ADDRESS names, or on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from m2ray.cli import Command
from m2ray.cli.output import terminal
from m2ray.config import ExtractConfig
from m2ray.errors import ConfigError, raise_all
from m2ray.option_types import legal_values


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add CONFIG.toml and one flag an option of ExtractConfig; the flags that were given lie over the file."""
    for name, field in reversed(ExtractConfig.model_fields.items()):
        default = "" if field.default in (PydanticUndefined, None) else f"  [default: {field.default}]"
        flag: dict[str, Any] = {"flag_value": True, "is_flag": True, "default": None}
        shape = flag if field.annotation is bool else {"metavar": metavar(field)}
        option = click.option(f"--{name.replace('_', '-')}", name, help=f"{field.description}{default}", **shape)
        function = option(function)
    return click.argument("toml_path", metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path))(function)


def metavar(field: FieldInfo) -> str:
    """What stands behind an option in --help: all that it may be."""
    return "|".join(legal_values(field.annotation))


def read_config(toml_path: Path | None, flags: dict[str, Any]) -> ExtractConfig:
    """The configuration from the command line. Raises ConfigError."""
    return ExtractConfig.from_sources(toml_path, {name: value for name, value in flags.items() if value is not None})


def require_absolute(config: ExtractConfig, *others: str) -> None:
    """Refuse relative folders in a job: Ray runs it in a copy of the working directory that it deletes later. Names on the hub are none.

    Args:
        config: the job's.
        others: options that are paths too, besides `output`, `model` and `offload_folder`.

    Raises:
        ConfigError: one of these is a relative local path; all at once.
    """
    from m2ray.hub import is_name
    from m2ray.storage import local_folder

    problems = []
    for name in ("output", "model", "offload_folder", *others):
        value = str(getattr(config, name) or "/")
        folder = local_folder(value)
        if folder and not folder.is_absolute() and not (name in ("model", "prompts") and is_name(value)):
            what = f"{name} = {value!r} is relative, and a Ray job runs in a copy of its folder."
            problems.append(ConfigError(what, "Give an absolute path that all nodes see."))
    raise_all(problems)


@click.command(cls=Command, kept="Committed shards are kept: the same command goes on.")
@config_options
@click.option("--in-job", is_flag=True, hidden=True)
def command(toml_path: Path | None, in_job: bool, **flags: Any) -> None:
    """Extract the activations of every prompt into a run folder, or finish a run that was cut off.

    The options come from CONFIG.toml, from flags of the same names, or from both; flags win. Joins the cluster that
    RAY_ADDRESS names, else starts one on this machine for the time it takes; one stage without a GPU runs in this process. The same command
    again does what is missing.
    """
    config = read_config(toml_path, flags)
    if in_job:
        require_absolute(config)
    from m2ray.chain.paths import require_paths
    from m2ray.chain.progress import Progress
    from m2ray.model.interpreter import quick_imports

    require_paths(config)
    with Progress(terminal()) as progress:
        progress.waiting("start", "importing torch and transformers")
        try:
            with quick_imports():
                from m2ray.chain.extract import extract
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Nothing was written by now: run the same command again.") from None

        extract(config, progress)
