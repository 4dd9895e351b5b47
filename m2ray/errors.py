"""The errors a user sees: what went wrong, with which value, and what to do about it.

Every class takes the same values, so that an instance survives pickling between Ray processes unchanged.
"""

import difflib
from collections.abc import Iterable, Sequence

_LONGEST = 4000
_SHOWN_DETAILS = 30


def shown(text: str) -> str:
    """A text as one line for terminals and logs: what is not printable (control characters, line ends, marks that turn the direction of
    writing, lone surrogates) as Python's escapes, and what is far too long without its middle.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... ({len(text):,} characters) ... {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def in_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in words, as the option `layers` takes them: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question whether a misspelt word was to be the one of the known words that is most like it; "" where none is. Ends with a space."""
    by_folded = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(word.casefold(), by_folded, 1)
    return f"Did you mean {by_folded[close[0]]!r}? " if close else ""


class M2rayError(Exception):
    """Something the user can act on. Whatever its words hold of text from outside, it is shown without control characters.

    Args:
        what: what went wrong, with the offending value.
        remedy: what to do about it; may be empty where `what` says it all.
        details: what belongs below `what`, each on a line of its own; many are cut.

    Attributes:
        what, remedy: as they are shown: `what` with its details, one line else.
    """

    def __init__(self, what: str, remedy: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(what, remedy, tuple(details))
        lines = list(details[:_SHOWN_DETAILS])
        if len(details) > _SHOWN_DETAILS:
            lines.append(f"and {len(details) - _SHOWN_DETAILS:,} lines more")
        self.what = "\n  ".join(map(shown, [what, *lines]))
        self.remedy = shown(remedy)

    def __str__(self) -> str:
        return f"{self.what}{chr(10) if chr(10) in self.what else ' '}{self.remedy}".rstrip()


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


class TooLargeError(M2rayError):
    """A request to a warm chain asks for more than one answer may hold."""


class BusyError(M2rayError):
    """A warm chain has as many requests as it takes at one time."""


class MissingPackageError(M2rayError):
    """A package is not installed that an extra of m2ray brings."""


class StageError(M2rayError):
    """A stage died, hung or failed in the middle of a shard."""


class StageMemoryError(StageError):
    """A micro-batch found no room beside a stage's weights. Takes its size besides the two strings: B sequences of T tokens.

    `in_wave`: it was in a wave with others, and the stage takes smaller ones from here on.
    """

    def __init__(self, what: str, remedy: str, num_sequences: int, length: int, in_wave: bool = False) -> None:  # noqa: FBT001, FBT002 - pickled by position
        super().__init__(what, remedy)
        self.args = (what, remedy, num_sequences, length, in_wave)
        self.in_wave = in_wave
        self.num_sequences = num_sequences
        self.length = length


def raise_all(problems: Sequence[M2rayError]) -> None:
    """Raise nothing for no problem, the problem itself for one, and one error that lists all for several; what several say alike is one."""
    if not problems:
        return
    problems = list({str(problem): problem for problem in problems}.values())
    if len(problems) == 1:
        raise problems[0]
    kinds = {type(problem) for problem in problems}
    kind = kinds.pop() if len(kinds) == 1 else M2rayError
    lines = [line for number, problem in enumerate(problems, 1) for line in f"{number}. {problem}".split("\n")]
    raise kind(f"{len(problems)} problems were found:", "", lines)
