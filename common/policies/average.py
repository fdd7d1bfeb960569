"""Replicas trained apart, and merged once at the end by averaging their weights.

Zinkevich, Weimer, Li and Smola, "Parallelized stochastic gradient descent" (NIPS 2010); McDonald, Hall and Mann,
"Distributed training strategies for the structured perceptron" (NAACL 2010). All parts start from the same weights.
"""

from typing import ClassVar, Literal

from common.policies import Policy


class Average(Policy):
    """Nothing is exchanged until the data ends; then the sample-weighted mean of the replicas replaces the weights."""

    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "weights"


POLICY = Average
