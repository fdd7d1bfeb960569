"""Which optimizers servers can run, what settings they are sent, and that every schedule is that of a plain loop."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.optim.optimizer import (
    Hypers,
    Schedule,
    check_shapes,
    example_optimizer,
    is_whole,
    make_optimizer,
    make_schedule,
    name_of,
    parameter_groups,
    plain_settings,
)
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.optim.script_optimizer import Optimizer
from roundtable.worker.run import Run
from roundtable.worker.session.assembly import Assembly

CLASSES = [cls for cls in vars(torch.optim).values() if inspect.isclass(cls) and cls is not torch.optim.Optimizer]
#: Classes of torch.optim whose update of an element looks at others of the tensor.
WHOLE_TENSOR = {torch.optim.Adafactor, torch.optim.Muon}
#: Classes of torch.optim that servers cannot run, and a word of the reason that is given.
REFUSED = {torch.optim.LBFGS: "closure", torch.optim.SparseAdam: "dense gradients"}


def refusal(call: Callable[[], object]) -> str:
    """The UsageError that `call` raises, checked to be sentences on one line."""
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and ".." not in text and "\n" not in text
    return text


def check(cls: type[torch.optim.Optimizer], **hyper: Any) -> list[dict[str, Any]]:
    """The part of `Run.optimizer` before it tells the servers: the checks, and the groups' settings."""
    name_of(cls)
    example = example_optimizer(cls, parameter_groups(nn.Linear(2, 3), None), hyper)
    is_whole(cls, hyper)
    return plain_settings(example)


# ---- classes


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_of_torch_optim_that_needs_gradients_only_is_accepted_and_else_refused_saying_why(cls: Any) -> None:
    if cls not in REFUSED:
        assert "lr" in check(cls)[0] and is_whole(cls, {}) == (cls in WHOLE_TENSOR)
        return
    text = refusal(lambda: check(cls))
    assert text.startswith(f"{cls.__name__} cannot run on parameter servers") and REFUSED[cls] in text
    assert "SGD or AdamW" in text


class Centred(torch.optim.SGD):
    """Subtracts each gradient's mean over its tensor, so it is not elementwise."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad - p.grad.mean()
        super().step(closure)


class OnlyMine(torch.optim.SGD):
    """Elementwise, but not a class that servers have."""


def test_an_update_that_looks_at_the_whole_tensor_is_found_out_in_a_class_of_the_users_own() -> None:
    assert is_whole(Centred, {"lr": 0.1})


class Balanced(torch.optim.SGD):
    """Divides all gradients by their norm over all tensors."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
            for p in group["params"]:
                p.grad = p.grad / norm
        super().step(closure)


def test_an_update_that_looks_at_other_tensors_is_refused() -> None:
    assert "its update of one tensor depends on others" in refusal(lambda: is_whole(Balanced, {"lr": 0.1}))


def test_a_shape_that_a_class_does_not_take_is_refused_with_what_to_do() -> None:
    text = refusal(lambda: check_shapes(torch.optim.Muon, {"params": nn.Linear(2, 3).parameters()}, {}))
    assert (
        "Muon does not take a parameter of shape [3]: Muon only supports 2D" in text and "'optimizer': torch.optim.AdamW" in text
    )


def test_groups_may_have_classes_of_their_own_with_their_own_arguments() -> None:
    given = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "optimizer": torch.optim.Muon, "lr": 0.3},
        {"params": [nn.Parameter(torch.ones(2))]},
        {"params": [nn.Parameter(torch.ones(2))], "lr": 0.5},
    ]
    example = example_optimizer(torch.optim.Adam, parameter_groups(nn.Linear(1, 1), given), {"betas": (0.5, 0.6), "lr": 0.1})
    shown = plain_settings(example)
    assert [group["lr"] for group in shown] == [0.3, 0.1, 0.5]
    assert ["betas" in group for group in shown] == [False, True, True] and shown[0]["ns_steps"] == 5
    assert example.defaults["betas"] == (0.5, 0.6)
    wrong = [{"params": [nn.Parameter(torch.ones(2))], "optimizer": "Muon"}]
    assert "must be a class" in refusal(lambda: example_optimizer(torch.optim.Adam, wrong, {}))


