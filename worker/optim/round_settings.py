"""The settings of the parameter groups by round, as the script and its schedulers set them.

A script's loop body runs once for each micro-batch, as often as this worker computes one. But an update has one learning rate.
So settings follow the rule of buffers: each micro-batch of a round starts with the settings and schedulers of the round's start.
The changes that a body makes count once. A round's settings are those at `opt.step()`.

A worker may have computed nothing in the round before. Then server 0 tells it the settings of that round (`UsedSettings`), and it
makes the steps that bodies make after `opt.step()`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from roundtable.common.config.batch_plan import Segment
from roundtable.common.protocol.messages.gradients import Schedules, UsedSettings
from roundtable.common.runtime.errors import UsageError, at_script_line, script_line
from roundtable.worker.optim.optimizer import Groups, Hypers, plain
from roundtable.worker.optim.schedulers import Schedulers, State

#: Rounds whose settings are kept. Under `ssp` and `async` a worker may be given work of a round before its own.
_KEPT = 16
_Values = list[dict[str, Any]]


class RoundSettings:
    """The settings of each round.

    Invariants: the settings that a push of a round carries are those of all this worker's steps in the round. They do not depend
    on how many micro-batches of which rounds this worker has computed, if the loop body does the same in each round.
    """

    def __init__(self, groups: Groups, hypers: Hypers | None = None, has_schedule: bool = False) -> None:
        """`groups` are those that the script sees. `hypers` are those of `schedule=`.

        `has_schedule`: there is a `schedule=`, also if another part steps it.
        """
        self.groups = groups
        self.schedulers = Schedulers()
        #: Returns the settings of the newest applied round that servers have told, if they know any.
        self.told: Callable[[], UsedSettings | None] = lambda: None
        self._hypers = hypers
        self._has_schedule = has_schedule or (hypers is not None and hypers.scheduler is not None)
        #: The settings that servers have from the start. Those that `schedule=` sets are the newest ones.
        self._first: _Values = [_plain_ones(group) for group in groups]
        #: The settings that were ever other than at the start.
        self._changed: set[str] = set()
        #: The round at whose start the groups and schedulers are now, once the body that was handed out is over.
        self._at = 0
        #: By round: groups and schedulers at its start, if this worker has computed some of it.
        self._starts: dict[int, tuple[_Values, list[State]]] = {}
        #: The round that this worker could have begun with, and groups and schedulers at its start.
        self._first_start: tuple[int, tuple[_Values, list[State]]] | None = None
        #: By round: the settings and schedulers at its step.
        self._used: dict[int, tuple[_Values, Schedules | None]] = {}
        #: By loop of the script: the steps that its body makes after `opt.step()`, by outermost scheduler.
        self._steps_after: dict[str, list[int]] = {}
        self._loop = ""
        #: The schedulers' counts at the newest step, until the body is over.
        self._counts: list[int] | None = None
        #: Whether the current body is only watched, to see which schedulers it steps.
        self.rehearses = False
        #: Whether the body of a micro-batch has set something before its step.
        self.set_before_step = False

    # ---- around a body

    def enter(self, loop: str) -> None:
        """Note that the script begins a loop over batches, at this place."""
        self._loop = loop

    def begin(self, round_: int, epoch: int) -> bool:
        """Prepare for a micro-batch of `round_`: put groups and schedulers to where they were when the round began.

        Return False if this worker cannot know that yet. Then the script has to compute a micro-batch for nothing first.
        """
        self._end_body()
        self.rehearses = False
        if self._first_start is None:
            self._first_start = self._at, self._now()
        if round_ not in self._starts:
            if round_ < self._at:
                self._go_back()
            if not self._catch_up(round_):
                self.rehearses = True
                self._starts[round_] = self._now()
                return False
            self._starts[round_] = self._now()
            if len(self._starts) > _KEPT:
                del self._starts[min(self._starts)]
        elif self._at != round_:
            self._put(*self._starts[round_])
        self._at = round_ + 1
        if self._hypers is not None and not isinstance(self._hypers.scheduler, ReduceLROnPlateau):
            self._show(self._hypers.at(round_, epoch))
        if self._starts[round_][0] is not self._first and not self._is_usual():
            self._note_changes(self._checked())  # now, because pushes may begin before the step
        return True

    def used(self, round_: int) -> None:
        """Note the settings at the script's `opt.step()` in `round_`.

        Raises UsageError, with the script's line, for a setting that cannot be, or that differs within the round.
        """
        self._counts = self.schedulers.counts() if self.schedulers else None
        if self.rehearses:
            return
        if self._is_usual() and not self._changed and not self.schedulers:
            self.set_before_step = False
            return
        values = self._checked()
        start = self._starts.get(round_)
        self.set_before_step = start is not None and values != start[0]
        if round_ in self._used and (found := different(self._used[round_][0], values)) is not None:
            group, key, one, other = found
            raise UsageError(
                f"{key} of parameter group {group} was {one} in an earlier micro-batch of round {round_}, and is {other} now "
                f"({script_line()}): set the same value for all of a round, for example one that is computed from run.round."
            )
        self._note_changes(values)
        steps = self._steps_after.get(self._loop, [])
        self._used[round_] = values, Schedules(json.dumps(self.schedulers.state()), steps) if self.schedulers else None
        if len(self._used) > _KEPT:
            del self._used[min(self._used)]

    def end_round(self, round_: int) -> None:
        """Note that `round_` begins, so that no body is charged with what functions for the round's end set and step."""
        self._end_body()
        self._catch_up(round_)

    def leave(self, segment: Segment, round_: int) -> None:
        """Note that the script leaves the loop of `segment`, whose end may be long past, with the weights of `round_`."""
        self._end_body()
        if self._at >= min(segment.end, round_):
            return
        told = self.told()
        if told is not None and self._at <= told.round and segment.first_round <= told.round < segment.end:
            self._catch_up(min(segment.end, round_), guess=True)

    def _end_body(self) -> None:
        """Note which schedulers a body has stepped after `opt.step()`. If it was a rehearsal, undo all that it did."""
        if self._counts is not None:
            after = [max(0, now - then) for then, now in zip(self._counts, self.schedulers.counts(), strict=False)]
            self._steps_after[self._loop], self._counts = after, None
            self.schedulers.check(after)
        if self.rehearses:
            self.rehearses = False
            self._put(*self._starts.popitem()[1])

    def _go_back(self) -> None:
        """Go back to the first start that is known, for work of an earlier round. Under `ssp` and `async` there is such work."""
        assert self._first_start is not None
        self._starts.setdefault(self._at, self._now())
        self._at = self._first_start[0]
        self._put(*self._first_start[1])

    def _catch_up(self, round_: int, guess: bool = False) -> bool:
        """Go to the start of `round_`, though the rounds before it were computed elsewhere. Return False if the way is not known.

        `guess`: the script cannot be watched, so let what is not known be nothing.
        """
        at, after, told = self._at, self._steps_after.get(self._loop), self.told()
        if round_ <= at:
            return True
        if told is not None and at <= told.round < round_:
            if after is None and told.schedules is not None and told.schedules.steps_after:
                after = told.schedules.steps_after
            if self.schedulers and after is None and not guess:
                return False
            self._take(told)
            at = told.round
        elif self.schedulers and after is None and not guess:
            return False
        self.schedulers.step([count * (round_ - at) for count in after or ()])
        self._at = round_
        return True

    def _take(self, told: UsedSettings) -> None:
        """Take over the settings with which a round was applied."""
        hypers = [self._own(given) for given in told.hypers or [{}] * len(self.groups)]
        for group, first, given in zip(self.groups, self._first, hypers, strict=False):
            for key, value in {**first, **given}.items():
                group[key] = tuple(value) if isinstance(value, list) and isinstance(first.get(key), tuple) else value
        self._changed.update(*hypers)
        if told.schedules is not None:
            self.schedulers.load(json.loads(told.schedules.state))

    def _own(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return those of a group's settings that `schedule=` does not set."""
        return given if self._hypers is None else {key: value for key, value in given.items() if not self._hypers.sets(key)}

    # ---- for pushes, and for an optimizer that runs here

    @contextlib.contextmanager
    def as_used(self, round_: int) -> Iterator[None]:
        """Have the settings of `round_` in the groups inside the context."""
        if round_ not in self._used:
            yield
            return
        now, state = self._now()
        self._put(self._used[round_][0], state)
        yield
        self._put(now, state)

    def at(self, round_: int, epoch: int) -> list[dict[str, Any]]:
        """Return the settings of `round_` that were ever changed, for each group; empty if none was."""
        scheduled = self._hypers.at(round_, epoch) if self._hypers is not None else []
        self._show(scheduled)
        if not self._changed:
            return scheduled
        values = self._used[round_][0] if round_ in self._used else self._checked()
        own = [{key: now[key] for key in sorted(self._changed) if key in now} for now in values]
        return [{**mine, **theirs} for mine, theirs in zip(own, scheduled or [{}] * len(own), strict=True)]

    def schedules(self, round_: int) -> Schedules | None:
        """Return the script's schedulers at its step in `round_`; None if it has none."""
        return self._used[round_][1] if round_ in self._used else None

    # ---- the script's side

    def attach(self, scheduler: LRScheduler) -> None:
        """Note a scheduler that the script has made for the optimizer. Raises UsageError if there is another schedule."""
        if not self._has_schedule:
            self.schedulers.attach(scheduler)
        else:
            raise at_script_line(
                f"{type(scheduler).__name__} is attached to an optimizer that has a schedule: leave out one of "
                "this and run.optimizer(schedule=...)."
            )

    def _is_usual(self) -> bool:
        """Return whether the settings are those that servers have from the start."""
        return all(group[key] == first[key] for group, first in zip(self.groups, self._first, strict=True) for key in first)

    def _note_changes(self, values: _Values) -> None:
        self._changed |= {key for first, now in zip(self._first, values, strict=True) for key in first if now[key] != first[key]}

    def _checked(self) -> _Values:
        """Return the settings now. Raises UsageError for one that servers cannot take."""
        values: _Values = []
        for number, (group, first) in enumerate(zip(self.groups, self._first, strict=True)):
            values.append({key: plain(key, group[key]) for key in first})
            for key, value in first.items():
                now = values[-1][key]
                if now is value or now == value:
                    continue
                if not _may_become(value, now):
                    raise UsageError(
                        f"{key} of parameter group {number} was set to {now} ({script_line()}): while a run trains, only numbers "
                        "may be set, and to finite numbers."
                    )
                if self._hypers is not None and self._hypers.sets(key):
                    raise UsageError(
                        f"{key} of parameter group {number} was set to {now} ({script_line()}), but run.optimizer(schedule=...) "
                        "sets it in every round: leave out one of the two."
                    )
        return values

    def _show(self, scheduled: list[dict[str, Any]]) -> None:
        """Show the script what `schedule=` has set."""
        for group, first, given in zip(self.groups, self._first, scheduled, strict=False):
            group.update(given)
            first.update(given)

    def _now(self) -> tuple[_Values, list[State]]:
        """Return the settings and the schedulers as they are."""
        if not self.schedulers and self._is_usual():
            return self._first, []
        values = [{key: group[key] for key in first} for group, first in zip(self.groups, self._first, strict=True)]
        return values, self.schedulers.state()

    def _put(self, values: _Values, state: list[State]) -> None:
        for group, given in zip(self.groups, values, strict=True):
            group.update(self._own(given))
        self.schedulers.load(state)


def _plain_ones(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a group that are plain values. Under `local` and `average` an optimizer may have others too."""
    found = {}
    for key in group.keys() - {"params"}:
        with contextlib.suppress(UsageError):
            found[key] = plain(key, group[key])
    return dict(sorted(found.items()))


def different(one: _Values, other: _Values) -> tuple[int, str, Any, Any] | None:
    """Return the number of a group, a setting of it and its two values, if they differ."""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        for key in a:
            if a[key] != b[key]:
                return number, key, a[key], b[key]
    return None


def _may_become(first: Any, now: Any) -> bool:
    """Return whether servers let a setting change from `first` to `now`."""
    if isinstance(first, list | tuple) and isinstance(now, list | tuple):
        return len(first) == len(now) and all(map(_may_become, first, now))
    is_number = isinstance(first, int | float) and not isinstance(first, bool)
    return is_number and isinstance(now, int | float) and not isinstance(now, bool) and abs(now) <= 1e300
