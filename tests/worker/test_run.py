"""The calls of a run, and when a script may make them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.data import TensorDataset

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.model.layout import make_layout
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.data.arguments import resolve
from roundtable.worker.loop.departure import Departure
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.run import Run
from roundtable.worker.session.batches import Batches
from roundtable.worker.session.segments import Segments
from roundtable.worker.session.session import Session
from roundtable.worker.session.training import Training

DATA = TensorDataset(torch.zeros(8))


def segments(round_: int = 0, weights: tuple[int, ...] = (1,)) -> Segments:
    table = ShareTable(0, 0, [f"worker-{n}" for n in range(len(weights))], list(weights))
    context: Any = SimpleNamespace(settings=Settings(), name="worker-0", io=SimpleNamespace(lock=threading.Lock()))
    work: Any = SimpleNamespace(round=round_, updates=round_)
    return Segments(context, TaskQueue("worker-0", [table]), Departure(), 1, lambda: work)


def run(**attributes: Any) -> Run:
    """A run whose session has the attributes that the calls tested here look at."""
    context = SimpleNamespace(settings=Settings())
    session = SimpleNamespace(**{"training": None, "segments": segments(), "context": context, **attributes})
    made = Run.__new__(Run)
    made._session, made.device = cast(Any, session), torch.device("cpu")
    return made


def refusal(of: Run, data: Any = DATA, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        next(iter(of.batches(data, **arguments)))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def work() -> SimpleNamespace:
    return SimpleNamespace(replica=SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_batches_may_be_made_before_the_optimizer_but_the_loop_needs_it() -> None:
    assert "run.optimizer" in refusal(run())
    assert run().batches(DATA, micro_batch=2, global_batch=4, epochs=3).rounds == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"micro_batch": 9, "global_batch": 8}, "micro_batch (9) must not exceed global_batch (8)."),
        ({"batch_size": 4}, "batches() has no argument 'batch_size': pass micro_batch, the samples of one forward, and"),
        ({"data": (x for x in [1])}, "generator can be read only once, but any worker may have to read any sample"),
        (
            {"global_batch": 5, "micro_batch": 4, "min_micro_batch": 3},
            "global_batch 5 cannot be cut into micro-batches of 3 to 4 samples: make it a multiple of micro_batch, or",
        ),
        (
            {"global_batch": 16, "micro_batch": 4, "drop_last": True},
            "an epoch has 8 samples, of which none would be used: drop_last leaves out rounds of fewer than 16.",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_the_line_where_the_script_has_it(arguments: dict[str, Any], said: str) -> None:
    line = refusal.__code__.co_firstlineno + 2
    assert refusal(run(), **arguments).startswith(f"test_run.py line {line}: {said}")


def test_a_loop_that_was_left_early_cannot_be_followed_by_another() -> None:
    first = make_segment(before=None, samples=8, global_batch=4, micro_batch=2, epochs=3, round_limit=None)
    known = segments(round_=5)
    known._all.append(first)
    training = SimpleNamespace(work=work(), schedule=None)
    assert "stopped at round 5 of 6" in refusal(run(training=training, segments=known))


def test_the_length_is_this_workers_share_of_what_is_left_and_total_rounds_go_on_counting() -> None:
    data = torch.arange(20)
    sizes: dict[str, Any] = {"micro_batch": 2, "global_batch": 8, "epochs": 2}  # rounds of 4, 4 and 2 micro-batches
    assert [len(run(segments=segments(0, weights)).batches(data, **sizes)) for weights in ((1,), (1, 1), (3, 1))] == [20, 10, 16]
    assert len(run(segments=segments(4)).batches(data, **sizes)) == 6
    mine = run()
    batches = mine.batches(data, **sizes)
    assert (batches.rounds, mine.total_rounds) == (6, 6)
    mine._session.segments._all.append(cast(Any, mine._session.segments.planned))
    assert (mine.batches(data, drop_last=True, **sizes).rounds, mine.total_rounds) == (4, 10)


def test_each_loop_over_the_same_batches_is_a_segment() -> None:
    loops: list[int] = []
    known = segments()

    def loop(data: Any, segment: Any) -> Any:
        loops.append(len(batches))
        yield from "ab"

    batches = Batches(resolve(DATA, {"micro_batch": 2, "global_batch": 4, "epochs": 1}, 0, 0), known, loop)
    assert [list(batches), list(batches), loops] == [["a", "b"], ["a", "b"], [4, 4]]


def test_answers_of_the_key_value_store_show_in_beats_that_something_moves() -> None:
    kv = SimpleNamespace(answered=0)
    session: Any = SimpleNamespace(router=SimpleNamespace(traffic=None), work=None, kv=kv, _finished=False)
    before = Session.heartbeat(session)
    kv.answered += 1
    assert Session.heartbeat(session) != before
    session.kv = None
    assert Session.heartbeat(session).state == "starting"


def test_a_greedy_merge_needs_to_be_told_which_of_two_models_is_better() -> None:
    work = cast(LocalSgdLoop, SimpleNamespace(_merge_by="greedy", _script=SimpleNamespace(evaluate=None)))
    with pytest.raises(UsageError, match=r"call run\.merge_by\(evaluate\) before run\.batches\(\)\.$"):
        next(LocalSgdLoop.batches(work, cast(Any, None), cast(Any, None)))


def test_which_weights_masters_waits_for_is_told_with_process_round_and_chunks() -> None:
    layout = make_layout([TensorSpec("w", [2], "float32", 0), TensorSpec("v", [2], "float32", 0)], 2)
    client = ParameterClient(layout, Settings(), pulls_follow=False)
    told: list[str] = []

    def wait(ready: Callable[[], Any], what: Callable[[], str], every: float | None = None) -> None:
        assert not ready()
        told.append(what())

    link = SimpleNamespace(lock=threading.Lock(), send=lambda *messages: None)
    context: Any = SimpleNamespace(wait=wait, io=link, settings=Settings(compress_weights="bf16"))
    work = GradientLoop.__new__(GradientLoop)
    work.version = lambda: 7  # type: ignore[method-assign]
    assert Training(context, cast(Any, None), client, work, None).full_precision() == {}
    chunks = {f"server-{n}": ", ".join(str(chunk.id) for chunk in layout.on(n)) for n in layout.owners()}
    servers = " and ".join(f"{name} (chunks {ids})" for name, ids in chunks.items())
    assert told == [f"the trained weights of round 7 from {servers}"]
