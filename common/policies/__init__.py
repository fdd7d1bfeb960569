"""Consistency policies: when contributions are applied, and when a worker may go on.

One file each, found by name: `load("ssp", settings)` takes the class `Policy` subclass that `common/policies/ssp.py`
calls `POLICY`. Servers, coordinator and workers ask the same object, so that a policy is read in one place.
"""

from __future__ import annotations

import importlib
import keyword
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.settings import Settings


@dataclass(frozen=True)
class Policy:
    """What servers, coordinator and workers ask. The defaults are those of `sync`."""

    #: What a worker sends: its gradient of a micro-batch, its change of the weights since the last merge, or its weights.
    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "gradient"
    #: Whether a server applies once per round, or each push at once.
    applies: ClassVar[Literal["round", "push"]] = "round"
    #: Whether a worker adds up an aligned run of micro-batches before it pushes.
    combines: ClassVar[bool] = True

    settings: Settings

    @property
    def may_leave_out(self) -> int:
        """Micro-batches of a round that may be missing when it is applied."""
        return 0

    def may_start(self, clock: int, slowest: int) -> bool:
        """Whether a worker may start on round `clock` while micro-batches of round `slowest` are still outstanding."""
        return clock <= slowest

    def lr_scale(self, staleness: int) -> float:
        """Factor on the learning rate for a push computed from weights `staleness` updates old."""
        return 1.0

    def compensate(self, gradient: Any, now: Any, then: Any) -> Any:
        """The gradient to apply to weights `now`, for one computed at weights `then` (tensors of one shape)."""
        return gradient

    @property
    def is_local(self) -> bool:
        """Whether workers step on their own, with the user's optimizer, between merges."""
        return self.contributes != "gradient"

    def updates(self, segment: Segment) -> int:
        """How many updates, each making a new version of the weights, the servers apply over `segment`."""
        return segment.rounds

    def rounds_in(self, segment: Segment, updates: int) -> int:
        """How many rounds of `segment` are in its first `updates` updates: more than those where workers step locally."""
        return updates

    @property
    def outer_optimizer(self) -> tuple[str, dict[str, Any]] | None:
        """Class of torch.optim and its arguments that servers apply merged deltas with; None: none, or the user's."""
        return None

    def outer_settings(self, rounds: int) -> dict[str, Any]:
        """The outer optimizer's arguments in the merge after `rounds` rounds of the run, where they change."""
        return {}


def load(settings: Settings) -> Policy:
    """The policy that `settings.policy` names."""
    name = settings.policy + "_" * keyword.iskeyword(settings.policy)
    policy: type[Policy] = importlib.import_module(f"roundtable.common.policies.{name}").POLICY
    return policy(settings)
