"""The user's settings of the optimizer, checked on the worker and converted into what servers need.

The update itself runs on the servers with torch.optim's own class. Under policies that step locally, it runs here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from roundtable.common.runtime.errors import UsageError

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
Groups = list[dict[str, Any]]
NO_LOSS = "ReduceLROnPlateau looks at the mean loss of an epoch, but none was logged: call run.log(loss=loss) for every batch."

Per = Literal["round", "epoch"]


def parameter_groups(model: nn.Module, params: Iterable[Any] | None) -> Groups:
    """Return parameter groups as torch.optim takes them: dicts whose 'params' are lists. Some parameters may require no gradient.

    Raises UsageError if a parameter is given twice, or if none requires a gradient.
    """
    given = list(model.parameters()) if params is None else list(params)
    groups = [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    seen: set[int] = set()
    for group in groups:
        found = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        tensors = [p[1] if isinstance(p, tuple) else p for p in found]  # torch.optim takes (name, parameter) as well
        group["params"] = tensors
        if len({id(p) for p in tensors} - seen) < len(tensors):
            raise UsageError("a parameter is given to the optimizer twice; it can be in one group only, once.")
        seen |= {id(p) for p in tensors}
    if not any(p.requires_grad for group in groups for p in group["params"]):
        raise UsageError("the model has no parameter that requires a gradient, so there is nothing to train.")
    return groups


def example_optimizer(cls: type[torch.optim.Optimizer], groups: Groups, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of the same class and settings over one dummy element per group.

    It checks the settings, and a schedule can step it to get the settings of every round. Raises UsageError if torch.optim
    refuses the settings.
    """
    return make_optimizer(cls, [{**group, "params": [torch.zeros(1, 1, requires_grad=True)]} for group in groups], hyper)


def make_optimizer(cls: type[torch.optim.Optimizer], groups: Groups, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of this class. Raises UsageError if torch.optim refuses the settings or the parameters."""
    try:
        return cls(groups, **hyper)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{cls.__name__} cannot be made with {hyper}: {error}.") from None


def plain_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return every group's settings. Raises UsageError if one is not a plain value that can be sent to servers."""
    return [{key: plain(key, group[key]) for key in group if key != "params"} for group in optimizer.param_groups]


def plain(key: str, value: Any) -> Any:
    """Return a setting as messages can carry it. numpy's numbers become Python's."""
    if isinstance(value, list | tuple):
        return type(value)(plain(key, item) for item in value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise UsageError(f"the optimizer's {key} is a {type(value).__name__}; servers can only be sent plain numbers.")


def check_sendable(cls: type[torch.optim.Optimizer]) -> None:
    """Raise UsageError unless servers can find this class in torch.optim."""
    if getattr(torch.optim, cls.__name__, None) is not cls:
        raise UsageError(
            f"{cls.__module__}.{cls.__qualname__} is not a class of torch.optim, and servers have only these; "
            "policies local and average accept any optimizer, because it runs on the workers."
        )


def check_elementwise(cls: type[torch.optim.Optimizer], hyper: dict[str, Any]) -> None:
    """Raise UsageError unless the update of each element depends on that element alone.

    Servers hold slices of flattened tensors. An update that looks at a whole tensor (LBFGS, Adafactor, Muon) would have another
    result. The check takes three steps on a matrix, and the same steps on its two flattened halves.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 8, generator=generator)
    gradients = [torch.randn(6, 8, generator=generator) for _ in range(3)]
    why = f"{cls.__name__} cannot run on parameter servers, each of which holds only parts of tensors: "
    try:
        whole, cut = start.clone(), [part.clone() for part in start.reshape(-1).split(24)]
        # in a group of a server, the settings are the same and only the parameters differ
        on_whole, on_cut = cls([whole], **hyper), cls(cut, **hyper)
        for gradient in gradients:
            whole.grad = gradient
            for part, values in zip(cut, gradient.reshape(-1).split(24), strict=True):
                part.grad = values
            on_whole.step()
            on_cut.step()
    except Exception as error:  # the class may object to slices with any exception
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{why}{text.rstrip('.')}. Choose one with an elementwise update, such as SGD or AdamW.") from None
    if not torch.equal(whole.reshape(-1), torch.cat(cut)):
        raise UsageError(
            f"{why}its update of one element depends on others of the tensor. Choose one with an elementwise update, "
            "such as SGD or AdamW, or policy local or average, where optimizers run on whole tensors."
        )


class Hypers:
    """The parameter groups' settings of every round. They depend on the round alone, so all workers send the same ones.

    The scheduler is torch's own, stepped over a dummy optimizer once per round or epoch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | None,
        per: Per,
        epoch_loss: Callable[[int], float | None],
    ) -> None:
        """`epoch_loss(epoch)` returns the mean loss of a data epoch for ReduceLROnPlateau, or None if it is not known yet."""
        self._optimizer = optimizer
        self._per = per
        self._epoch_loss = epoch_loss
        self._steps = 0
        self._changed: set[str] = set()
        self._first = [dict(group) for group in optimizer.param_groups]
        self._scheduler = make_schedule(optimizer, schedule, per)
        self._note_changes()
        self._optimizer.step()  # a scheduler warns if it is stepped before its optimizer; without gradients this does nothing

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All settings of the parameter groups in the round that was asked for last."""
        return self._optimizer.param_groups

    @property
    def scheduler(self) -> LRScheduler | None:
        return self._scheduler

    def sets(self, key: str) -> bool:
        """Return whether the schedule has ever changed this setting."""
        return key in self._changed

    def at(self, round_: int, epoch: int) -> list[dict[str, Any]]:
        """Return the settings that the schedule has ever changed, for each group; empty without a schedule.

        The scheduler never goes back. For an earlier round than the last one, the newest settings are returned.
        """
        if self._scheduler is None:
            return []
        while self._steps < (round_ if self._per == "round" else epoch) and self._step():
            self._steps += 1
        return [{key: plain(key, group[key]) for key in sorted(self._changed)} for group in self._optimizer.param_groups]

    def _step(self) -> bool:
        """Step the scheduler. Return False if the loss that it needs is not known yet."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            loss = self._epoch_loss(self._steps)
            if loss is None:
                return False
            self._scheduler.step(loss)
        elif self._scheduler is not None:
            self._scheduler.step()
        self._note_changes()
        return True

    def _note_changes(self) -> None:
        for first, group in zip(self._first, self._optimizer.param_groups, strict=True):
            self._changed |= {key for key in first if key != "params" and group[key] != first[key]}


def make_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule | None, per: Per) -> LRScheduler | None:
    """Return the scheduler that the user's function makes. Raises UsageError if it is none, or cannot step once per round."""
    if schedule is None:
        return None
    scheduler = schedule(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau) and per != "epoch":
        raise UsageError("ReduceLROnPlateau looks at the mean loss of an epoch: give schedule_per='epoch' with it.")
    if not isinstance(scheduler, LRScheduler):
        raise UsageError(f"schedule must return one of torch.optim.lr_scheduler, not a {type(scheduler).__name__}.")
    return scheduler


def silence_scheduler_warnings() -> None:
    """Ignore a warning of schedulers that is about their dummy optimizers."""
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
