"""m2ray.extract: an extraction called from Python."""

from os import PathLike
from typing import Unpack

from m2ray.activations.reading.reader import RunReader
from m2ray.api.opening import open_run
from m2ray.api.options import Options, as_written, documented
from m2ray.chain.extract import extract as extract_run
from m2ray.chain.notebook import progress_here
from m2ray.config import ExtractConfig
from m2ray.prompts.in_memory import Prompts, as_file

_KEPT = "Committed shards are kept: the same call goes on."


@documented(ExtractConfig)
def extract(*, model: str | PathLike[str], prompts: Prompts, output: str | PathLike[str], **options: Unpack[Options]) -> RunReader:
    """Extract the activations of every prompt into the run folder `output`, or what is missing of them, and open it.

    The options are those of `m2ray extract`; `layers` may be numbers, `sites` a list or {site: layers}. `prompts` may be a path or URL, or
    in memory: a list of texts, of chats (lists of messages), of token ids or of rows (dicts), a pandas or polars frame, an Arrow table or a
    datasets.Dataset. A run that was cut off goes on with the same call and the same prompts; prompts in memory are compared by their values.

    Joins the cluster that this process is connected to or RAY_ADDRESS names, else starts one on this machine for the time it takes, or runs
    in this process where there is one stage and no GPU. Any thread may call. Ctrl-C leaves a run that can be gone on with.

    Raises:
        M2rayError: all that is wrong with options, model, prompts' columns or output at once, before Ray is started; later what fails there.
        KeyboardInterrupt: it was Ctrl-C.
    """
    with as_file(prompts) as source, progress_here() as progress:
        config = ExtractConfig.validated(as_written({"model": model, "prompts": source, "output": output, **options}))
        try:
            extract_run(config, progress)
        except KeyboardInterrupt as stopped:
            progress.say(f"Stopped by Ctrl-C. {str(stopped.args[0]).replace('command', 'call') if stopped.args else _KEPT}")
            raise
    return open_run(config.output)
