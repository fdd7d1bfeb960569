"""Replicas train apart, and are merged once at the end by averaging their weights.

Zinkevich, Weimer, Li and Smola, "Parallelized stochastic gradient descent" (NIPS 2010); McDonald, Hall and Mann,
"Distributed training strategies for the structured perceptron" (NAACL 2010). All parts start from the same weights.
`--average-weights-by` says how much a part counts: `samples` by the samples it has seen, `uniform` all the same, and `greedy`
only parts that help. Greedy is recipe 1 of Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time" (ICML 2022). `worker/merge/greedy_soup.py` finds these parts.
"""

from typing import ClassVar, Literal

from roundtable.common.config.batch_plan import Segment
from roundtable.common.policies import Policy


class Average(Policy):
    """Nothing is exchanged until the data ends; then the weighted mean of the replicas replaces the weights."""

    contributes: ClassVar[Literal["gradient", "delta", "weights"]] = "weights"

    def updates(self, segment: Segment) -> int:
        return min(1, segment.rounds)

    def rounds_in(self, segment: Segment, updates: int) -> int:
        return min(updates, 1) * segment.rounds


POLICY = Average