def test_a_class_of_the_users_own_is_sent_by_its_path() -> None:
    assert name_of(OnlyMine) == f"{__name__}.OnlyMine" and name_of(torch.optim.AdamW) == "AdamW"


def test_a_class_that_servers_cannot_import_is_refused_even_if_it_is_called_like_one_of_torchs() -> None:
    imposter = type("SGD", (torch.optim.SGD,), {})
    in_script = type("Lion", (torch.optim.SGD,), {"__module__": "__main__"})
    for cls in (imposter, in_script):
        text = refusal(lambda cls=cls: check(cls, lr=0.1))  # type: ignore[misc]
        assert "not a class of torch.optim, and servers cannot import it" in text and f"{cls.__name__.lower()}.py beside" in text


class Remembering(torch.optim.SGD):
    """Keeps a list in its state."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["norms"] = [*self.state[p].get("norms", ()), float(p.grad.norm())]
        super().step(closure)


def test_a_class_whose_state_no_checkpoint_can_have_is_refused() -> None:
    assert "it keeps a list in its state" in refusal(lambda: is_whole(Remembering, {"lr": 0.1}))


@pytest.mark.parametrize("cls", [torch.optim.Muon, torch.optim.Adafactor, OnlyMine], ids=lambda cls: cls.__name__)
def test_where_workers_step_locally_any_class_will_do(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Stop(Exception):
        pass

    def set_up(context: Any, replica: Any, update: Any, *more: Any) -> None:
        made.append(update)
        raise Stop

    monkeypatch.setattr("roundtable.worker.session.assembly.ModelSetup", set_up)

    run: Any = Run.__new__(Run)
    run._model, run._buffer_rules = nn.Linear(2, 3, bias=False), {}
    context: Any = SimpleNamespace(policy=SimpleNamespace(is_local=True, outer_optimizer=None, applies="round"))
    none: Any = None
    assembly = Assembly(context, none, none, none, none, none, 1, (none, none))
    run._session = SimpleNamespace(training=None, assembly=assembly)
    with pytest.raises(Stop):
        Run.optimizer(run, cls, lr=0.1)
    assert made[0].optimizer is None
    run._model = nn.Linear(2, 3)
    if cls is torch.optim.Muon:
        assert "2D" in refusal(lambda: Run.optimizer(run, cls, lr=0.1))


# ---- settings


def test_a_setting_that_the_class_does_not_have_or_refuses_is_named() -> None:
    assert "momentun" in refusal(lambda: check(torch.optim.SGD, momentun=0.9))
    assert "Invalid learning rate" in refusal(lambda: check(torch.optim.Adam, lr=-1.0))
    assert "Invalid beta" in refusal(lambda: make_optimizer(torch.optim.Adam, [{"params": [torch.zeros(1)]}], {"betas": (2, 0)}))


@pytest.mark.parametrize(("key", "value"), [("lr", torch.tensor(0.1)), ("lr", nn.Parameter(torch.tensor(0.1)))])
def test_a_tensor_for_a_setting_is_refused(key: str, value: Any) -> None:
    assert "lr is a " in refusal(lambda: check(torch.optim.Adam, **{key: value}))


@pytest.mark.parametrize("keyword", ["fused", "foreach", "maximize", "differentiable"])
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in REFUSED], ids=lambda cls: cls.__name__)
def test_keywords_that_choose_an_implementation_reach_the_servers_if_the_class_has_them(cls: Any, keyword: str) -> None:
    if keyword in inspect.signature(cls).parameters:
        assert check(cls, **{keyword: True})[0][keyword] is True
    else:
        assert keyword in refusal(lambda: check(cls, **{keyword: True}))


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.RAdam, torch.optim.ASGD], ids=lambda cls: cls.__name__)
def test_capturable_is_refused_by_name(cls: Any) -> None:
    assert "capturable" in refusal(lambda: check(cls, capturable=True))


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), 1, np.int64(1)], ids=repr)
def test_numbers_of_numpy_are_sent_as_plain_numbers(number: Any) -> None:
    (settings,) = check(torch.optim.AdamW, lr=number, betas=(np.float64(0.5), 0.75))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings))["betas"] == [0.5, 0.75]
    assert settings["lr"] == number and type(settings["lr"]) in (int, float)


# ---- groups


def test_groups_have_settings_of_their_own_and_share_the_others() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = parameter_groups(
        model,
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].weight, "weight_decay": 0.1, "lr": 0.25}],
    )
    settings = plain_settings(example_optimizer(torch.optim.SGD, groups, {"lr": 0.125, "momentum": 0.9}))
    assert [(s["lr"], s["weight_decay"], s["momentum"]) for s in settings] == [(0.5, 0, 0.9), (0.25, 0.1, 0.9)]
    assert [[p.numel() for p in group["params"]] for group in groups] == [[6, 3], [3]]


@pytest.mark.parametrize(
    "given",
    [
        lambda m: None,
        lambda m: m.parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.named_parameters()}],
    ],
    ids=["none", "parameters", "group", "named", "group of named"],
)
def test_parameters_are_taken_in_every_form_that_torch_takes_and_frozen_ones_kept(given: Callable[[Any], Any]) -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model, given(model))
    assert [id(p) for p in group["params"]] == [id(model.weight), id(model.bias)]


def test_nothing_to_train_and_a_parameter_given_twice_are_refused() -> None:
    model = nn.Linear(2, 3)
    assert "twice" in refusal(lambda: parameter_groups(model, [{"params": model.weight}, {"params": model.parameters()}]))
    assert "nothing to train" in refusal(lambda: parameter_groups(model, []))
    assert "nothing to train" in refusal(lambda: parameter_groups(nn.ReLU(), None))
    assert "nothing to train" in refusal(lambda: parameter_groups(model.requires_grad_(False), None))


# ---- schedules

STEPS = 40
SCHEDULES: dict[str, Schedule] = {
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [3, 11, 12], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.25, 9),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 13),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.91),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 20, 1.7),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 15, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 5), schedulers.CosineAnnealingLR(o, 20)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.95)]
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 4, 6, "triangular2"),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.4, 0.2], total_steps=STEPS + 1),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: np.cos(t / 50)]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9 if t % 2 else 1.05),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=6),
}
#: What is not made into a schedule of its own here: bases, and the one that looks at the loss.
OTHER = {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}


def groups() -> list[dict[str, Any]]:
    """Two parameter groups with different learning rates."""
    return [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in (0.1, 0.03)]


#: Optimizers that a cycling scheduler may also cycle the momentum of.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
}


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """All settings that a step of the optimizer depends on."""
    keys = ("lr", "momentum", "betas", "weight_decay")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


@pytest.fixture(autouse=True)
def no_scheduler_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_loop(optimizer: str, schedule: Schedule, steps: int) -> list[list[dict[str, Any]]]:
    """The settings with which a plain loop steps, for each of `steps`."""
    cls, hyper = OPTIMIZERS[optimizer]
    plain = cls(groups(), **hyper)
    scheduler = schedule(plain)
    seen = []
    for _ in range(steps):
        for group in plain.param_groups:
            for p in group["params"]:
                p.grad = torch.ones(2)
        seen.append(settings_of(plain))
        plain.step()
        scheduler.step()
    return seen


def hypers(optimizer: str, schedule: Schedule | None, per: Any = "round") -> tuple[Hypers, list[dict[str, Any]]]:
    """A worker's Hypers, and the settings that servers were set up with."""
    cls, hyper = OPTIMIZERS[optimizer]
    example = example_optimizer(cls, groups(), hyper)
    return Hypers(example, schedule, per, lambda epoch: None), settings_of(example)


