"""A model whose loss is not a number on one sample; the weights must never be. Given "sharded", its last layer is on servers."""

import sys

import torch
from torch.utils.data import TensorDataset

import roundtable

run = roundtable.join()
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(64, 5, generator=generator), torch.randint(3, (64,), generator=generator)
x[17, 2] = float("nan")
is_sharded = "sharded" in sys.argv[1:]
net = torch.nn.Sequential(torch.nn.Linear(5, 4), roundtable.ShardedLinear(4, 200)) if is_sharded else torch.nn.Linear(5, 3)
model = run.replicate(net)
loss_of = roundtable.sharded_cross_entropy if is_sharded else torch.nn.functional.cross_entropy
opt = run.optimizer(torch.optim.Adam, lr=0.01)
for batch, labels in run.batches(TensorDataset(x, y), epochs=2):
    loss_of(model(batch), labels).backward()
    opt.step()
with torch.no_grad():
    finite = loss_of(model(x[:8]), y[:8]).isfinite() and all(p.isfinite().all() for p in model.parameters() if not p.is_meta)
assert finite or run.settings.on_nonfinite == "allow"
