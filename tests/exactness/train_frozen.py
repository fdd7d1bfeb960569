"""A user's script that trains a head on a frozen body, and from the third epoch on a part of the body too. Run by test_frozen.py.

Workers draw bodies that differ: all train with the first worker's. The first layer is not given to the optimizer.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, THAWS = 12, 4, 4, 2


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(40, 6, generator=generator), torch.randn(40, 3, generator=generator))


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 700), nn.Tanh(), nn.Linear(700, 9, dtype=torch.float32), nn.Tanh(), nn.Linear(9, 3))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def trained(model: nn.Sequential) -> list[nn.Parameter]:
    """Return the parameters for the optimizer, some of them frozen."""
    return [*model[2].parameters(), *model[4].parameters()]


def main() -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network(run.index))
    opt = run.optimizer(torch.optim.AdamW, trained(model), lr=0.02, weight_decay=0.1)
    in_one_loop = sys.argv[1] == "one-loop"
    for epoch in range(1 if in_one_loop else EPOCHS):
        batches = run.batches(
            dataset(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, epochs=EPOCHS if in_one_loop else 1, shuffle=False
        )
        for x, y in batches:
            model[2].requires_grad_((run.epoch if in_one_loop else epoch) >= THAWS)
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.log(loss=loss)
            opt.step()


if __name__ == "__main__":
    main()
