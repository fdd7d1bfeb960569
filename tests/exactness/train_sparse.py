"""A user's script with embeddings of which only rows are sent, run by test_sparse.py, which repeats it in a plain loop."""

from __future__ import annotations

import argparse
import os
import signal

import torch
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES, GLOBAL_BATCH, MICRO_BATCH = 230, 50, 7
ITEMS, WORDS, DRAWN = 700, 90, 300
EPOCHS = 2

RECIPES = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
}


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    items = (torch.rand(SAMPLES, 4, generator=generator) ** 3 * ITEMS).long()  # the first ones much more often
    return TensorDataset(items, items.sum(1).remainder(7).float())


class Net(nn.Module):
    """Two tables, one of which is looked up twice and the other in even rounds only, and one whose rows are drawn."""

    def __init__(self, drawn: nn.Embedding, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.items = nn.Embedding(ITEMS, 5, sparse=sparse)
        self.words = nn.Embedding(WORDS, 10, sparse=sparse)
        self.head = nn.Linear(20, 1)
        self.drawn = drawn

    def forward(self, items: torch.Tensor, branch: bool) -> torch.Tensor:
        pairs = self.items(items).flatten(1) * self.items(items.flip(1)).flatten(1)
        if branch:
            pairs = pairs + self.words(items[:, :2] % WORDS).flatten(1)
        return (self.head(pairs) + self.drawn(items[:, 0] % DRAWN)).squeeze(1)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def main() -> None:
    import roundtable

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--dies", type=int, default=-1, help="this worker is killed in its fifth micro-batch")
    parser.add_argument("--clip", type=float, default=None)
    args = parser.parse_args()
    run = roundtable.join()
    model = run.replicate(Net(roundtable.embedding(DRAWN, 1, std=0.3), sparse=True))
    cls, hyper = RECIPES[args.recipe]
    opt = run.optimizer(cls, schedule=schedule, clip_norm=args.clip, **hyper)
    x, y = dataset().tensors
    sizes = {"global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "epochs": EPOCHS}
    for number, (bx, by) in enumerate(run.batches(dataset(), shuffle=False, **sizes)):
        if run.index == args.dies and number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(bx, run.round % 2 == 0), by)
        loss.backward()
        run.log(loss=loss)
        opt.step()
    with torch.no_grad():
        run.log(final=nn.functional.mse_loss(model(x, True), y))


if __name__ == "__main__":
    main()
