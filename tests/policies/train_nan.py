"""A model whose loss is not a number on one sample; the weights must never be."""

import torch
from torch.utils.data import TensorDataset

import worker

run = worker.join()
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(64, 5, generator=generator), torch.randint(3, (64,), generator=generator)
x[17, 2] = float("nan")
model = run.replicate(torch.nn.Linear(5, 3))
opt = run.optimizer(torch.optim.Adam, lr=0.01)
for batch, labels in run.batches(TensorDataset(x, y), epochs=2):
    torch.nn.functional.cross_entropy(model(batch), labels).backward()
    opt.step()
assert torch.isfinite(model.weight).all() or run.settings.on_nonfinite == "allow"
