"""A user's script that looks at the servers' own weights in each round and at the end. Run by test_masters.py."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset


def main() -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(nn.Sequential(nn.Linear(6, 700), nn.BatchNorm1d(700), nn.Linear(700, 3)))
    opt = run.optimizer(torch.optim.SGD, lr=0.001)
    data = TensorDataset(torch.randn(40, 6), torch.randn(40, 3))
    for x, y in run.batches(data, global_batch=8, micro_batch=4, epochs=2):
        nn.functional.mse_loss(model(x), y).backward()
        if run.is_chief and sys.argv[1] == "looks":
            with run.masters():
                assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())
        opt.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with run.masters():
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if run.is_chief:
        torch.save([before, inside, model.state_dict()], sys.argv[2])


if __name__ == "__main__":
    main()
