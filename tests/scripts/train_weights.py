"""A user's script: a tagger whose sentences have 0 to 8 tokens each. Its loss is a mean over tokens."""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, IGNORED = 24, 4, 3, -100
CLASSES, FEATURES, LENGTH = 5, 6, 8
OPTIMIZER: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def dataset() -> TensorDataset:
    """Sentences of very different lengths. Those of one whole global batch are empty, and so are those of two micro-batches."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(96, LENGTH, FEATURES, generator=generator)
    lengths = torch.randint(0, LENGTH + 1, (96,), generator=generator)
    lengths[24:48] = 0
    lengths[8:12] = lengths[64:68] = 0
    tags = torch.randint(0, CLASSES, (96, LENGTH), generator=generator)
    return TensorDataset(words, torch.where(torch.arange(LENGTH) < lengths[:, None], tags, IGNORED))


def tagger() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


def token_loss(model: nn.Module, words: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens: NaN if there is none."""
    return nn.functional.cross_entropy(model(words).flatten(0, 1), tags.flatten(), ignore_index=IGNORED)


def main(kind: str, wrong: str = "") -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(tagger())
    opt = run.optimizer(torch.optim.AdamW, clip_norm=0.5, **OPTIMIZER)
    for words, tags in run.batches(dataset(), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=EPOCHS, shuffle=False):
        tokens = (tags != IGNORED).sum()
        if kind == "kept" and not tokens:  # a script may as well leave an empty batch out
            opt.step(weight=0)
            continue
        loss = token_loss(model, words, tags)
        loss.backward()
        run.log(loss=loss)
        opt.step(weight=float(wrong) if wrong else tokens)


if __name__ == "__main__":
    main(*sys.argv[1:])
