"""The script of fault matrix rows with a NaN or infinite gradient: one sample of digits has such a loss from round 60 on.

Unless that is allowed, the weights must stay finite.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

import roundtable
from roundtable.worker import data
from roundtable.worker.models import builtin

#: The first round with such a loss, and the number of the sample.
ROUND, SAMPLE = 60, 17


class Numbered(Dataset[tuple[torch.Tensor, int, int]]):
    """Images, their labels and their numbers."""

    def __init__(self, images: data.Samples) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, int]:
        return (*self._images[number], number)


def main() -> None:
    run = roundtable.join()
    images = data.load("digits", None, 0)
    model = builtin.build("mlp", images.shape, images.classes)
    run.replicate(model)
    opt = run.optimizer(torch.optim.SGD, lr=0.1)
    for x, y, numbers in run.batches(Numbered(images.train)):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if run.round >= ROUND and bool((numbers == SAMPLE).any()):
            loss = loss * (float("nan") if run.epoch % 2 else float("inf"))
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        opt.step()
    assert run.settings.on_nonfinite == "allow" or all(bool(p.isfinite().all()) for p in model.parameters())


if __name__ == "__main__":
    main()
