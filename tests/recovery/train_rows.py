"""A user's script with a table of rows and layers sharded over the servers, which test_copies.py kills."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable

SAMPLES, ROWS, CLASSES = 230, 700, 401


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = roundtable.embedding(ROWS, 6, std=0.3)
        self.body = nn.Linear(6, 16)
        self.middle = roundtable.ColumnParallelLinear(16, 200)
        self.head = roundtable.ShardedLinear(200, CLASSES, bias=True)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.middle(self.body(self.items(items)).tanh()).relu())
        return out


def main() -> None:
    run = roundtable.join()
    model = run.replicate(Net())
    opt = run.optimizer(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1)
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(ROWS, (SAMPLES,), generator=generator)
    dataset = TensorDataset(items, items % CLASSES)
    for x, y in run.batches(dataset, micro_batch=7, global_batch=50, epochs=2):
        opt.zero_grad()
        loss = roundtable.sharded_cross_entropy(model(x), y)
        loss.backward()
        run.log(loss=loss)
        opt.step()


if __name__ == "__main__":
    main()
