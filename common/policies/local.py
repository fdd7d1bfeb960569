"""Local steps with periodic merging through an outer optimizer.

McMahan et al., "Communication-efficient learning of deep networks from decentralized data" (AISTATS 2017); Stich, "Local SGD
converges fast and communicates little" (ICLR 2019); Douillard et al., "DiLoCo" (2023), from which the outer Nesterov step:
the mean change of the replicas since the last merge, negated, is the gradient that the servers' optimizer sees. By default
its rate over one minus its momentum is 1, so that in the long run the weights move as far as the replicas do, and the user's
learning rate means what it does under `sync`.
"""

from typing import Any, ClassVar, Literal

from common.policies import Policy


class Local(Policy):
    """H local steps, then the sample-weighted mean of the replicas' deltas through SGD with Nesterov momentum."""

    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "delta"

    @property
    def merge_every(self) -> int | None:
        return self.settings.local_steps

    @property
    def outer_optimizer(self) -> tuple[str, dict[str, Any]] | None:
        momentum = self.settings.outer_momentum
        return "SGD", {"lr": self.settings.outer_lr, "momentum": momentum, "nesterov": momentum > 0}


POLICY = Local
