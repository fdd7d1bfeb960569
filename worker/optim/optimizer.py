"""The user's settings of the optimizer, checked on the worker and converted into what servers need.

The update itself runs on the servers with torch.optim's own class. Under policies that step locally, it runs here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
#: The key of a parameter group under which its own class is.
OWN_CLASS = "optimizer"


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


def class_of(group: Mapping[str, Any], cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the class of a parameter group: its own, or `cls`. Raises UsageError if its own is no optimizer."""
    own = group.get(OWN_CLASS, cls)
    if not (isinstance(own, type) and issubclass(own, torch.optim.Optimizer)):
        raise UsageError(f"'{OWN_CLASS}' of a parameter group must be a class such as torch.optim.AdamW, not {own!r:.80}.")
    return own


def arguments_of(group: Mapping[str, Any], hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the class of a parameter group. Those of `run.optimizer` are for its own class only."""
    return {key: value for key, value in group.items() if key not in ("params", OWN_CLASS)} if OWN_CLASS in group else dict(hyper)


class Several(torch.optim.Optimizer):
    """An optimizer whose parameter groups have classes of their own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], defaults: dict[str, Any]) -> None:
        """`parts` have one parameter group each."""
        super().__init__([{"params": part.param_groups[0]["params"]} for part in parts], defaults)
        self._parts, self.param_groups = parts, [part.param_groups[0] for part in parts]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def example_optimizer(cls: type[torch.optim.Optimizer], groups: Groups, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of the same class and settings over one dummy element per group.

    It checks the settings, and a schedule can step it to get the settings of every round. Raises UsageError if torch.optim
    refuses the settings.
    """
    return make_optimizer(cls, [{**group, "params": [torch.zeros(1, 1, requires_grad=True)]} for group in groups], hyper)


def make_optimizer(cls: type[torch.optim.Optimizer], groups: Groups, hyper: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of this class, or of several, if groups have their own. Raises UsageError if torch.optim refuses the
    settings or the parameters.
    """
    if not any(OWN_CLASS in group for group in groups):
        return _made(cls, groups, hyper)
    parts = []
    for group in groups:
        bare = {key: value for key, value in group.items() if key != OWN_CLASS}
        parts.append(_made(class_of(group, cls), [bare], {} if OWN_CLASS in group else hyper))
    main = next((part for part, group in zip(parts, groups, strict=True) if OWN_CLASS not in group), parts[0])
    return Several(parts, main.defaults)


def _made(cls: type[torch.optim.Optimizer], groups: Groups, hyper: dict[str, Any]) -> torch.optim.Optimizer:
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


def name_of(cls: type[torch.optim.Optimizer]) -> str:
    """Return the name by which servers find a class: that of a class of torch.optim, or the path of another one.

    Raises UsageError if servers cannot import the class.
    """
    if getattr(torch.optim, cls.__name__, None) is cls:
        return str(cls.__name__)
    name, module = f"{cls.__module__}.{cls.__qualname__}", sys.modules.get(cls.__module__)
    if cls.__module__ == "__main__" or getattr(module, cls.__qualname__, None) is not cls:
        raise UsageError(
            f"{name} is not a class of torch.optim, and servers cannot import it: define it in a module of its own, such as "
            f"{cls.__name__.lower()}.py beside the script. Policies local and average accept any class, because it runs on the "
            "workers."
        )
    return name


def is_whole(cls: type[torch.optim.Optimizer], hyper: dict[str, Any]) -> bool:
    """Return True if the update of one element depends on others of its tensor (Adafactor, Muon).

    Servers hold slices of flattened tensors, unless an update needs whole ones. Three steps on matrices are compared with the
    same steps on flattened halves. Raises UsageError for a class that servers cannot run: its step needs more than dense
    gradients (LBFGS, SparseAdam), or the update of a tensor depends on other tensors.
    """
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(6, 8, generator=generator) for _ in range(2)]
    gradients = [[torch.randn(6, 8, generator=generator) for _ in starts] for _ in range(3)]
    why = f"{cls.__name__} cannot run on parameter servers"
    advice = "Choose one that needs gradients only, such as SGD or AdamW."
    try:
        both = _stepped(cls, hyper, starts, gradients)
        apart = [_stepped(cls, hyper, [start], [[given[n]] for given in gradients])[0] for n, start in enumerate(starts)]
    except Exception as error:  # the class may object with any exception
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{why}: {text.rstrip('.')}. {advice}") from None
    if not all(map(torch.equal, both, apart)):
        raise UsageError(f"{why}: its update of one tensor depends on others, which other servers may have. {advice}")
    try:
        cut = starts[0].reshape(-1).split(24)
        halves = _stepped(cls, hyper, cut, [list(given[0].reshape(-1).split(24)) for given in gradients])
    except Exception:  # it objects to slices
        return True
    return not torch.equal(both[0].reshape(-1), torch.cat(halves))


def _stepped(
    cls: type[torch.optim.Optimizer],
    hyper: dict[str, Any],
    starts: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Return tensors after a step with each of `gradients`, which are updated in one group."""
    tensors = [start.clone() for start in starts]
    optimizer = cls(tensors, **hyper)
    for some in gradients:
        for tensor, gradient in zip(tensors, some, strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    values = [value for tensor in tensors for value in optimizer.state[tensor].values()]
    if strange := [type(value).__name__ for value in values if not isinstance(value, torch.Tensor | int | float | None)]:
        raise TypeError(f"it keeps a {strange[0]} in its state, and checkpoints have tensors and numbers only")
    return tensors


def check_shapes(cls: type[torch.optim.Optimizer], group: Mapping[str, Any], hyper: dict[str, Any]) -> None:
    """Raise UsageError if a class that updates whole tensors does not take the shapes of a group's parameters."""
    for parameter in group["params"]:
        try:
            cls([torch.empty(parameter.shape, device="meta", requires_grad=True)], **hyper)
        except Exception as error:
            text = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UsageError(
                f"{cls.__name__} does not take a parameter of shape {list(parameter.shape)}: {text}. Put such parameters into a "
                "group with a class of its own: {'params': biases, 'optimizer': torch.optim.AdamW, 'lr': 0.001}."
            ) from None


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
        """Return whether the schedule sets this setting: the rate, and all that it has ever changed."""
        return self._scheduler is not None and (key == "lr" or key in self._changed)

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
