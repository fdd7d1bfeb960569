"""Synchronous rounds that close without their last few micro-batches.

Chen, Pan, Monga, Bengio and Jozefowicz, "Revisiting distributed synchronous SGD" (2016): with b backup workers, the update
takes the first N gradients of N + b. Here a round of K micro-batches closes when K - b have fully arrived at every server.
The coordinator decides which ones, so all servers apply the same set. The rest are dropped, counted and reported.
"""

from typing import ClassVar

from roundtable.common.policies import Policy


class Backup(Policy):
    """The first K - b count. Micro-batches are pushed one by one, because a sum could not be taken apart again."""

    combines: ClassVar[bool] = False

    @property
    def may_leave_out(self) -> int:
        return self.settings.backup_micro_batches


POLICY = Backup
