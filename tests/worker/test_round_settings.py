"""A round's settings are those of a plain loop, whichever micro-batches a worker computes, and whenever it joins."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from test_optimizer import OPTIMIZERS, SCHEDULES, STEPS, groups, plain_loop, settings_of
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.protocol.messages.gradients import UsedSettings
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.optim.optimizer import Hypers, Schedule
from roundtable.worker.optim.round_settings import RoundSettings
from roundtable.worker.optim.script_optimizer import Optimizer

#: Rounds of a loop over batches.
LOOP = 10


@pytest.fixture(autouse=True)
def no_scheduler_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def segment_of(round_: int) -> Any:
    before = None
    for _ in range(round_ // LOOP + 1):
        before = make_segment(before=before, samples=LOOP, global_batch=1, micro_batch=1, epochs=1, round_limit=None)
    return before


class Server:
    """Server 0's memory of the rounds."""

    def __init__(self) -> None:
        self.told: UsedSettings | None = None
        self.hypers: list[list[dict[str, Any]]] = []


class Worker:
    """A worker whose script calls `sched.step()` for every micro-batch. It joins at some round, and computes what it is given."""

    def __init__(self, server: Server, make: Schedule | None, name: str = "SGD") -> None:
        cls, hyper = OPTIMIZERS[name]
        example = cls(groups(), **hyper)
        self.settings = RoundSettings([dict(group) for group in example.param_groups])
        self.settings.told = lambda: server.told
        self.server, self.round, self.bodies = server, 0, 0
        self.opt = Optimizer(lambda weight: self.settings.used(self.round), self.settings, example.defaults, [])
        self.before: Callable[[int], None] = lambda round_: None
        self.sched = make(self.opt) if make is not None else None
        self.settings.enter("train.py line 9")

    def body(self, round_: int) -> None:
        self.round, self.bodies = round_, self.bodies + 1
        self.before(round_)
        self.opt.step()
        if self.sched is not None:
            self.sched.step()

    def compute(self, round_: int, times: int) -> UsedSettings:
        """Compute some micro-batches of a round, and return what the push of the last one tells."""
        for _ in range(times):
            while not self.settings.begin(round_, 0):
                self.body(round_)
            self.body(round_)
        hypers, schedules = self.settings.at(round_, 0), self.settings.schedules(round_)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(UsedSettings(round_, hypers, schedules)), type=UsedSettings)


def values(first: list[dict[str, Any]], told: UsedSettings) -> list[dict[str, Any]]:
    """The groups' settings on the server."""
    sent: list[Any] = list(told.hypers) or [{}] * len(first)
    return [
        {key: tuple(v) if isinstance(v := {**a, **b}[key], list) else v for key in a} for a, b in zip(first, sent, strict=True)
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_counts_once_a_round_on_workers_that_skip_rounds_and_join_late(name: str, optimizer: str) -> None:
    chance, server = random.Random(name + optimizer), Server()
    workers = [Worker(server, SCHEDULES[name], optimizer) for _ in range(2)]
    plain = plain_loop(optimizer, SCHEDULES[name], STEPS)
    cls, hyper = OPTIMIZERS[optimizer]
    first = settings_of(cls(groups(), **hyper))
    for round_ in range(STEPS):
        if chance.random() < 0.2:
            workers[chance.randrange(2)] = Worker(server, SCHEDULES[name], optimizer)  # one is killed, another one joins late
        shares = chance.choice([(2, 1), (0, 3), (3, 0), (1, 1)])
        told = [worker.compute(round_, times) for worker, times in zip(workers, shares, strict=True) if times]
        assert [values(first, one) for one in told] == [plain[round_]] * len(told)
        known = [one for one in told if one.schedules is not None and one.schedules.steps_after]
        server.told = (known or told)[0]


def test_a_new_worker_watches_one_body_only_if_no_other_worker_has_seen_one() -> None:
    server = Server()
    one = Worker(server, SCHEDULES["StepLR"])
    server.told = one.compute(0, 1)
    late = Worker(server, SCHEDULES["StepLR"])
    assert late.compute(1, 2).schedules == one.compute(1, 1).schedules and late.bodies == 3
    server.told = one.compute(2, 1)
    late = Worker(server, SCHEDULES["StepLR"])
    assert late.compute(3, 2).hypers == one.compute(3, 1).hypers and late.bodies == 2


def test_without_schedulers_and_changes_nothing_is_sent_and_nothing_is_watched() -> None:
    late = Worker(Server(), None)
    told = late.compute(7, 2)
    assert (told.hypers, told.schedules, late.bodies) == ([], None, 2)


def test_a_scheduler_that_is_stepped_after_each_loop_counts_loops() -> None:
    def make(opt: torch.optim.Optimizer) -> LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1)

    losses = [3.0, 2.0, 2.5, 2.4, 2.0]
    whole = torch.optim.SGD(groups(), lr=0.1)
    plain, plateau = [], make(whole)
    for loss in losses:
        plain.append(whole.param_groups[0]["lr"])
        plateau.step(loss)
    server, seen = Server(), []
    scripts = [make_script(Worker(server, make)) for _ in range(2)]
    for loop, loss in enumerate(losses):
        for round_ in range(loop * LOOP, (loop + 1) * LOOP):
            told = scripts[round_ % 2](round_, loss)
        server.told = told
        seen.append(told.hypers[0]["lr"] if told.hypers else 0.1)
        if loop == 2:
            scripts[0] = make_script(Worker(server, make), joins_at=(loop + 1) * LOOP)
    assert seen == plain and len(set(plain)) > 1


