"""A user's script: a classifier of samples that come in shards of very different lengths, with noise that is drawn anew."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, WINDOW = 24, 4, 3, 10
SHARDS = (30, 7, 0, 52, 1, 40)
FEATURES, CLASSES = 6, 3
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


def sample_of(shard: int, number: int) -> torch.Tensor:
    """The inputs of a sample, and its class."""
    generator = torch.Generator().manual_seed(1000 * shard + number)
    return torch.cat([torch.randn(FEATURES, generator=generator), torch.tensor([float((shard + number) % CLASSES)])])


def decode(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sample[:-1] + 0.1 * torch.randn(FEATURES), sample[-1].long()


def open_shard(shard: int, position: int) -> Iterator[torch.Tensor]:
    return (sample_of(shard, number) for number in range(position, SHARDS[shard]))


class Flow(IterableDataset[Any]):
    """The same samples, from the start only."""

    def __iter__(self) -> Iterator[Any]:
        return (decode(sample) for shard in range(len(SHARDS)) for sample in open_shard(shard, 0))

    def __len__(self) -> int:
        return sum(SHARDS)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def main(kind: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network())
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    sizes: Any = {"global_batch": GLOBAL_BATCH, "epochs": EPOCHS}
    stream: Any
    if kind == "plain":
        stream = Flow()
        batches = run.batches(DataLoader(stream, batch_size=MICRO_BATCH), **sizes)
    else:
        wrong = {"long": [60, *SHARDS[1:]], "deaf": SHARDS}.get(kind, SHARDS)
        stream = roundtable.Stream(
            len(SHARDS), open_shard if kind != "deaf" else lambda s, _: open_shard(s, 0), wrong, decode=decode
        )
        loads = 2 if kind == "processes" else 0
        batches = run.batches(stream, micro_batch=MICRO_BATCH, shuffle_window=WINDOW, num_workers=loads, **sizes)
    assert len(batches) and run.total_rounds == batches.rounds
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        run.log(loss=loss)
        opt.step()
    found = run.evaluate(lambda batch: {"class": batch[1].float().mean()}, stream, micro_batch=9)
    classes = [float(y) for _, y in stream]
    assert abs(found["class"] - sum(classes) / len(classes)) < 1e-6


if __name__ == "__main__":
    main(*sys.argv[1:])
