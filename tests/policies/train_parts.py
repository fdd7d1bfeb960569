"""Replicas that are trained apart: each writes down its weights just before they are merged, and those it has in the end.

With `--ruin`, those of worker 1 are ruined just before. Greedy merges are by the loss on some data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import roundtable

folder = Path(sys.argv[1])
run = roundtable.join()
model = run.replicate(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
generator = torch.Generator().manual_seed(5)
x = torch.randn(480, 6, generator=generator)
data = TensorDataset(x, (x @ torch.randn(6, 3, generator=generator)).argmax(1))
opt = run.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)


def write_part() -> None:
    if "--ruin" in sys.argv and run.index == 1:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
    save_file(model.state_dict(), folder / f"part-{run.round}-{run.index}.safetensors")


def evaluate(replica: nn.Module) -> float:
    run.recompute_batchnorm(data)
    replica.eval()
    with torch.no_grad():
        loss = cross_entropy(replica(x), data.tensors[1])
    replica.train()
    return -float(loss)


run.before_merge(write_part)
run.merge_by(evaluate)
for _ in range(2):
    for inputs, labels in run.batches(data, global_batch=24, micro_batch=8, epochs=2):
        cross_entropy(model(inputs), labels).backward()
        opt.step()
run.recompute_batchnorm(data)
save_file(model.state_dict(), folder / f"end-{run.index}.safetensors")
