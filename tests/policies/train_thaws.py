"""A script whose workers unfreeze a layer at different times, the last one never. They keep what they had before each merge.

Run by test_merges.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import roundtable


def main() -> None:
    folder, local = Path(sys.argv[1]), sys.argv[2] == "local"
    run = roundtable.join()
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model[2].requires_grad_(False)
    run.replicate(model)
    opt = run.optimizer(torch.optim.SGD, lr=0.1)
    run.merge_by(lambda replica: -float(replica[0].weight.square().sum()))
    merges = 0

    def keep() -> None:
        nonlocal merges
        merges += 1
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        save_file(state, folder / f"before-{merges}-{run.index}.safetensors")

    run.before_merge(keep)
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(96, 6, generator=generator), torch.randn(96, 3, generator=generator))
    for _ in range(2):
        for x, y in run.batches(data, global_batch=12, micro_batch=4, epochs=1):
            thaws = {0: 3, 1: 11, 2: 99}[run.index]  # rounds of 16
            model[2].requires_grad_(run.round >= thaws)
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if not local or merges == 4:
            save_file(state, folder / f"after-{merges}-{run.index}.safetensors")


if __name__ == "__main__":
    main()