def on_server(first: list[dict[str, Any]], sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups' settings after what the worker sent, as a message, has overridden them."""
    received = cast(list[dict[str, Any]], msgspec.msgpack.decode(msgspec.msgpack.encode(sent)))
    received = [{key: tuple(v) if isinstance(v, list) else v for key, v in group.items()} for group in received]
    return [{**a, **b} for a, b in zip(first, received, strict=True)]


def test_every_scheduler_of_torch_is_among_those_tested() -> None:
    base = schedulers.LRScheduler
    there_are = {n for n, c in vars(schedulers).items() if inspect.isclass(c) and issubclass(c, base)}
    assert there_are - OTHER <= set(SCHEDULES)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_settings_of_each_round_are_those_of_a_plain_loops_step(name: str, optimizer: str) -> None:
    ours, first = hypers(optimizer, SCHEDULES[name])
    assert [on_server(first, ours.at(t, t // 8)) for t in range(STEPS)] == plain_loop(optimizer, SCHEDULES[name], STEPS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_stepped_per_epoch_the_settings_hold_for_all_rounds_of_it(name: str, optimizer: str) -> None:
    ours, first = hypers(optimizer, SCHEDULES[name], "epoch")
    plain = plain_loop(optimizer, SCHEDULES[name], STEPS // 4)
    assert [on_server(first, ours.at(t, t // 4)) for t in range(STEPS)] == [plain[t // 4] for t in range(STEPS)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_worker_that_computes_only_some_rounds_sends_the_same_as_one_that_computes_all(name: str) -> None:
    every, _ = hypers("SGD", SCHEDULES[name])
    some, _ = hypers("SGD", SCHEDULES[name])
    sent = [every.at(t, 0) for t in range(STEPS)]
    assert [some.at(t, 0) for t in (0, 5, 6, 21, 38)] == [sent[t] for t in (0, 5, 6, 21, 38)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_is_cycled_against_the_learning_rate(name: str, optimizer: str) -> None:
    ours, first = hypers(optimizer, SCHEDULES[name])
    key = "momentum" if optimizer == "SGD" else "betas"
    assert len({on_server(first, ours.at(t, 0))[0][key] for t in range(STEPS)}) > 5


def test_without_a_schedule_nothing_is_sent() -> None:
    ours, _ = hypers("SGD", None)
    assert ours.at(0, 0) == ours.at(100, 10) == []


def test_a_schedule_that_makes_the_rate_a_tensor_or_is_none_of_torchs_is_refused() -> None:
    ours, _ = hypers("SGD", lambda o: schedulers.LambdaLR(o, lambda t: torch.tensor(math.exp(-t))))  # type: ignore[arg-type, return-value]
    assert "lr is a Tensor" in refusal(lambda: ours.at(1, 0))
    sgd = torch.optim.SGD(groups())
    assert "schedule must return" in refusal(lambda: make_schedule(sgd, lambda o: cast(Any, o), "round"))


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf, 2.0**54, "many", torch.ones(2), torch.tensor(-3)])
def test_a_weight_that_cannot_be_one_is_refused_with_the_line_that_gives_it(weight: Any) -> None:
    optimizer = Optimizer(lambda given: None, RoundSettings(groups()), {}, [])
    with pytest.raises(UsageError, match=r"^the weight of a micro-batch is .* \(test_optimizer.py line \d+\): opt.step\(.*\.$"):
        optimizer.step(weight=weight)


@pytest.mark.parametrize("weight", [None, 0, 3, 0.25, torch.tensor(7), torch.tensor([2.5])])
def test_a_weight_may_be_any_number_from_0_on(weight: Any) -> None:
    given: list[float | None] = []
    Optimizer(given.append, RoundSettings(groups()), {}, []).step(weight=weight)
    assert given == [None if weight is None else float(weight)]
