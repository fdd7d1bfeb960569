"""Consistency policies: when contributions are applied, and when a worker may go on.

Each policy is one file, found by name: the subclass of `Policy` that `common/policies/ssp.py` calls `POLICY` is `ssp`. Servers,
coordinator and workers ask the same object, so a policy can be read in one place.
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
    """The questions that servers, coordinator and workers ask. The defaults are those of `sync`."""

    #: A worker's contribution: a micro-batch's gradient, the change of its weights since the last merge, or its weights.
    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "gradient"
    #: A server applies once per round, or each push at once.
    applies: ClassVar[Literal["round", "push"]] = "round"
    #: True if a worker adds up an aligned run of micro-batches before it pushes.
    combines: ClassVar[bool] = True

    settings: Settings

    @property
    def may_leave_out(self) -> int:
        """Return how many micro-batches of a round may be missing when it is applied."""
        return 0

    def may_start(self, clock: int, slowest: int) -> bool:
        """Return True if a worker may start round `clock` while micro-batches of round `slowest` are outstanding."""
        return clock <= slowest

    def lr_scale(self, staleness: int) -> float:
        """Return the factor on the learning rate for a push computed from weights that are `staleness` updates old."""
        return 1.0

    def compensate(self, gradient: Any, now: Any, then: Any) -> Any:
        """Return the gradient to apply to weights `now`, for one computed at weights `then` (tensors of one shape)."""
        return gradient

    @property
    def is_local(self) -> bool:
        """Return True if workers step on their own, with the user's optimizer, between merges."""
        return self.contributes != "gradient"

    def updates(self, segment: Segment) -> int:
        """Return how many updates the servers apply over `segment`. Each makes a new version of the weights."""
        return segment.rounds

    def rounds_in(self, segment: Segment, updates: int) -> int:
        """Return how many rounds of `segment` are in its first `updates` updates: more than those if workers step locally."""
        return updates

    @property
    def outer_optimizer(self) -> tuple[str, dict[str, Any]] | None:
        """Return the class of torch.optim, with arguments, that servers apply merged deltas with; None: none, or the user's."""
        return None

    def outer_settings(self, rounds: int) -> dict[str, Any]:
        """Return the outer optimizer's arguments in the merge after `rounds` rounds, if they change."""
        return {}


def load(settings: Settings) -> Policy:
    """Return the policy that `settings.policy` names."""
    name = settings.policy + "_" * keyword.iskeyword(settings.policy)
    policy: type[Policy] = importlib.import_module(f"roundtable.common.policies.{name}").POLICY
    return policy(settings)
