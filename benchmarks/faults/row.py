"""A row of the fault matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.faults import spread
from benchmarks.faults.harms.base import Harm
from benchmarks.faults.outcome import DEAD, Bounds
from benchmarks.live import LENGTH, LOOPBACK, TRAINING

SERVERS, WORKERS = 3, 3
HOUR_S = 3600


@dataclass(frozen=True)
class Row:
    """A fault: the flags and environment of its run, and the harm that is done to it."""

    harm: Harm
    flags: Sequence[object] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    #: The result depends on who computes what, so only the ledger is compared.
    is_inexact: bool = False
    on_small_disk: bool = False
    #: All processes are started one by one, and none is restarted.
    by_hand: bool = False
    #: The address of a coordinator that is started by hand.
    bind: str = LOOPBACK
    #: The harm to the network of a run on two hosts.
    network: spread.Change | None = None
    #: How a run on two hosts is laid out.
    scene: spread.Scene = spread.Spread
    #: Seconds that a message takes between the two hosts.
    delay_s: float = 0.0
    #: The promise for this row, if there is one.
    bounds: Bounds | None = DEAD
    #: Kinds of messages that must have been refused (`common/protocol/rejections.py`).
    refused: Collection[str] = ()
    #: The run must fail, so there are no results but its ledger.
    fails: bool = False
    servers: int = SERVERS
    #: The script and its arguments, if it is not the built-in example that trains.
    script: Sequence[object] = ()

    @property
    def training(self) -> Sequence[object]:
        """Return the flags of its run."""
        return (*(LENGTH if self.script else TRAINING), *self.flags)
