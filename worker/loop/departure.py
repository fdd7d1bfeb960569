"""Leaving a run before its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Departure:
    """Whether this worker leaves before the run's end."""

    #: Whether it is to leave after the micro-batch that is computed now.
    requested: bool = False
    #: Whether it has stopped training for that.
    early: bool = False
