"""A user's script: a network whose parameter groups have optimizers of their own, some of which update whole tensors."""

import sys
from typing import Any

import torch
from own_optimizers import Lion, TrustRatio
from torch import nn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, ROUNDS = 8, 4, 6
FEATURES, WIDE, CLASSES = 40, 1100, 1000


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROUNDS * GLOBAL_BATCH, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(0, CLASSES, (len(inputs),), generator=generator))


def network() -> nn.Module:
    """The last matrix takes 4.4 MB, which is more than one chunk."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, WIDE), nn.Tanh(), nn.Linear(WIDE, CLASSES))


def groups(model: nn.Module, whose: str) -> list[dict[str, Any]]:
    """`whose`: the classes of torch, or the user's own."""
    first, second, last = (layer.weight for layer in model if isinstance(layer, nn.Linear))
    biases = [p for p in model.parameters() if p.ndim == 1]
    if whose == "own":
        return [
            {"params": [first, second], "optimizer": Lion, "lr": 0.01},
            {"params": biases},
            {"params": [last], "optimizer": TrustRatio, "lr": 0.01, "momentum": 0.9},
        ]
    return [
        {"params": [first, second], "optimizer": torch.optim.Muon, "lr": 0.05},
        {"params": biases},
        {"params": [last], "optimizer": torch.optim.Adafactor, "lr": 0.01},
    ]


def main(whose: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network())
    opt = run.optimizer(torch.optim.AdamW, groups(model, whose), lr=0.01)
    batches = run.batches(dataset(), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=1, shuffle=False)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    for inputs, labels in batches:
        nn.functional.cross_entropy(model(inputs), labels).backward()
        opt.step()
        scheduler.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
