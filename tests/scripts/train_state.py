"""A user's script that goes on where it was: `python train_state.py EPOCHS FOLDER`. Its state has what each epoch came to."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EVALUATED = 16, 4, 5
OPTIMIZER: dict[str, Any] = {"lr": 0.4, "momentum": 0.9}
STEPS = {"step_size": 2, "gamma": 0.3}


def dataset(seed: int, samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] + inputs[:, 1] > 0).long())


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def main(epochs: str, folder: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(classifier())
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    schedule = StepLR(opt, **STEPS)
    done = []
    for epoch in run.epochs(int(epochs)):
        for x, y in run.batches(dataset(1, 64), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, shuffle=False):
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call,unused-ignore]
            opt.step()
        schedule.step()
        found = run.evaluate(
            lambda batch: {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}, dataset(2, 43), micro_batch=EVALUATED
        )
        losses = [*run.state.get("losses", []), found["loss"]]
        run.state.update(losses=losses, best=min(losses), weights=model[0].weight.detach().clone())
        done.append((epoch, run.round, opt.param_groups[0]["lr"]))
    kept = {"losses": run.state["losses"], "best": run.state["best"], "sum": float(run.state["weights"].double().sum())}
    Path(folder, f"{run.name}.json").write_text(json.dumps({"done": done, **kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
