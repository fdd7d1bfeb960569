"""Trains a scripted model, which is copied in mid-training, by a schedule that imports what it needs."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import roundtable

generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(32, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator))


def warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    import torch._dynamo._trace_wrapped_higher_order_op

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


run = roundtable.join()
plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
model = run.replicate(nn.Sequential(torch.jit.script(plain), nn.LayerNorm(4)))
opt = run.optimizer(torch.optim.AdamW, lr=0.01, schedule=warmup)
for x, y in run.batches(data, micro_batch=2, global_batch=16, epochs=2):
    F.cross_entropy(model(x), y).backward()
    opt.step()
    other = copy.deepcopy(model)
    assert torch.equal(pickle.loads(pickle.dumps(model[1])).weight, other[1].weight)
    assert torch.equal(other(x), model(x))
