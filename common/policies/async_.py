"""Fully asynchronous: each push is applied at once, and a worker waits for the reply only.

Recht, Re, Wright and Niu, "Hogwild!" (NIPS 2011); Dean et al., "Large scale distributed deep networks" (NIPS 2012, Downpour
SGD). It is `ssp` without a bound, with the same options against staleness.
"""

from roundtable.common.policies.ssp import Ssp


class Async(Ssp):
    """No bound on how far a worker may lead."""

    def may_start(self, clock: int, slowest: int) -> bool:
        return True


POLICY = Async
