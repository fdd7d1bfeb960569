"""The context that a server gives its shard, and the plans that all parts of a shard read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from roundtable.common.config.batch_plan import Round, Segment
from roundtable.common.config.settings import Settings
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.protocol.messages.setup import PlanReply
from roundtable.common.runtime.errors import WireError
from roundtable.ps import differences

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ShardContext:
    """The settings and functions that a shard needs from its server process."""

    index: int
    settings: Settings
    policy: Policy
    #: The device that computes sharded layers.
    device: torch.device = _CPU
    #: Return the incarnation of the current coordinator.
    coordinator: Callable[[], int] = lambda: 0
    #: Send a heartbeat if one is due. Called during long work.
    show_life: Callable[[], None] = lambda: None
    #: Block until no checkpoint is being written.
    finish_writing: Callable[[], None] = lambda: None
    #: Return True while a checkpoint is being written.
    is_writing: Callable[[], bool] = lambda: False
    #: Return how many bytes of checkpoints this server has written.
    bytes_written: Callable[[], int] = lambda: 0
    #: The modules whose optimizers this server may import and run.
    trusts: Collection[str] = ()


class Progress:
    """Counts the steps of long work: pieces of a checkpoint that are read, and chunks that are updated."""

    def __init__(self, show_life: Callable[[], None]) -> None:
        self.steps = 0
        self._show_life = show_life

    def step(self) -> None:
        """Count a step and call `show_life`."""
        self.steps += 1
        self._show_life()


class Plans:
    """The segments that workers have agreed on."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        #: No update from this one on is begun; None if there is no such bound.
        self._held_from: int | None = None
        #: Whether that is the end of the run, for which a script has asked.
        self.has_end = False

    def hold(self, updates: int, decided: bool) -> int:
        """Begin no update from number `updates` on, and return that number. If it is `decided`, the run ends there."""
        self._held_from = max(updates, self._held_from or 0)
        self.has_end |= decided
        return self._held_from

    def is_held(self, update: int) -> bool:
        """Return True if update number `update` must not be begun."""
        return self._held_from is not None and update >= self._held_from

    def agree(self, sender: str, segment: Segment) -> Send:
        """Return the answer to a worker's plan. The first worker defines a segment. All others must have the same segment."""
        if segment.index == len(self.segments) and segment.follows(self.segments[-1] if self.segments else None):
            self.segments.append(segment)
        elif segment.index >= len(self.segments) or self.segments[segment.index] != segment:
            return Send(sender, Refused("Plan", differences.of_plans(self.segments, "another worker", segment, sender)))
        return Send(sender, PlanReply(segment.index))

    @property
    def end(self) -> int:
        """Return the first round that is not to be done: no segment has it, or the run ends before it."""
        end = self.segments[-1].end if self.segments else 0
        return end if self._held_from is None or not self.has_end else min(end, self._held_from)

    def has(self, round_: int) -> bool:
        """Return True if a segment has the round."""
        return 0 <= round_ < self.end

    def round(self, index: int) -> Round:
        """Return the plan of a round. Raises WireError if no segment has the round."""
        for segment in reversed(self.segments):
            if segment.first_round <= index < segment.end:
                return segment.round(index)
        raise WireError(f"no plan knows round {index}")
