"""A user's script whose loops have all kinds of orders, with data sets and DataLoaders. Its model counts how often it sees each
sample, and has a BatchNorm, which refuses a micro-batch of one sample."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import roundtable

SAMPLES, EPOCHS = 117, 2
#: 25 samples are cut into 8, 8, 7 and 2.
SIZES: dict[str, Any] = {"global_batch": 25, "micro_batch": 8, "epochs": EPOCHS, "min_micro_batch": 2}
LABELS = [0] * 100 + [1] * 15 + [2] * 2
LENGTHS = [1 + index * 7 % 50 for index in range(SAMPLES)]
WEIGHTS = [float(1 + index % 5) for index in range(SAMPLES)]


def own_order(seed: int, epoch: int) -> np.ndarray:
    """76 places, so that a last round of one sample is left out."""
    return np.random.default_rng([seed, epoch]).permutation(SAMPLES)[:76]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros(SAMPLES, dtype=torch.long))
        self.seen: torch.Tensor

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        self.seen += torch.bincount(indices, minlength=SAMPLES)
        out: torch.Tensor = self.layers(x)
        return out


def network() -> Counting:
    torch.manual_seed(3)
    return Counting()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 4, generator=generator), torch.tensor(LABELS), torch.arange(SAMPLES))


def loops(run: roundtable.Run) -> list[Any]:
    data = dataset()
    weighted = WeightedRandomSampler(WEIGHTS, 60)
    return [
        run.batches(DataLoader(data, batch_size=8, shuffle=True, num_workers=1), **{**SIZES, "micro_batch": None}),
        run.batches(data, batch_sampler=BatchSampler(weighted, 8, drop_last=True), **SIZES),
        run.batches(data, order=roundtable.class_balanced_order(LABELS), **SIZES),
        run.batches(data, order=roundtable.length_bucketed_order(LENGTHS, 8), **SIZES),
        run.batches(DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(0, SAMPLES, 2))), **SIZES),
        run.batches(data, order=own_order, **SIZES),
    ]


def main() -> None:
    run = roundtable.join()
    model = run.replicate(network(), buffers={"seen": "sum"})
    opt = run.optimizer(torch.optim.SGD, lr=0.1)
    for batches in loops(run):
        for x, y, indices in batches:
            nn.functional.cross_entropy(model(x, indices), y).backward()
            time.sleep(0.01)
            opt.step()
    print(f"{run.total_rounds} rounds in all", flush=True)


if __name__ == "__main__":
    main()
