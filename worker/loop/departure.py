"""Leaving a run before its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Departure:
    """Whether this worker leaves before the run's end."""

    #: Whether this worker is to leave after the current micro-batch.
    requested: bool = False
    #: Whether this worker has stopped training because it leaves.
    early: bool = False
