"""A user's script, run by the exactness tests: a small CNN on scikit-learn's digits.

Nothing random is left to the framework (own seed for the model, no shuffling, no dropout), so that a plain loop can repeat it.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def dataset() -> TensorDataset:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images[:1000], torch.tensor(digits.target[:1000]))


def network(hidden: int = 64, layers: int = 1) -> nn.Module:
    torch.manual_seed(7)
    more = [part for _ in range(layers - 1) for part in (nn.Linear(hidden, hidden), nn.Tanh())]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, hidden), nn.Tanh(), *more, nn.Linear(hidden, 10),
    )  # fmt: skip


class Reused(nn.Module):
    """A layer that is used once to four times, as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(64, 512), nn.Linear(512, 512, bias=False), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        for _ in range(self.uses(x)):
            h = torch.tanh(self.again(h))
        logits: torch.Tensor = self.last(h)
        return logits

    @staticmethod
    def uses(x: torch.Tensor) -> int:
        return 1 + int(x.sum()) % 4


def reused() -> nn.Module:
    torch.manual_seed(7)
    return Reused()


RECIPES = {
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}, None, None),
    "adamw": (
        torch.optim.AdamW,
        {"lr": 3e-3},
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=100),
        0.5,
    ),
}
GLOBAL_BATCH, MICRO_BATCH = 120, 16


def main() -> None:
    import roundtable

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1, help="hidden layers")
    parser.add_argument("--reused", action="store_true", help="train the network with a layer that is used again")
    parser.add_argument("--slow", type=int, default=-1, help="this worker takes five times as long")
    args = parser.parse_args()
    run = roundtable.join()
    model = run.replicate(reused() if args.reused else network(args.hidden, args.layers))
    cls, hyper, schedule, clip_norm = RECIPES[args.recipe]
    opt = run.optimizer(cls, schedule=schedule, clip_norm=clip_norm, **hyper)
    begun = time.monotonic()
    for x, y in run.batches(dataset(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, epochs=args.epochs, shuffle=False):
        begun = time.monotonic()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        run.log(loss=loss)
        if run.index == args.slow:
            time.sleep(max(0.02, 4 * (time.monotonic() - begun)))
        opt.step()


if __name__ == "__main__":
    main()
