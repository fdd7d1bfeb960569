"""A user's script: a classifier whose learning rate is set by schedulers, or by hand."""

import sys
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, ROUNDS = 8, 4, 4, 3
FEATURES, CLASSES = 6, 5
OPTIMIZER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9}


def dataset() -> TensorDataset:
    """As many samples as 3 rounds of 2 micro-batches have."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROUNDS * GLOBAL_BATCH, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (len(inputs),), generator=generator))


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def loss_of(model: nn.Module) -> float:
    inputs, labels = dataset().tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(inputs), labels))


def is_marked(inputs: torch.Tensor) -> bool:
    """Whether a batch is the one micro-batch of an epoch, in its last round, whose loss is not finite."""
    return torch.equal(inputs[0], dataset().tensors[0][-MICRO_BATCH])


class Rates:
    """A user's ways to set the rate. `opt` is any optimizer of torch.optim, so this serves a plain loop as well."""

    def __init__(self, opt: torch.optim.Optimizer, kind: str) -> None:
        self.opt, self.kind = opt, kind
        match kind:
            case "warmup":
                parts = [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, 8)]
                self.per_round: Any = lr_scheduler.SequentialLR(opt, parts, [4])
            case "cycle":
                self.per_round = lr_scheduler.OneCycleLR(opt, 1.0, total_steps=EPOCHS * ROUNDS + 1)
            case "epochs":
                self.per_epoch = lr_scheduler.StepLR(opt, 1, gamma=0.7)
            case "plateau":
                self.per_round = lr_scheduler.LambdaLR(opt, lambda t: 0.97**t)
                self.plateau = lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.2)

    def before_step(self, round_: int) -> None:
        if self.kind == "hand":
            for group in self.opt.param_groups:
                group["lr"] = 0.5 / (1 + round_)
        if self.kind == "hand" and round_ == 7:
            self.opt.param_groups[0]["momentum"] = 0.5

    def after_step(self) -> None:
        if hasattr(self, "per_round"):
            self.per_round.step()

    def after_epoch(self, model: nn.Module) -> None:
        if hasattr(self, "per_epoch"):
            self.per_epoch.step()
        if hasattr(self, "plateau"):
            self.plateau.step(loss_of(model))


def main(kind: str, micro_batch: str = str(MICRO_BATCH)) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(classifier())
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    rates = Rates(opt, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=kind == "scaled")
    for _ in range(EPOCHS):
        for inputs, labels in run.batches(
            dataset(), micro_batch=int(micro_batch), global_batch=GLOBAL_BATCH, epochs=1, shuffle=False
        ):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss * float("inf") if kind == "scaled" and is_marked(inputs) else loss).backward()
            rates.before_step(run.round)
            if kind == "apart":
                opt.param_groups[0]["lr"] = 0.5 + run.index
            scaler.step(opt)
            scaler.update()
            rates.after_step()
        rates.after_epoch(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
