"""A user's script that loads weights of its own after run.optimizer(), and tries others for a moment after each step. If it is
told to, it moves a frozen layer. Run by test_frozen.py.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 700), nn.Tanh(), nn.Linear(700, 3).requires_grad_(False))


def main() -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network(run.index))
    opt = run.optimizer(torch.optim.SGD, lr=0.0)
    model.load_state_dict(network(run.index + 5).state_dict())
    nn.init.constant_(model[0].bias, 0.25)
    others = network(9).state_dict()
    data = TensorDataset(torch.ones(32, 6), torch.ones(32, 3))
    for number, (x, y) in enumerate(run.batches(data, global_batch=8, micro_batch=4, epochs=2)):
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(others)
        model.load_state_dict(own)
        if sys.argv[1] == "moves" and number == 1:
            nn.init.zeros_(model[2].weight)


if __name__ == "__main__":
    main()
