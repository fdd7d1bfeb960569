"""What `benchmarks/hybrid.py` runs on each worker: AlexNet's fully connected layers, over classes made up, both ways."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable
from roundtable.common.protocol.messages.session import Traffic
from roundtable.worker.models.hybrid import shard_fully_connected

#: Activities before the fully connected layers, and outputs of the two hidden ones, as in AlexNet; the convolutions are one small
#: one here, for they are the same both ways.
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
        if run.round == 1:  # the first round is for getting started, and what first weights come to is no part of a round
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
