"""Trains a model that is compiled before it is replicated, or that is converted to another dtype too late: `MODE`."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import roundtable


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 300), nn.Linear(300, 4))


if __name__ == "__main__":
    mode = sys.argv[1]
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator))
    run = roundtable.join()
    net = network()
    if mode == "compiled":
        net[1], net[2] = (torch.compile(net[n], backend="eager") for n in (1, 2))  # parts too
    model = run.replicate(torch.compile(net, backend="eager") if mode == "compiled" else net)
    opt = run.optimizer(torch.optim.AdamW, lr=0.01)
    if mode == "before":
        model.double()
    for batch, (x, y) in enumerate(run.batches(data, micro_batch=4, global_batch=16, epochs=2)):
        if mode == "midway" and batch == 1:
            model.double()
        x = x.to(net[0].weight.dtype)
        F.cross_entropy(model(x), y).backward()
        opt.step()
        if mode == "after" and batch == 1:
            model.half()
