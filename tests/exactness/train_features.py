"""A user's script with about everything in it that a model, a data set and a training loop may have. Run by test_features.py,
which repeats it in a plain loop."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, SAMPLES = 18, 4, 2, 50


class Images(Dataset[Any]):
    """Samples are dicts; each is augmented at random, by two generators."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 10, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index] + 0.1 * torch.randn(1, 8, 8)
        return {"image": image.flip(-1) if random.random() < 0.5 else image, "label": self.labels[index]}


def collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([s["image"] for s in samples]), torch.stack([s["label"] for s in samples])


class Net(nn.Module):
    """BatchNorm, dropout, channels last, a tied weight, a scalar, an empty, a frozen and an unused parameter, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dropout = nn.Dropout(0.3)
        self.down = nn.Linear(16, 10)
        self.up = nn.Linear(10, 16, bias=False)
        self.up.weight = nn.Parameter(torch.randn(10, 16).t())
        self.again = nn.Linear(16, 10, bias=False)
        self.again.weight = self.down.weight
        self.branch = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, images: torch.Tensor, branch: bool = False) -> torch.Tensor:
        maps = self.features(images.to(memory_format=torch.channels_last))
        h = self.dropout(maps.mean((2, 3))) * self.scale + self.empty.sum()
        if branch:
            h = self.branch(h)
        h = h + self.up(torch.tanh(self.down(h)))
        logits: torch.Tensor = self.again(h)
        return logits


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices, a smaller rate for the rest."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 2e-3},
    ]


def evaluate(model: nn.Module, data: Images) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data, batch_size=16, collate_fn=collate))
    model.train()
    return right / len(data)


def main() -> None:
    import roundtable

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=["float32", "bfloat16"])
    parser.add_argument("--loaders", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1, help="calls of batches() that the epochs are divided among")
    args = parser.parse_args()
    run = roundtable.join()
    data = Images()
    torch.manual_seed(3)
    net = Net().to(getattr(torch, args.recipe))
    model = run.replicate(net)
    rate = 1e-2 if args.recipe == "float32" else 2e-5  # far below what bfloat16 can add to most weights
    opt = run.optimizer(torch.optim.AdamW, groups(model), lr=rate, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
    for _ in range(args.calls):
        for x, y in run.batches(
            data, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, epochs=EPOCHS // args.calls,
            num_workers=args.loaders, collate_fn=collate,
        ):  # fmt: skip
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(net.scale.dtype), branch=run.round % 2 == 1).float(), y)
            loss.backward()
            run.log(loss=loss, half=0.5)
            opt.step()
            if args.recipe == "float32":
                run.log(accuracy=evaluate(model, data))
    if run.is_chief:
        torch.save(model.state_dict(), Path("saved.pt"))
        run.log(ended=1.0)


if __name__ == "__main__":
    main()
