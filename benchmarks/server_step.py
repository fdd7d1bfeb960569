"""The memory rate of a server's step, which sums contributions and updates, beside the rate of a plain copy.

`python -m benchmarks.server_step` measures both in one process on one core. It counts the fewest bytes that a step must move:
each contribution, the old weights and the optimizer's state once in, the new weights and the state once out.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import click
import torch

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import make_layout
from roundtable.common.model.partial_sum import Sum
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.ps.params.dense import DenseParameters
from roundtable.ps.params.weight_buffers import WeightBuffers

#: Name -> class of torch.optim, its settings, and the number of state tensors that it reads and writes.
_OPTIMIZERS = {
    "SGD": ("SGD", {"lr": 1e-3}, 0),
    "SGD-momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}, 1),
    "Adam": ("Adam", {"lr": 1e-3}, 2),
    "Adam-fused": ("Adam", {"lr": 1e-3, "fused": True}, 2),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--values", type=click.IntRange(min=1), default=20_000_000, show_default=True, help="float32 weights.")
@click.option("--contributions", type=click.IntRange(1, 2), default=2, show_default=True, help="Sums that come in a round.")
@click.option("--times", type=click.IntRange(min=1), default=9, show_default=True, help="Steps; the median counts.")
def cli(values: int, contributions: int, times: int) -> None:
    """Measure a server's step beside memcpy."""
    torch.set_num_threads(1)
    source, target = torch.ones(values), torch.ones(values)
    for name, (optimizer, settings, states) in _OPTIMIZERS.items():
        layout = make_layout([TensorSpec("w", [values], "float32", 0)], 1)
        store = DenseParameters(layout, 0, Update(optimizer, [{**settings}]), load(Settings()))
        weight_buffers, turn = WeightBuffers(layout.on(0), 2, shared=True), [0]
        total = {c.id: [Sum(torch.randn(c.numel), 1, scale=64.0) for _ in range(contributions)] for c in layout.on(0)}

        def step(
            store: DenseParameters = store,
            weight_buffers: WeightBuffers = weight_buffers,
            turn: list[int] = turn,
            total: dict[int, list[Sum]] = total,
        ) -> None:
            turn[0] ^= 1
            for chunk, sums in total.items():
                store.apply(chunk, sums, 64 * contributions, {}, into=weight_buffers[turn[0]][chunk])

        for _ in range(3):
            step()
        copying, stepping = _medians_s((lambda: target.copy_(source), step), times)
        copied, moved = 2 * source.nbytes / copying, (contributions + 2 + 2 * states) * source.nbytes / stepping
        shown = f"{moved / 1e9:.1f} GB/s, {moved / copied:.0%} of memcpy's {copied / 1e9:.1f} GB/s"
        print(f"{name}: {stepping * 1e3:.1f} ms, {shown}")


def _medians_s(what: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Return the median seconds of each function. They take turns."""
    seconds: list[list[float]] = [[] for _ in what]
    for _, (of, do) in itertools.product(range(times), zip(seconds, what, strict=True)):
        began = time.perf_counter()
        do()
        of.append(time.perf_counter() - began)
    return [statistics.median(of) for of in seconds]


if __name__ == "__main__":
    cli()
