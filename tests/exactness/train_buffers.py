"""A script whose model has buffers of every kind. Run by test_buffers.py, which repeats it in a plain loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, SAMPLES, QUEUE = 18, 4, 3, 50, 12

#: What the script says of buffers.
RULES = {"seen": "max", "tokens": "sum", "mean_norm": "mean", "cache": "own"}


class Net(nn.Module):
    """A queue and the place in it, a codebook, unit vectors, running statistics, counters, a sparse, a complex and a quantised
    buffer, one that only some micro-batches change, one that is a cache, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.frozen = nn.BatchNorm1d(8, affine=False).eval()
        self.register_buffer("queue", torch.zeros(QUEUE, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("codebook", torch.eye(4, 8))
        self.register_buffer("adjacency", torch.eye(8).to_sparse())
        self.register_buffer("turns", torch.ones(3, dtype=torch.complex128))
        self.register_buffer("levels", torch.zeros(8, dtype=torch.int8))
        self.register_buffer("eighths", torch.zeros(8, dtype=torch.float8_e5m2))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("mean_norm", torch.zeros(1))
        self.register_buffer("rotary", torch.polar(torch.ones(8), torch.arange(8.0)), persistent=False)
        self.register_buffer("cache", torch.zeros(0, 8), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        h = h + torch.sparse.mm(self.adjacency, h.t()).t() + self.queue.mean() + (h * self.rotary).real + self.frozen(h)
        nearest = torch.cdist(h, self.codebook).argmin(1)
        with torch.no_grad():
            place = int(self.place)
            self.queue[place : place + 4] = h[:1].expand(4, -1)
            self.place.fill_((place + 4) % QUEUE)
            self.codebook = nn.functional.normalize(self.codebook.index_add(0, nearest, h), dim=1)
            if y[0] == 0:
                self.adjacency = self.adjacency * 1.01
            self.turns = self.turns * torch.polar(torch.ones((), dtype=torch.float64), h.sum().double())
            self.levels.copy_((h[0] * 20).clamp(-100, 100))
            self.eighths = h[0].to(torch.float8_e5m2)
            self.seen.index_add_(0, y, torch.ones_like(y))
            self.tokens += y.bincount(minlength=3)
            self.mean_norm.mul_(0.9).add_(0.1 * h.norm(dim=1).mean())
            self.cache = torch.cat([self.cache, h[:1]])
        logits: torch.Tensor = self.head(h) + self.codebook.sum() + self.turns.real.sum().float() + self.levels.sum() * 1e-3
        return nn.functional.cross_entropy(logits, y)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator))


def network() -> Net:
    torch.manual_seed(3)
    return Net()


def main() -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network(), buffers=RULES)  # type: ignore[arg-type]
    opt = run.optimizer(torch.optim.AdamW, lr=0.01)
    for x, y in run.batches(dataset(), global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, epochs=EPOCHS, shuffle=False):
        model(x, y).backward()
        opt.step()


if __name__ == "__main__":
    main()
