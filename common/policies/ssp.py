"""Stale-synchronous parallel: each push is applied at once, and no worker runs too far ahead.

Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server" (NIPS 2013): a worker may be at most
s clocks ahead of the slowest. A clock here is a round, so the slowest clock is the earliest round with a micro-batch outstanding.

A push that is a part of a global batch moves the weights by that part of the learning rate. This is the linear scaling rule
(Goyal et al., "Accurate, large minibatch SGD", 2017), so a rate means the same under every policy.

`staleness_lr` divides the step by the staleness: Zhang, Gupta, Lian and Liu, "Staleness-aware async-SGD for distributed deep
learning" (IJCAI 2016). Their rate is that of a whole batch, so their division is the linear scaling too. Here that is done
already, and `ps/params/planned_rates.py` keeps the mean of the rates. `delay_compensation` corrects the gradient for the delay:
Zheng et al., "Asynchronous stochastic gradient descent with delay compensation" (ICML 2017).
"""

from typing import Any, ClassVar, Literal

from roundtable.common.policies import Policy


class Ssp(Policy):
    """A worker may go on if its own clock <= slowest clock + s."""

    applies: ClassVar[Literal["round", "push"]] = "push"
    combines: ClassVar[bool] = False

    def may_start(self, clock: int, slowest: int) -> bool:
        return clock <= slowest + self.settings.max_staleness

    def lr_scale(self, staleness: int) -> float:
        return 1.0 / max(1, staleness) if self.settings.staleness_lr else 1.0

    def compensate(self, gradient: Any, now: Any, then: Any) -> Any:
        """Return g + lambda * g*g*(now - then).

        The diagonal of the outer product stands in for the Hessian (Zheng et al., eq. 10).
        """
        weight = self.settings.delay_compensation
        return gradient + weight * gradient * gradient * (now - then) if weight else gradient


POLICY = Ssp
