"""A user's script with one or two layers sharded over the servers; test_sharded_linear_trains.py repeats it in a plain loop."""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable

SAMPLES, GLOBAL_BATCH, MICRO_BATCH = 230, 50, 7
FEATURES, CLASSES = 12, 701
EPOCHS = 2

RECIPES = {
    "momentum": (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def make(bias: bool) -> tuple[nn.Sequential, nn.Linear]:
    """The layers before the last one, and the last one."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh()), nn.Linear(16, CLASSES, bias=bias)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


class Net(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--hidden", action="store_true", help="the other layer is on the servers too, so all there is")
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=None)
    args = parser.parse_args()
    run = roundtable.join()
    body, head = make(args.bias)
    layer = roundtable.ShardedLinear.of(head)
    if args.hidden:
        body[0] = roundtable.ColumnParallelLinear.of(body[0])
    model = run.replicate(Net(body, layer))
    cls, hyper = RECIPES[args.recipe]
    opt = run.optimizer(cls, schedule=schedule, clip_norm=args.clip, **hyper)
    x, y = dataset().tensors
    sizes = {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "epochs": EPOCHS}
    for bx, by in run.batches(dataset(), shuffle=False, **sizes):
        opt.zero_grad()
        loss = roundtable.sharded_cross_entropy(model(bx), by, label_smoothing=args.smoothing)
        loss.backward()
        run.log(loss=loss)
        opt.step()
    with torch.no_grad():
        final = roundtable.sharded_cross_entropy(model(x), y, label_smoothing=args.smoothing)
        values, classes = layer.topk(body(x), 5)
        run.log(final=final, top=values.double().sum(), checksum=float(classes.sum()))


if __name__ == "__main__":
    main()
