"""A user's script that keeps an average of the weights, once a round, and writes it to FOLDER/NAME.pt."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, ROUNDS = 16, 4, 2, 16
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def lr_of(round_: int) -> float:
    """The learning rate after so many rounds."""
    return 0.05 if round_ < 5 else 0.02


def main(folder: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(classifier())
    ema = averaged(model)
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    rounds: list[int] = []

    @run.on_round
    def at_the_end() -> None:
        ema.update_parameters(model)
        rounds.append(run.round)
        opt.param_groups[0]["lr"] = lr_of(run.round)

    for _ in range(2):
        for x, y in run.batches(dataset(), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=EPOCHS, shuffle=False):
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call,unused-ignore]
            opt.step()
    torch.save({"rounds": rounds, "updates": int(ema.n_averaged), "ema": ema.module.state_dict()}, Path(folder, f"{run.name}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
