"""A user's script whose weights are accounts: each of three parameters, one a server, has a row for every sample, which an update
that the sample is in makes larger by one over the samples of that update."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable

SAMPLES, GLOBAL_BATCH, MICRO_BATCH, EPOCHS = 1024, 64, 8, 10


class Accounts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ParameterList(nn.Parameter(torch.zeros(SAMPLES, 16)) for _ in range(3))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return -torch.stack([account[samples].sum() for account in self.of]).sum() / len(samples)


def main() -> None:
    run = roundtable.join()
    model = run.replicate(Accounts())
    opt = run.optimizer(torch.optim.SGD, lr=1.0)
    data = TensorDataset(torch.arange(SAMPLES))
    for (samples,) in run.batches(data, micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=EPOCHS, shuffle=False):
        opt.zero_grad()
        model(samples).backward()
        opt.step()


if __name__ == "__main__":
    main()
