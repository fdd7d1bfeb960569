"""Leaving a run before its end, and the early end of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Departure:
    """Whether this worker leaves before the run's end, or the run ends before its last planned round."""

    #: Whether this worker is to leave after the current micro-batch.
    requested: bool = False
    #: Whether this worker has stopped training because it leaves.
    early: bool = False
    #: The run ends after so many updates, as a script has asked for; None if none has.
    ends_after: int | None = None

    def run_ends(self, updates: int) -> None:
        """Take the coordinator's word for after how many updates the run ends; -1: it says nothing."""
        if updates >= 0:
            self.ends_after = updates

    def is_end(self, updates: int) -> bool:
        """Return whether a script has asked for the run's end, and the run ends after at most so many updates."""
        return self.ends_after is not None and updates >= self.ends_after
