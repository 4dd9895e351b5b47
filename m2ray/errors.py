"""The errors a user sees: what went wrong, with which value, and what to do about it.

Every class takes the same two strings, so that an instance survives pickling between Ray processes unchanged.
"""

from collections.abc import Sequence


class M2rayError(Exception):
    """Something the user can act on.

    Args:
        what: what went wrong, with the offending value.
        remedy: what to do about it; may be empty where `what` says it all.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}".rstrip()


class ConfigError(M2rayError):
    """An option is unknown, malformed or contradicts another."""


class CheckpointError(M2rayError):
    """The model folder is absent, incomplete, damaged or of a family that m2ray does not run."""


class PromptsError(M2rayError):
    """The prompt source cannot be read, or holds no usable prompt."""


class StoreError(M2rayError):
    """A disk or an object store refused an operation."""


class AlreadyExistsError(StoreError):
    """A create-if-absent found the key taken."""


class RunConflictError(M2rayError):
    """The output folder belongs to another job or to other options."""


class RunDamagedError(M2rayError):
    """A file of a run differs from what its commit says."""


class NotInRunError(M2rayError):
    """A layer, site, sequence or row that was asked for is not in the run: unknown, quarantined, or not committed yet."""


class ClusterError(M2rayError):
    """The Ray cluster cannot be reached or has no room for the stages."""


class StageError(M2rayError):
    """A stage died, hung or failed in the middle of a shard."""


class StageMemoryError(StageError):
    """A micro-batch found no room beside a stage's weights. Takes its size besides the two strings: B sequences of T tokens."""

    def __init__(self, what: str, remedy: str, num_sequences: int, length: int) -> None:
        super().__init__(what, remedy)
        self.args = (what, remedy, num_sequences, length)
        self.num_sequences = num_sequences
        self.length = length


def raise_all(problems: Sequence[M2rayError]) -> None:
    """Raise nothing for no problem, the problem itself for one, and one error that lists all for several."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    kinds = {type(problem) for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else M2rayError
    listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
    raise kind(f"{len(problems)} problems were found:{listed}")
