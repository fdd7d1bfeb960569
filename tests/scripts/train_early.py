"""A user's script that stops early: `python train_early.py WHO ROUND`: WHO is `all`, or the number of the worker that asks."""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS = 16, 4, 6
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def main(who: str, at_round: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(classifier())
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    for _ in range(2):
        for x, y in run.batches(dataset(), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=EPOCHS // 2, shuffle=False):
            assert not run.stopped
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
            run.log(loss=loss)
            if run.round >= int(at_round) and who in ("all", str(run.index)):
                run.stop("it is good enough")
            opt.step()
    assert run.stopped
    print(f"{run.name} ended at round {run.round}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
