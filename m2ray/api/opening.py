"""m2ray.open_run: a run opened for people, whose token ids can be shown as words where the tokenizer is at hand."""

from pathlib import Path
from typing import TYPE_CHECKING

from m2ray.activations.job import JobRecord
from m2ray.activations.reading.part_reader import Check
from m2ray.activations.reading.reader import RunReader
from m2ray.activations.reading.reader import open_run as open_reader
from m2ray.errors import NotInRunError
from m2ray.extras import naming_extras
from m2ray.hub import folder_of

if TYPE_CHECKING:
    from m2ray.prompts import PromptTokenizer

_ANY_VOCABULARY = 2**31
"""Token ids are read here and none are made, so the embedding's size does not matter, nor whether the weights are there."""


def open_run(path: str | Path, *, check: Check = "pages") -> RunReader:
    """Open a run folder, finished or not. What is committed later is seen by opening it again.

    Every file is checked when it is read: one that is not what was written is refused by name. With `check="none"` the rows and tokens
    themselves are not: random rows of a local run come up to twice as fast. Runs of format 1 have nothing to hold rows against.

    Raises:
        ConfigError: `check` is neither "pages" nor "none".
        StoreError: there is no run at `path`, or it cannot be read.
        RunDamagedError: its records cannot be understood.
        RunConflictError: a newer m2ray wrote it.
    """
    return open_reader(path, check=check, open_tokenizer=run_tokenizer)


@naming_extras()
def run_tokenizer(job: JobRecord, model: str | None) -> "PromptTokenizer":
    """The tokenizer of a run, from the folder `model` or from where the run's model was.

    Raises:
        NotInRunError: the run does not say where that was.
        CheckpointError, StoreError: it is not there.
        RunConflictError: it is another one.
        MissingPackageError: transformers is not installed.
    """
    from m2ray.audit.tokens import open_tokenizer

    named = model or job.names.get("model")
    if named is None:
        raise NotInRunError("The run does not say which model's tokenizer made its token ids.", "Give the model's folder as model.")
    return open_tokenizer(job, folder_of(named), _ANY_VOCABULARY)
