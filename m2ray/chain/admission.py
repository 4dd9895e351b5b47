"""Admission: the jobs that want a warm chain get it one after another, in the order in which they came. Pure: who lives is told."""

from collections.abc import Collection
from typing import NamedTuple


class Visitor(NamedTuple):
    """One job: a name that no other has, Ray's id of its driver, and what it is, in words."""

    ticket: str
    driver: str
    what: str


class Admission:
    """Who has the chain, and who waits for it. The caller holds a lock."""

    def __init__(self) -> None:
        self._line: list[Visitor] = []
        self._coming: list[Visitor] = []

    @property
    def admitted(self) -> Visitor | None:
        """The job that has the chain."""
        return self._line[0] if self._line else None

    @property
    def waiting(self) -> int:
        """Jobs behind it."""
        return max(0, len(self._line) - 1)

    @property
    def is_expected(self) -> bool:
        """Whether there is a job that has the chain, waits for it, or is still looked at."""
        return bool(self._line or self._coming)

    def expect(self, visitor: Visitor) -> None:
        """A job that is still looked at: it has no place in the line."""
        self._coming.append(visitor)

    def ask(self, visitor: Visitor) -> Visitor | None:
        """Take a place in the line, unless it has one. Returns who has the chain meanwhile; None once it is this one's."""
        if visitor not in self._line:
            self._line.append(visitor)
        return None if self._line[0] == visitor else self._line[0]

    def leave(self, ticket: str) -> bool:
        """Give up the chain, or the place in the line, or come no more. Returns whether the job had the chain."""
        had_it = bool(self._line) and self._line[0].ticket == ticket
        self._line, self._coming = ([visitor for visitor in line if visitor.ticket != ticket] for line in (self._line, self._coming))
        return had_it

    def forget(self, dead: Collection[str]) -> bool:
        """Give up the places of drivers that are gone. Returns whether one of them had the chain."""
        had_it = bool(self._line) and self._line[0].driver in dead
        self._line, self._coming = ([visitor for visitor in line if visitor.driver not in dead] for line in (self._line, self._coming))
        return had_it
