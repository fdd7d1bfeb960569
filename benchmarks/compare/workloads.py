"""The models and synthetic data that all systems train, in plain torch, with the same numbers in every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

#: Global batches in the data set. Longer runs repeat them in the same order.
BATCHES = 8
_SEED = 7


@dataclass(frozen=True)
class Workload:
    """A model, its data and its optimizer. `batch` is the number of samples that one worker computes in a step."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch: int
    optimizer: type[torch.optim.Optimizer]
    hyper: Mapping[str, Any]

    @property
    def sparse(self) -> bool:
        """Return whether gradients are sparse."""
        return False

    def model(self) -> nn.Module:
        """Return the network with its initial weights, which are always the same."""
        torch.manual_seed(_SEED)
        return self.network()

    def dataset(self, workers: int) -> TensorDataset:
        """Return synthetic samples for that many workers, always the same. Global batch i is the i-th slice of them."""
        generator = torch.Generator().manual_seed(_SEED)
        size = BATCHES * workers * self.batch
        x = torch.randn(size, *self.shape, generator=generator)
        return TensorDataset(x, torch.randint(self.classes, (size,), generator=generator))

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return nn.functional.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Clicks(Workload):
    """Samples are ids, by Zipf's law out of `classes` for each place of `shape`; labels are 0 or 1. Gradients are sparse."""

    @property
    def sparse(self) -> bool:
        return True

    def dataset(self, workers: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(_SEED)
        size = BATCHES * workers * self.batch
        ids = (self.classes ** torch.rand(size, *self.shape, generator=generator, dtype=torch.float64)).long() - 1
        return TensorDataset(ids, torch.rand(size, generator=generator).round())

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(x), y)


@dataclass(frozen=True)
class Text(Workload):
    """Samples are ids (`shape`) out of `classes`; labels are the ids that follow."""

    def dataset(self, workers: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(self.classes, (BATCHES * workers * self.batch, self.shape[0] + 1), generator=generator)
        return TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


class _Layer(nn.Module):
    """One layer of `GPT`: features (B, T, dim) to features."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, dim))
        added: torch.Tensor = x + self.mlp(self.between(x))
        return added


class GPT(nn.Module):
    """Radford et al. 2019, of six layers, with 13.8 M parameters; its first and last weight are one."""

    def __init__(self, words: int = 8192, dim: int = 384, layers: int = 6, heads: int = 6, length: int = 128) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.layers = nn.Sequential(*(_Layer(dim, heads) for _ in range(layers)), nn.LayerNorm(dim))
        self.head = nn.Linear(dim, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, words) of ids (B, T)."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        logits: torch.Tensor = self.head(self.layers(x))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        other = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.past = nn.Sequential(*(other if stride > 1 or inputs != outputs else ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.main(x) + self.past(x))


class WideAndDeep(nn.Module):
    """Cheng et al. 2016, without crosses: `fields` ids a sample, each out of `rows`; numbers of each id for both parts."""

    def __init__(self, fields: int, rows: int, dim: int) -> None:
        super().__init__()
        self.wide = nn.Embedding(fields * rows, 1, sparse=True)
        self.embedding = nn.Embedding(fields * rows, dim, sparse=True)
        self.deep = nn.Sequential(nn.Linear(fields * dim, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1))
        self.rows = rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (B) of ids (B, fields)."""
        rows = ids + self.rows * torch.arange(ids.shape[1])
        logits: torch.Tensor = self.wide(rows).sum((1, 2)) + self.deep(self.embedding(rows).flatten(1)).squeeze(1)
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 3072), nn.ReLU(), nn.Linear(3072, 1000)
    )  # fmt: skip


def _alexnet() -> nn.Module:
    """The single-tower AlexNet of torchvision, without dropout; pooled to 6x6 so that small images fit its dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000),
    )  # fmt: skip


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128 * 4 * 4, 176), nn.ReLU(), nn.Linear(176, 10),
    )  # fmt: skip


def _resnet() -> nn.Module:
    """He et al.'s ResNet-18, whose first layers are those for small images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [_Residual(inputs, outputs, outputs // inputs), _Residual(outputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _many() -> nn.Module:
    """2,004 small tensors."""
    layers = [layer for _ in range(500) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())]
    return nn.Sequential(nn.Linear(64, 32), *layers, nn.Linear(32, 10))


WORKLOADS: Mapping[str, Workload] = {
    w.name: w
    for w in (
        Workload("mlp", _mlp, (1024,), 1000, 64, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        Workload("alexnet", _alexnet, (3, 64, 64), 1000, 32, torch.optim.Adam, {"lr": 1e-4}),
        Workload("cnn", _cnn, (3, 32, 32), 10, 64, torch.optim.SGD, {"lr": 0.01}),
        Workload("resnet", _resnet, (3, 32, 32), 10, 16, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        Text("gpt", GPT, (128,), 8192, 4, torch.optim.AdamW, {"lr": 3e-4}),
        Workload("many", _many, (64,), 10, 64, torch.optim.Adam, {"lr": 1e-4}),
        Clicks("widedeep", lambda: WideAndDeep(26, 40_000, 32), (26,), 40_000, 256, torch.optim.Adagrad, {"lr": 0.01}),
    )
}
