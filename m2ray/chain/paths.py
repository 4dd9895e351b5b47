"""Paths that are not there are told at once: whatever looks closer imports torch and transformers, which takes seconds."""

from pathlib import Path

from m2ray.config import ExtractConfig
from m2ray.errors import CheckpointError, M2rayError, PromptsError, raise_all


def require_paths(config: ExtractConfig) -> None:
    """Look whether the paths of model and prompts lead somewhere. URLs, patterns and what may be a name on a hub are looked at later (checking.py).

    Raises:
        CheckpointError, PromptsError: a path leads nowhere; both problems at once.
    """
    problems: list[M2rayError] = []
    if _is_absent(config.model):
        remedy = "Give the folder of a downloaded checkpoint: config.json and safetensors."
        problems.append(CheckpointError(f"There is no folder {config.model}.", remedy))
    if config.prompts and _is_absent(config.prompts):
        problems.append(
            PromptsError(f"The prompts {config.prompts} are absent.", "Check the path; every node that runs m2ray's driver must see it.")
        )
    raise_all(problems)


def _is_absent(path: str) -> bool:
    is_path = path.startswith(("/", "./", "../", "~/")) and not any(sign in path for sign in "*?[")
    return is_path and not Path(path).expanduser().exists()
