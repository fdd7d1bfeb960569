"""The optimizer that a script holds: one of torch.optim to look at, whose steps the cluster takes."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from roundtable.common.config.field_types import LARGEST
from roundtable.common.runtime.errors import UsageError, script_line
from roundtable.common.runtime.skip_dynamo import no_compiler
from roundtable.worker.optim.round_settings import RoundSettings


class Optimizer(torch.optim.Optimizer):
    """The result of `Run.optimizer`: the usual calls of an optimizer, carried out by the cluster.

    `param_groups` has the settings of the current round. Numbers in it may be set, and schedulers of torch.optim.lr_scheduler may
    be attached: a round's update has the settings that the script has at its `step`. All workers must set the same ones for a
    round. `defaults` has the arguments of `Run.optimizer`. `state` is empty, because the servers have it.
    """

    def __init__(
        self,
        step: Callable[[float | None], None],
        settings: RoundSettings,
        defaults: dict[str, Any],
        forget: Sequence[Callable[[], None]],
        is_dense: bool = True,
    ) -> None:
        """`forget` drop gradients that are not in the parameters' `grad`. If `is_dense`, there are none."""
        self._contribute, self._settings, self._forget, self._is_dense = step, settings, forget, is_dense
        with no_compiler():
            super().__init__([{"params": list(group["params"])} for group in settings.groups], dict(defaults))
        #: The servers have the state, so this stays empty.
        self.state = defaultdict(dict)

    #: Have torch.amp.GradScaler call `step` for gradients that are not finite as well: the run then decides about the round.
    _step_supports_amp_scaling = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups with their settings.

        A scheduler reads them when it is made. No other call tells an optimizer of its schedulers.
        """
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, LRScheduler):
            self._settings.attach(caller)
        return self._settings.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Leave the groups as they are: torch.optim.Optimizer sets them when it is made."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise UsageError: the servers know the parameter groups from the start."""
        if "_warned_capturable_if_run_uncaptured" in vars(self):  # else torch.optim.Optimizer is being made
            raise UsageError(
                f"add_param_group() is called ({script_line()}), but servers know the groups from the start: give all parameters "
                "to run.optimizer. One that requires no gradient yet trains from the moment when it does."
            )

    def step(self, closure: None = None, *, weight: float | torch.Tensor | None = None) -> None:  # type: ignore[override]
        """Contribute the gradients of this micro-batch, and wait for new weights as the policy requires.

        `weight` is this micro-batch's weight in the mean of its round: a number from 0 on, or a tensor of one element. The update
        is the sum of gradient x weight over the round, divided by the sum of the weights. By default the weight is the number of
        samples. If the loss is a mean over tokens, give their number. With weight 0 gradients, running statistics and metrics of
        this micro-batch count nothing, even if they are not finite.

        Raises UsageError for a weight that is negative, not finite, or no number, for a closure, and for settings in
        `param_groups` that servers cannot take.
        """
        if closure is not None:
            raise UsageError(
                f"opt.step() is given a closure ({script_line()}), but servers cannot compute the loss again: call "
                "loss.backward() and then opt.step(); policies local and average take no closure either."
            )
        self._unscale()
        self._contribute(None if weight is None else checked_weight(weight))

    def _unscale(self) -> None:
        """Divide the gradients by the scale that a GradScaler has set for this step, if any, as `GradScaler.unscale_` does."""
        scale = vars(self).get("grad_scale")
        if scale is None:
            return
        if not self._is_dense:
            raise UsageError(
                f"a GradScaler steps the optimizer ({script_line()}), but gradients of row-sparse tables and sharded layers are "
                "not here: use torch.autocast with bfloat16, which needs no GradScaler."
            )
        inverse = scale.double().reciprocal().float()
        for group in self._settings.groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse.to(parameter.grad.device))

    def state_dict(self) -> dict[str, Any]:
        """Raise UsageError: the servers have the state."""
        raise UsageError(
            f"opt.state_dict() is called ({script_line()}), but the servers have the optimizer's state: it is in the run's "
            "checkpoints (--checkpoint-every), and --resume goes on with it."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise UsageError: the servers have the state."""
        raise UsageError(
            f"opt.load_state_dict() is called ({script_line()}), but the servers have the optimizer's state: go on from a "
            "checkpoint of a run with --resume."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients. This is never needed, because `step` does it; training loops call it."""
        for forget in self._forget:
            forget()
        for group in self._settings.groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()


def checked_weight(weight: Any) -> float:
    """Return as a number what a script gives as the weight of a micro-batch.

    Raises UsageError, with the script's line, if `weight` cannot be a weight.
    """
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0 <= number <= LARGEST:
        is_large = isinstance(weight, torch.Tensor) and weight.dim()
        text = f"a tensor of shape {tuple(weight.shape)}" if is_large else f"{weight!r:.40}"
        valid = "opt.step(weight=...) takes a number from 0 to 2**53, such as that of its tokens"
        raise UsageError(f"the weight of a micro-batch is {text} ({script_line()}): {valid}.")
    return number
