"""The outcome of a run that was harmed, the promised bounds, and its line of the table."""

from __future__ import annotations

from dataclasses import dataclass

HEADS = (
    "fault",
    "finished",
    "same bits",
    "each sample once",
    "in bounds",
    "noticed after s",
    "longest pause s",
    "rounds again",
    "micro-batches again",
)


@dataclass(frozen=True)
class Bounds:
    """The promised seconds: until a dead process is noticed (None: none dies), and of the longest pause."""

    noticed_s: float | None
    pause_s: float

    def broken(self, outcome: Outcome) -> str:
        """Return which promise is broken, in the table's numbers, or ''."""
        noticed, pause = outcome.noticed_s, round(outcome.pause_s, 1)
        if self.noticed_s is not None and noticed is not None and round(noticed, 1) > self.noticed_s:
            return f"noticed after {noticed:.1f} s, {self.noticed_s:.0f} are promised"
        return f"a pause of {pause:.1f} s, {self.pause_s:.0f} are promised" if pause > self.pause_s else ""


#: A process dies on this machine. Training goes on 5 s after that is noticed.
DEAD = Bounds(3.0, 8.0)
#: A server is stopped, which looks like a slow one.
SILENT = Bounds(15.0, 20.0)
#: A server is stopped that no launcher restarts, and is woken later.
WOKEN = Bounds(15.0, 23.0)
#: No process dies, and the run is started again as soon as it has ended.
STOPPED = Bounds(None, 8.0)
#: A link is cut.
CUT = Bounds(None, 20.0)
#: Nothing is harmed.
UNHARMED = Bounds(None, 5.0)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run."""

    #: Why the run did not finish, or ''.
    problem: str = ""
    #: Whether the weights are those of an undisturbed run.
    same: bool = False
    #: Whether each micro-batch is in exactly one committed contribution.
    exact: bool = False
    #: Seconds until the first event that tells of the fault. None without such an event.
    noticed_s: float | None = None
    #: The longest seconds without a committed round.
    pause_s: float = 0.0
    #: Rounds that were rolled back.
    rounds: int = 0
    #: Micro-batches that were recomputed.
    recomputed: int = 0

    @property
    def holds(self) -> bool:
        return not self.problem and self.same and self.exact


def line(name: str, outcome: Outcome, is_inexact: bool = False, bounds: Bounds | None = DEAD) -> str:
    """Return a row of the table."""
    noticed = "" if outcome.noticed_s is None else f"{outcome.noticed_s:.1f}"
    if outcome.problem:
        return f"| {name} | **no**: {outcome.problem.replace('|', '/')} | | | | | | | |"
    finished, same, exact = ("yes" if good else "**no**" for good in (True, outcome.same, outcome.exact))
    cells = (
        name,
        finished,
        "n/a" if is_inexact else same,
        exact,
        "n/a" if bounds is None else f"**no**: {broken}" if (broken := bounds.broken(outcome)) else "yes",
        noticed,
        f"{outcome.pause_s:.1f}",
        outcome.rounds,
        outcome.recomputed,
    )
    return f"| {' | '.join(map(str, cells))} |"
