"""The schedulers of torch.optim.lr_scheduler that a script attaches to the run's optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from roundtable.common.runtime.errors import UsageError

#: The numbers of one scheduler, by the name of its attribute.
State = dict[str, Any]


class Schedulers:
    """A script's schedulers, in the order in which it has attached them. Some may be parts of others, as in SequentialLR."""

    def __init__(self) -> None:
        self._all: list[LRScheduler] = []

    def attach(self, scheduler: LRScheduler) -> None:
        """Note a scheduler, if it is new."""
        if not any(known is scheduler for known in self._all):
            self._all.append(scheduler)

    def __bool__(self) -> bool:
        return bool(self._all)

    @property
    def outermost(self) -> list[LRScheduler]:
        """The schedulers that are no part of another one. The script steps these."""
        parts = {id(part) for scheduler in self._all for part in _parts(scheduler)}
        return [scheduler for scheduler in self._all if id(scheduler) not in parts]

    def counts(self) -> list[int]:
        """Return how many steps each of the outermost schedulers has had."""
        return [_count(scheduler) for scheduler in self.outermost]

    def state(self) -> list[State]:
        """Return the numbers of all schedulers."""
        return [{name: _copy(value) for name, value in vars(one).items() if _is_plain(value)} for one in self._all]

    def load(self, state: Sequence[State]) -> None:
        """Put back numbers that `state` gave, here or on another worker."""
        for scheduler, numbers in zip(self._all, state, strict=False):
            vars(scheduler).update({name: _copy(value) for name, value in numbers.items()})

    def step(self, times: Sequence[int]) -> None:
        """Step each of the outermost schedulers so many times."""
        for scheduler, count in zip(self.outermost, times, strict=False):
            for _ in range(count):
                scheduler.step()

    def check(self, times: Sequence[int]) -> None:
        """Raise UsageError if a scheduler that looks at a loss was stepped for a batch. `times` has the steps for one batch."""
        for scheduler, count in zip(self.outermost, times, strict=False):
            if count and isinstance(scheduler, ReduceLROnPlateau):
                raise UsageError(
                    "ReduceLROnPlateau.step() is called for every batch, and each batch has another loss: call it after a loop "
                    "over run.batches(), or give run.optimizer(schedule=..., schedule_per='epoch')."
                )


def _parts(scheduler: LRScheduler) -> list[LRScheduler]:
    """Return the schedulers that this one steps."""
    values = [item for value in vars(scheduler).values() for item in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in values if isinstance(value, LRScheduler)]


def _count(scheduler: LRScheduler) -> int:
    if "last_epoch" in vars(scheduler):
        return int(scheduler.last_epoch)
    return max(map(_count, _parts(scheduler)), default=0)  # ChainedScheduler does not count


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, int | float | str) for item in items)


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
