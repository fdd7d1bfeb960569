"""A script that carries something from batch to batch is told of it, and one that does not is left in peace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.worker.loop.repeat import Repeat, may_repeat
from roundtable.worker.replica.replica import Replica

SCRIPT = """
import torch, roundtable
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
g = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(64, 16, generator=g), torch.randint(0, 4, (64,), generator=g))
run = roundtable.join()
m = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 4))
run.replicate(m)
opt = run.optimizer(torch.optim.SGD, lr=0.1)
hidden, own, count = torch.zeros(4), torch.Generator().manual_seed(3), 0
for x, y in run.batches(data, micro_batch=4, global_batch=16, epochs=2):
    out = m(x.mul_(2))  # what is written to a batch is gone with it
    if MODE == "hidden":
        out = out + hidden
        hidden = out.detach().mean(0)
    elif MODE == "generator":
        out = out + torch.randn(4, generator=own)
    elif MODE == "counter":
        out = out / (1 + count)
        count += 1
    loss = cross_entropy(out, y)
    loss.backward()
    run.log(loss=loss)
    opt.step()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hidden", "generator", "counter", "clean"])
def test_a_script_that_carries_something_from_batch_to_batch_is_told_of(
    mode: str, launch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(f"MODE = {mode!r}\n{SCRIPT}")
    summary = launch("--workers", 2, tmp_path / "script.py")
    with contextlib.closing(RunLogReader(tmp_path / "run" / FILE_NAME)) as log:
        told = [event.data["text"] for *_, event in log.events() if "twice" in str(event.data.get("text"))]
        assert sum(row.hi - row.lo for row in log.contributions() if row.outcome == "committed") == 32
    assert (summary["samples"], summary["duplicates_ignored"]) == (128, 0)
    if mode == "clean":
        assert told == []
    else:
        (sentence,) = told
        assert "worker-0" in sentence and "the gradient of '0.weight' differs: the script carries something" in sentence


def test_what_differs_first_is_named_unless_the_weights_are_others() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    replica = Replica(model, {id(p): 0 for p in model.parameters()}, servers=1)
    assert may_repeat(replica)
    repeat = Repeat(replica)
    model(torch.ones(1, 3)).sum().backward()
    repeat.note()
    assert repeat.differs() is None
    assert model[1].bias.grad is not None
    model[1].bias.grad[0] = -model[1].bias.grad[0]  # type: ignore[index]
    assert repeat.differs() == "1.bias"
    model[0].weight.grad = None
    assert repeat.differs() == "0.weight"
    with torch.no_grad():
        model[1].weight.add_(1)
    assert repeat.differs() is None
