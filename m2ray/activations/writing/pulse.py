"""Pulse: whether the driver of a run lives, as somebody sees it who looks at the run's lease from any machine."""

import time
from collections.abc import Sequence
from typing import Literal

from m2ray.activations.writing.holder import KILLED, Holder
from m2ray.activations.writing.lease import read_lease
from m2ray.storage import Store

Life = Literal["none", "alive", "unsure", "silent", "dead"]
"""No driver; one that gives signs; one whose next sign is still waited for; one that gave none for too long; one that surely is no more."""

_LISTINGS = 3
_LOOK_S = 0.5
_MORE_S = 1.5
"""What a sign may be late: a slow store, a busy machine."""


class Pulse:
    """Looks at a lease again and again, by its own clock alone. `holder` is whose it was at the last look, and `life` what that told."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: tuple[int, Holder] | None = None
        self._changed_at = 0.0
        self._has_beaten = False
        self.life: Life = "none"

    @property
    def holder(self) -> Holder | None:
        return self._found[1] if self._found else None

    def look(self) -> Life:
        """Look once. Raises StoreError."""
        # A listing that goes on while one number follows another may show neither.
        found = next((lease for _ in range(_LISTINGS) if (lease := read_lease(self._store))), None)
        now = time.monotonic()
        if found != self._found:
            self._has_beaten = self._found is not None and found is not None
            self._found, self._changed_at = found, now
        self.life = self._judged(now - self._changed_at)
        return self.life

    def _judged(self, quiet_s: float) -> Life:
        holder = self.holder
        if holder is None:
            return "none"
        if holder.is_dead:
            return "dead"
        if quiet_s >= holder.patience_s:
            return "silent"
        return "alive" if self._has_beaten or holder.is_here else "unsure"

    @property
    def is_at_work(self) -> bool:
        """Whether a driver may be at the run: the same command would be refused, or wait."""
        return self.life in ("alive", "unsure")

    def in_words(self) -> str:
        """What is to be known of the driver of a run that is not complete."""
        return {
            "none": "no driver is at it: run the same command again to finish it",
            "alive": f"a driver is at it ({self.holder})",
            "unsure": f"a driver was at it a moment ago and has given no sign since ({self.holder}); --watch tells whether it lives",
            "silent": f"its driver has given no sign for too long ({self.holder}): run the same command again, which takes the run over",
            "dead": f"its last driver {KILLED} ({self.holder}); run the same command again",
        }[self.life]


def settle(pulses: Sequence[Pulse]) -> None:
    """Look at all, and again until each is sure, as long as a sign may take: some seconds, and only for drivers of other machines."""
    deadline = time.monotonic() + _MORE_S + max((_period_s(pulse) for pulse in pulses if pulse.look() == "unsure"), default=-_MORE_S)
    while time.monotonic() < deadline and any(pulse.look() == "unsure" for pulse in pulses):
        time.sleep(_LOOK_S)


def _period_s(pulse: Pulse) -> float:
    return pulse.holder.patience_s / 4 if pulse.holder else 0.0
