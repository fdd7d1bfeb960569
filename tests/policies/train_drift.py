"""A weight whose gradient is always 1, so that it tells the sum of the rates it was moved by, beside a batch normalisation."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

import roundtable

SAMPLES, EPOCHS, GLOBAL, MICRO = 128, 4, 16, 4
ROUNDS = SAMPLES * EPOCHS // GLOBAL


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drift = nn.Parameter(torch.zeros(()))
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 6, generator=generator)
    data = TensorDataset(x, (x @ torch.randn(6, 3, generator=generator)).argmax(1))
    run = roundtable.join()
    model = run.replicate(Model())
    opt = run.optimizer(torch.optim.SGD, lr=0.1, schedule=lambda o: LinearLR(o, 1.0, 0.0, total_iters=ROUNDS))
    for inputs, labels in run.batches(data, global_batch=GLOBAL, micro_batch=MICRO, epochs=EPOCHS):
        (cross_entropy(model(inputs), labels) + model.drift).backward()
        opt.step()


if __name__ == "__main__":
    main()
