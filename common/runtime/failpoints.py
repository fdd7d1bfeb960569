"""Points in the code at which a test or benchmark makes a process fail. Faults are declared by process, phase and round.

PS_FAILPOINTS="server-1:applying:12:kill;worker-0:pushed:20:stop" ends server-1 as kill -9 does, when it first comes to the point
`applying` in round 12 or later. It stops worker-0 as SIGSTOP does, at `pushed` in round 20 or later. `sleep` sleeps for
`SLEEP_S`, and `raise` raises a RuntimeError. Each fault happens once in a run directory, to the process that has the name then. A
point that is not armed costs a call and a look at a list.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from roundtable.common.runtime.errors import UsageError

VARIABLE = "PS_FAILPOINTS"
#: For each fault that has happened, a run directory has an empty file whose name ends in the fault's number.
MARK = "failpoint-"
#: Each point, and its place in the process.
POINTS: Mapping[str, str] = {
    "computing": "worker: a gradient is made, and no server has it",
    "pushing": "worker: the first message of a contribution is sent, others are not",
    "pushed": "worker: a contribution is sent, no acknowledgement is read",
    "evaluating": "worker: it has a batch of an evaluation, and the coordinator has no result",
    "receiving": "worker: the first weights of a round have come",
    "aggregating": "server: a contribution has come, and is not applied or acknowledged",
    "applying": "server: the first chunk of a round is applied, or of a push where each is at once",
    "applied": "server: a round is applied, or likewise a push, and nobody knows",
    "saving": "server: a part of a checkpoint's file is written",
    "saved": "server: a checkpoint's file is written, and nobody knows",
    "uploading": "server: parts of the trained model are about to be handed in, others are or are not",
    "reported": "coordinator: a server's report is read, not written down",
    "flushed": "coordinator: the event log is written, and nobody knows",
    "cutting": "coordinator: servers have been asked for a checkpoint",
    "completing": "coordinator: all files of a checkpoint are written, its manifest is not",
    "ending": "coordinator: the model is written, the summary is not",
}
_ACTIONS = ("kill", "stop", "sleep", "raise")
#: Seconds before a process fails, in which its messages leave it; and for which `sleep` sleeps.
_LEAVES_S = 0.02
SLEEP_S = 5.0


@dataclass(frozen=True)
class _Fault:
    phase: str
    round: int
    action: str
    mark: Path


_armed: list[_Fault] = []


def arm(process: str, run_dir: Path) -> None:
    """Arm the faults of `process`, which has just learnt its name. Raise UsageError if the variable cannot be read."""
    _armed.clear()
    for number, text in enumerate(filter(None, os.environ.get(VARIABLE, "").split(";"))):
        name, _, rest = text.partition(":")
        phase, _, rest = rest.partition(":")
        round_, _, action = rest.partition(":")
        if phase not in POINTS or not round_.isdecimal() or action not in _ACTIONS:
            raise UsageError(f"{VARIABLE} has '{text}': it must be process:point:round:action, such as worker-0:pushed:12:kill.")
        if name == process:
            _armed.append(_Fault(phase, int(round_), action, run_dir / f"{MARK}{number}"))


def failpoint(phase: str, round_: int) -> None:
    """Fail here if a fault is armed for `phase` in `round_`. Raise RuntimeError if that is how it fails."""
    if _armed:
        _reach(phase, round_)


def _reach(phase: str, round_: int) -> None:
    for fault in [fault for fault in _armed if fault.phase == phase and round_ >= fault.round]:
        _armed.remove(fault)
        try:
            fault.mark.touch(exist_ok=False)
        except OSError:  # it has happened before
            continue
        if fault.action == "raise":
            raise RuntimeError(f"failpoint {phase} in round {round_}")
        time.sleep(_LEAVES_S if fault.action != "sleep" else SLEEP_S)
        if fault.action != "sleep":
            os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
