"""A user's script that keeps an average of the weights, once a round, and writes it to FOLDER/NAME.pt."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_early import GLOBAL_BATCH, MICRO_BATCH, OPTIMIZER, classifier, dataset

EPOCHS, ROUNDS = 2, 16


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
