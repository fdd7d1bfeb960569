"""What a script may ask of its run, and when."""

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
from roundtable.common.model.layout import make_layout
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.loop.gradient_loop import GradientLoop
from roundtable.worker.loop.local_sgd import LocalSgdLoop
from roundtable.worker.run import Run
from roundtable.worker.session.segments import Segments
from roundtable.worker.session.session import Session
from roundtable.worker.session.training import Training

DATA = TensorDataset(torch.zeros(8))


def segments(round_: int = 0) -> Segments:
    context: Any = SimpleNamespace(settings=Settings())
    return Segments(context, cast(Any, None), 1, lambda: round_)


def run(**attributes: Any) -> Run:
    """A run whose session has the attributes that the calls tested here look at."""
    session = SimpleNamespace(**{"training": None, "segments": segments(), **attributes})
    return cast(Run, SimpleNamespace(_session=session))


def refusal(of: Run, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        next(Run.batches(of, DATA, **arguments))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_batches_come_after_the_optimizer_and_a_micro_batch_is_no_larger_than_the_global_batch() -> None:
    assert "run.optimizer" in refusal(run())
    assert "micro_batch (9)" in refusal(run(training=object()), micro_batch=9, global_batch=8)


def test_a_loop_that_was_left_early_cannot_be_followed_by_another() -> None:
    first = make_segment(before=None, samples=8, global_batch=4, micro_batch=2, epochs=3, round_limit=None)
    known = segments(round_=5)
    known._all.append(first)
    assert "stopped at round 5 of 6" in refusal(run(training=object(), segments=known))


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