def make_script(worker: Worker, joins_at: int = 0) -> Callable[[int, float], UsedSettings]:
    """A script that calls `sched.step(loss)` after each loop over batches."""
    sched = worker.sched
    worker.sched = None
    loops = 0

    def leave(loss: float) -> None:
        nonlocal loops
        worker.settings.leave(segment_of(loops * LOOP), max(joins_at, (loops + 1) * LOOP))
        loops += 1
        sched.step(loss)  # type: ignore[union-attr, arg-type]

    def compute(round_: int, loss: float) -> UsedSettings:
        while loops < joins_at // LOOP:
            leave(2.5 if loops == joins_at // LOOP - 1 else 99.0)  # a late worker sees only the newest loss
        while loops < round_ // LOOP:
            leave(losses_before[0])
        losses_before[0] = loss
        return worker.compute(round_, 1)

    losses_before = [0.0]
    return compute


def test_a_value_that_is_set_by_hand_before_the_step_holds_for_its_round_and_later_ones() -> None:
    server = Server()
    workers = [Worker(server, None) for _ in range(2)]
    for worker in workers:
        worker.before = lambda round_, worker=worker: (
            worker.opt.param_groups[1].update(lr=0.5 / (1 + round_)) if round_ > 1 else None
        )  # type: ignore[misc]
    assert [workers[t % 2].compute(t, 3).hypers for t in range(2)] == [[], []]
    for round_ in range(2, 6):
        sent = [dict(one) for one in workers[round_ % 2].compute(round_, 2).hypers]
        assert sent == [{"lr": 0.1}, {"lr": 0.5 / (1 + round_)}]


def test_a_worker_that_skips_the_round_of_a_change_takes_it_over() -> None:
    server = Server()
    workers = [Worker(server, None) for _ in range(3)]
    for worker in workers:
        worker.before = lambda round_, worker=worker: [g.update(lr=g["lr"] * 0.5) for g in worker.opt.param_groups if round_ == 3]  # type: ignore[misc]
    for round_ in range(4):
        server.told = workers[0].compute(round_, 2)
    assert [worker.compute(4, 1).hypers for worker in workers] == [[{"lr": 0.05}, {"lr": 0.015}]] * 3


def test_work_of_an_earlier_round_is_done_with_its_settings() -> None:
    worker = Worker(Server(), lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    rates = [worker.compute(t, 1).hypers[0]["lr"] if t else 0.1 for t in range(4) if worker.compute(t, 1)]
    assert rates == [0.1, 0.05, 0.025, 0.0125]
    assert worker.compute(1, 1).hypers[0]["lr"] == 0.05
    assert worker.compute(4, 1).hypers[0]["lr"] == 0.1 / 16
    late = Worker(Server(), lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    assert [late.compute(t, 2).hypers[0]["lr"] for t in (3, 1, 4, 2, 5)] == [0.1 / 2**t for t in (3, 1, 4, 2, 5)]


def test_pushes_that_begin_before_the_step_have_the_settings_of_the_step() -> None:
    worker = Worker(Server(), lambda o: lr_scheduler.ExponentialLR(o, 0.5))
    worker.compute(0, 1)
    worker.settings.begin(1, 0)
    early = worker.settings.at(1, 0)
    worker.body(1)
    assert early == worker.settings.at(1, 0) == [{"lr": 0.05}, {"lr": 0.015}] and not worker.settings.set_before_step


def test_a_change_before_the_step_is_known_to_come_too_late_for_such_pushes() -> None:
    worker = setting(lr=0.4)
    worker.opt.step()
    assert worker.settings.set_before_step
    worker.settings.begin(1, 0)
    worker.round = 1
    worker.opt.step()
    assert not worker.settings.set_before_step


# ---- wrong uses


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and "test_round_settings.py line" in text
    return text


def setting(**given: Any) -> Worker:
    worker = Worker(Server(), None)
    worker.settings.begin(0, 0)
    worker.opt.param_groups[0].update(given)
    return worker


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lr": float("nan")}, "lr of parameter group 0 was set to nan"),
        ({"lr": float("inf")}, "only numbers may be set"),
        ({"nesterov": True}, "nesterov of parameter group 0 was set to True"),
        ({"lr": "big"}, "was set to big"),
    ],
)
def test_a_setting_that_servers_cannot_take_is_refused_at_the_step(given: dict[str, Any], text: str) -> None:
    assert text in refusal(setting(**given).opt.step)


def test_two_values_in_one_round_are_refused() -> None:
    worker = setting(lr=0.4)
    worker.opt.step()
    worker.settings.begin(0, 0)
    worker.opt.param_groups[0]["lr"] = 0.3
    assert "lr of parameter group 0 was 0.4 in an earlier micro-batch of round 0, and is 0.3 now" in refusal(worker.opt.step)


def test_a_schedule_of_run_optimizer_and_another_one_are_refused() -> None:
    example = torch.optim.SGD(groups(), lr=0.1)
    settings = RoundSettings(
        [dict(g) for g in example.param_groups], Hypers(example, SCHEDULES["StepLR"], "round", lambda e: None)
    )
    opt = Optimizer(lambda weight: settings.used(20), settings, example.defaults, [])
    assert "StepLR is attached to an optimizer that has a schedule" in refusal(lambda: lr_scheduler.StepLR(opt, 3))
    settings.begin(20, 0)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.3**2)
    opt.step()
    opt.param_groups[0]["lr"] = 1.0
    assert "run.optimizer(schedule=...) sets it in every round" in refusal(opt.step)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_run_optimizer_has_its_settings_on_workers_that_skip_rounds_and_join_late(name: str) -> None:
    server = Server()

    def worker() -> tuple[RoundSettings, Optimizer]:
        example = torch.optim.SGD(groups(), lr=0.1, momentum=0.9)
        made = [dict(group) for group in example.param_groups]
        settings = RoundSettings(made, Hypers(example, SCHEDULES[name], "round", lambda epoch: None))
        settings.told = lambda: server.told
        return settings, Optimizer(lambda weight: settings.used(server.told.round + 1 if server.told else 0), settings, {}, [])

    every, some, late = worker(), worker(), worker()
    for round_ in range(2 * LOOP):
        computing = [every, *([some] if round_ % 3 == 0 else []), *([late] if round_ >= LOOP else [])]
        found = []
        for settings, opt in computing:
            for _ in range(2):
                assert settings.begin(round_, 0)
                opt.step()
            found.append(settings.at(round_, 0))
        assert all(one == found[0] for one in found)
        server.told = UsedSettings(round_, found[0])


