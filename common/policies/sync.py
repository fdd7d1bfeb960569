"""Bulk-synchronous rounds: the update is applied once every micro-batch of the round is in.

Valiant, "A bridging model for parallel computation" (CACM 1990); for parameter servers: Li et al., "Scaling distributed
machine learning with the parameter server" (OSDI 2014). With the summation tree the result equals one process's to the bit.
"""

from roundtable.common.policies import Policy


class Sync(Policy):
    """All K micro-batches make one update. Every worker then starts the next round from the same weights."""


POLICY = Sync
