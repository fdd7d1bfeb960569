"""A Wide & Deep click model (Cheng et al., "Wide & Deep Learning for Recommender Systems", 2016) on made-up clicks.

Its tables are on the servers only: a worker holds the rows of one micro-batch. With --rows 1000000 --dim 32 they are a gigabyte.
"""

import argparse
import resource

import torch
from torch import nn
from torch.utils.data import TensorDataset

import roundtable

FIELDS = 8  # user, item, publisher, ...
CROSSES = [(0, 1), (0, 2), (1, 2), (3, 4)]  # pairs of fields whose combinations the wide part looks at
HELD_OUT = 20_000

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rows", type=int, default=20_000, help="ids that each of the 8 fields may have")
parser.add_argument("--dim", type=int, default=16, help="numbers for each id in the deep part")
parser.add_argument("--samples", type=int, default=300_000, help="clicks and non-clicks to train on")
parser.add_argument("--epochs", type=int, default=1, help="passes over them")
parser.add_argument("--lr", type=float, default=0.03, help="learning rate")
args = parser.parse_args()


def noise(ids: torch.Tensor, number: int) -> torch.Tensor:
    """Return a hidden trait of each id: a number in -1 .. 1 that looks random and is always the same."""
    return torch.frac(torch.sin(ids.double() * 12.9898 + number * 78.233) * 43758.5453).float()


def clicks(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (samples, FIELDS) by Zipf's law, the k-th about 1/k as often as the first; and clicks, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = (args.rows ** torch.rand(samples, FIELDS, generator=generator, dtype=torch.float64)).long() - 1
    field = torch.arange(FIELDS)
    main = noise(ids * FIELDS + field, 1).sum(1)
    tastes = [noise(ids * FIELDS + field, number) for number in (2, 3)]
    pairs = sum(taste[:, a] * taste[:, b] for taste in tastes for a, b in CROSSES)
    return ids, torch.bernoulli(torch.sigmoid(main + 2 * pairs - 0.5), generator=generator)


class WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # like nn.Embedding(rows, dim, sparse=True), which works too, but never in this process's memory
        self.wide = roundtable.embedding((FIELDS + len(CROSSES)) * args.rows, 1, std=0.0)
        self.embedding = roundtable.embedding(FIELDS * args.rows, args.dim, std=0.05)
        self.deep = nn.Sequential(nn.Linear(FIELDS * args.dim, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits (B) of ids (B, FIELDS)."""
        crosses = [(ids[:, a] * 1_000_003 + ids[:, b]) % args.rows for a, b in CROSSES]  # hashed, so that they fit
        features = torch.stack([*ids.unbind(1), *crosses], 1) + args.rows * torch.arange(FIELDS + len(CROSSES))
        wide = self.wide(features).sum((1, 2))
        deep = self.deep(self.embedding(features[:, :FIELDS]).flatten(1)).squeeze(1)
        return wide + deep


def auc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the probability that a click has a higher score than a non-click."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    hits = float(labels.sum())
    return (float(ranks[labels == 1].sum()) - hits * (hits + 1) / 2) / (hits * (len(labels) - hits))


run = roundtable.join()
model = run.replicate(WideAndDeep())
opt = run.optimizer(torch.optim.Adagrad, lr=args.lr)
loss_of = nn.BCEWithLogitsLoss()
for ids, clicked in run.batches(TensorDataset(*clicks(args.samples, 1)), micro_batch=256, global_batch=512, epochs=args.epochs):
    loss = loss_of(model(ids), clicked)
    loss.backward()
    run.log(loss=loss)
    opt.step()

if run.is_chief:
    ids, clicked = clicks(HELD_OUT, 2)
    with torch.no_grad():
        scores = torch.cat([model(part) for part in ids.split(1000)])
    value = auc(scores, clicked)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tables = 4 * args.rows * (FIELDS * args.dim + FIELDS + len(CROSSES)) / 2**20
    run.log(auc=value)
    print(f"held-out AUC {value:.3f}; the tables are {tables:.0f} MiB, and this worker never took up more than {peak:.0f} MiB")