def test_a_plateau_of_the_losses_of_single_batches_is_refused() -> None:
    worker = Worker(Server(), None)
    plateau = lr_scheduler.ReduceLROnPlateau(worker.opt)
    worker.settings.begin(0, 0)
    worker.opt.step()
    plateau.step(1.0)
    with pytest.raises(UsageError, match="each batch has another loss: call it after a loop"):
        worker.settings.begin(0, 0)


def test_an_optimizer_is_one_of_torchs_and_refuses_what_it_cannot_do() -> None:
    parameter = nn.Parameter(torch.ones(3))
    settings = RoundSettings([{"params": [parameter], "lr": 0.1}])
    opt = Optimizer(lambda weight: None, settings, {"lr": 0.1}, [])
    assert isinstance(opt, torch.optim.Optimizer) and opt.defaults == {"lr": 0.1} and opt.state == {}
    assert opt.param_groups[0]["params"] == [parameter] and "lr: 0.1" in repr(opt)
    assert "opt.step() is given a closure" in refusal(lambda: opt.step(lambda: 0.0))  # type: ignore[arg-type, return-value]
    assert "add_param_group() is called" in refusal(lambda: opt.add_param_group({"params": []}))
    assert "the servers have the optimizer's state" in refusal(opt.state_dict) + refusal(lambda: opt.load_state_dict({}))
    parameter.grad = torch.ones(3)
    opt.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros(3))
    opt.zero_grad()
    assert parameter.grad is None


def scaled(is_dense: bool = True) -> tuple[nn.Parameter, torch.amp.GradScaler, Optimizer, list[torch.Tensor | None]]:
    """A parameter whose gradient is the input, a scaler, an optimizer, and the gradients at its steps."""
    parameter, steps = nn.Parameter(torch.ones(3)), []
    settings = RoundSettings([{"params": [parameter], "lr": 0.1}])
    note = lambda weight: steps.append(parameter.grad.clone())  # type: ignore[union-attr]  # noqa: E731
    return parameter, torch.amp.GradScaler("cpu", init_scale=1024.0), Optimizer(note, settings, {"lr": 0.1}, [], is_dense), steps


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_grad_scaler_unscales_gradients_once_and_steps_even_if_they_are_not_finite(by_hand: bool) -> None:
    parameter, scaler, opt, steps = scaled()
    for x in (torch.tensor([1.0, 0.3, -7.0]), torch.tensor([1.0, float("inf"), 2.0])):
        scaler.scale((parameter * x).sum()).backward()
        if by_hand:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        parameter.grad = None
    assert torch.equal(steps[0], torch.tensor([1.0, 0.3, -7.0]))  # type: ignore[arg-type]
    assert not steps[1].isfinite().all() and scaler.get_scale() == 512.0  # type: ignore[union-attr]


def test_a_grad_scaler_is_refused_for_gradients_that_it_cannot_reach() -> None:
    parameter, scaler, opt, _ = scaled(is_dense=False)
    scaler.scale(parameter.sum()).backward()
    assert "use torch.autocast with bfloat16" in refusal(lambda: scaler.step(opt))
