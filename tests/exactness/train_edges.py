"""A user's script whose batches come out uneven: three data sets, one after another. Run by test_edges.py, which repeats it."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

#: (samples, global batch, micro-batch, epochs) of each call of batches(): nothing divides anything; less than a micro-batch;
#: one micro-batch a round; and more than --rounds leaves time for.
CALLS = [(23, 10, 4, 2), (3, 8, 4, 2), (7, 3, 3, 1), (23, 10, 4, 5)]
#: The first three calls have 6 + 2 + 3 rounds; of the last, an epoch and a round are left.
ROUNDS = 15


def dataset(call: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(call)
    samples = CALLS[call][0]
    return TensorDataset(torch.randn(samples, 5, generator=generator), torch.randn(samples, 2, generator=generator))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2))


def main() -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(network())
    opt = run.optimizer(torch.optim.AdamW, lr=0.02, clip_norm=0.5)
    for call, (_, whole, micro, epochs) in enumerate(CALLS):
        for x, y in run.batches(dataset(call), global_batch=whole, micro_batch=micro, epochs=epochs, shuffle=False):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.log(loss=loss)
            opt.step()
    assert list(run.batches(dataset(0))) == []  # --rounds are over
    assert run.round == ROUNDS


if __name__ == "__main__":
    main()
