"""Local steps with periodic merging through an outer optimizer.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data" (AISTATS 2017). Stich, "Local SGD
converges fast and communicates little" (ICLR 2019). Douillard et al., "DiLoCo: Distributed low-communication training of
language models" (2023). The outer Nesterov step is DiLoCo's: the gradient that the servers' optimizer sees is the mean change of
the replicas since the last merge, negated. By default its rate over one minus its momentum is 1. So in the long run the weights
move as far as the replicas do, and the user's learning rate means what it does under `sync`.

Post-local SGD is by Lin, Stich, Patel and Jaggi, "Don't use large mini-batches, use local SGD" (ICLR 2020). In the first
`local_after` rounds every step is merged by the plain mean. Local steps begin after that. If the inner optimizer is linear in its
gradients, as SGD with momentum is, those rounds are `sync` but for rounding.
"""

from typing import Any, ClassVar, Literal

from roundtable.common.config.batch_plan import Segment
from roundtable.common.policies import Policy


class Local(Policy):
    """H local steps, then the sample-weighted mean of the replicas' deltas through SGD with Nesterov momentum."""

    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "delta"

    def updates(self, segment: Segment) -> int:
        together = self._together(segment)
        return together - (together - segment.rounds) // self.settings.local_steps

    def rounds_in(self, segment: Segment, updates: int) -> int:
        together = self._together(segment)
        apart = max(0, updates - together) * self.settings.local_steps
        return min(updates, together) + min(apart, segment.rounds - together)

    def _together(self, segment: Segment) -> int:
        """Return how many of the segment's first rounds are each merged."""
        return min(max(0, self.settings.local_after - segment.first_round), segment.rounds)

    @property
    def outer_optimizer(self) -> tuple[str, dict[str, Any]]:
        momentum = self.settings.outer_momentum
        return "SGD", {"lr": self.settings.outer_lr, "momentum": momentum, "nesterov": momentum > 0}

    def outer_settings(self, rounds: int) -> dict[str, Any]:
        if rounds <= self.settings.local_after:
            return {"lr": 1.0, "momentum": 0.0, "nesterov": False}
        return self.outer_optimizer[1]


POLICY = Local
