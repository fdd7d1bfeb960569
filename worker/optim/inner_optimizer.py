"""The optimizer of a worker that trains apart from the others, under policies `local` and `average`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from roundtable.common.model.nonfinite import is_finite
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.optim.optimizer import NO_LOSS, Per, Schedule, make_schedule
from roundtable.worker.optim.round_settings import RoundSettings

log = logging.getLogger("roundtable.worker.local")


class InnerOptimizer:
    """The user's own optimizer, which steps on this worker's replica once a round, and its schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule | None, per: Per, clip_norm: float | None) -> None:
        """Raises UsageError if the schedule cannot be used."""
        self._optimizer, self._per, self._clip_norm = optimizer, per, clip_norm
        self._scheduler = make_schedule(optimizer, schedule, per)
        #: The settings of rounds. The script sees the optimizer's own groups.
        self.settings = RoundSettings(optimizer.param_groups, has_schedule=schedule is not None)
        #: In this round: the sum of gradients x weight, by parameter.
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        #: In this round: the weight.
        self._weight = 0.0
        #: In this data epoch: the sum of this worker's losses x weight, and the weight.
        self._epoch_loss = (0.0, 0.0)

    @property
    def groups(self) -> int:
        """The number of parameter groups."""
        return len(self._optimizer.param_groups)

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return self._optimizer.defaults

    def take(self, parameters: Iterable[torch.Tensor], weight: float, loss: float | None) -> None:
        """Take the gradients of a micro-batch, whose mean `loss` is None if the script has not logged it."""
        for parameter in parameters:
            if parameter.grad is not None:
                gradient = parameter.grad.mul_(weight)
                known = self._sums.get(parameter)
                self._sums[parameter] = gradient if known is None else known.add_(gradient)
                parameter.grad = None
        self._weight += weight
        if loss is not None:
            self._epoch_loss = self._epoch_loss[0] + loss * weight, self._epoch_loss[1] + weight

    def discard(self) -> None:
        """Forget the round's gradients."""
        self._sums, self._weight = {}, 0.0

    def step(self, round_: int, on_nonfinite: str, whose: str) -> float | None:
        """Step by the mean of the gradients of `round_` and return their weight; None if this leaves the step out.

        `whose` gradient it is goes into messages. Raises UsageError if a gradient is not finite and `on_nonfinite` is "fail".
        """
        sums, weight = self._sums, self._weight
        self.discard()
        if not weight:
            return 0.0
        if on_nonfinite != "allow" and not all(is_finite(total) for total in sums.values()):
            text = f"{whose} is not finite"
            if on_nonfinite == "fail":
                raise UsageError(f"{text}; --on-nonfinite skip leaves out such steps, and allow takes them.")
            log.warning("%s: the step is left out.", text)
            return None
        for parameter, total in sums.items():
            parameter.grad = total.div_(weight)
        with self.settings.as_used(round_):
            self._apply(list(sums))
        for parameter in sums:
            parameter.grad = None
        return weight

    def _apply(self, parameters: Sequence[torch.Tensor]) -> None:
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        try:
            self._optimizer.step()
        except TypeError as error:
            name = type(self._optimizer).__name__
            raise UsageError(f"{name} cannot be used: its step() needs more than gradients ({error}).") from None

    def step_schedule(self, epoch_ends: bool) -> None:
        """Step the schedule after a round. Raises UsageError if it needs a loss that was not logged."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if epoch_ends:
                total, weight = self._epoch_loss
                if not weight:
                    raise UsageError(NO_LOSS)
                self._scheduler.step(total / weight)
                self._epoch_loss = 0.0, 0.0
        elif self._scheduler is not None and (epoch_ends or self._per == "round"):
            self._scheduler.step()
