"""The workers' script of `benchmarks/hybrid.py`: AlexNet's fully connected layers over made-up classes, in both ways."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable
from roundtable.common.protocol.messages.session import Traffic
from roundtable.worker.models.hybrid import shard_fully_connected

#: Maps and their side before the fully connected layers, and outputs of the two hidden layers, as in AlexNet. One small
#: convolution stands for AlexNet's, which are the same both ways.
MAPS, SIDE, HIDDEN = 256, 6, 4096
FEATURES = MAPS * SIDE**2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples of a worker in a round")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--hybrid", action="store_true")
    args = parser.parse_args()
    run = roundtable.join()
    convolutions = nn.Conv2d(3, MAPS, 4, stride=4), nn.ReLU(), nn.Flatten()
    hidden = nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
    model = nn.Sequential(*convolutions, *hidden, nn.Linear(HIDDEN, args.classes))
    head = shard_fully_connected(model, args.classes) if args.hybrid else None
    run.replicate(model)
    opt = run.optimizer(torch.optim.SGD, lr=0.01)
    whole = args.batch * run.workers
    data = TensorDataset(torch.randn(whole, 3, 4 * SIDE, 4 * SIDE), torch.randint(args.classes, (whole,)))
    began, moved = time.monotonic(), 0
    for x, y in run.batches(data, micro_batch=args.batch, global_batch=whole, epochs=args.rounds):
        if run.round == 1:  # the first round, with the first weights, does not count
            began, moved = time.monotonic(), bytes_of(run.traffic)
        out = model(x)
        loss = nn.functional.cross_entropy(out, y) if head is None else roundtable.sharded_cross_entropy(out, y)
        loss.backward()
        opt.step()
    rounds = max(1, args.rounds - 1)
    run.log(megabytes=(bytes_of(run.traffic) - moved) / rounds / 1e6)
    if run.is_chief:
        run.log(seconds=(time.monotonic() - began) / rounds)


def bytes_of(traffic: Traffic) -> int:
    return traffic.pushed_bytes + traffic.pulled_bytes


if __name__ == "__main__":
    main()
