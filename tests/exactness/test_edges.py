"""Batches that nothing divides, more workers than micro-batches and more servers than chunks change nothing about the bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from roundtable.common.storage.event_log import RunLogReader

sys.path.insert(0, str(Path(__file__).parent))
from train_edges import CALLS, ROUNDS, dataset, network

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_edges.py")


def plain_loop() -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """The trained weights, the samples of each round, and its micro-batches."""
    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    samples: list[int] = []
    micro_batches: list[int] = []
    for call, (_, whole, micro, epochs) in enumerate(CALLS):
        for _ in range(epochs):
            x, y = dataset(call).tensors
            for bx, by in zip(x.split(whole), y.split(whole), strict=True):
                if len(samples) == ROUNDS:
                    break
                terms = []
                for mx, my in zip(bx.split(micro), by.split(micro), strict=True):
                    mx, my = mx.clone(), my.clone()  # as collating makes them: bits may depend on where a view begins
                    gradients = torch.autograd.grad(nn.functional.mse_loss(model(mx), my), parameters)
                    terms.append([g * len(mx) for g in gradients])
                micro_batches.append(len(terms))
                samples.append(len(bx))
                while len(terms) > 1:
                    paired = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(terms[::2], terms[1::2], strict=False)]
                    terms = paired + ([terms[-1]] if len(terms) % 2 else [])
                for parameter, total in zip(parameters, terms[0], strict=True):
                    parameter.grad = total / len(bx)
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
    return dict(model.state_dict()), samples, micro_batches


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (4, 3)])
def test_uneven_batches_give_the_bits_of_a_plain_loop(workers: int, servers: int, launch: Any, tmp_path: Path) -> None:
    expected, samples, micro_batches = plain_loop()
    assert max(micro_batches) < 4 and min(samples) == 1 and len(samples) == ROUNDS
    summary = launch("--workers", workers, "--servers", servers, "--rounds", ROUNDS, SCRIPT)
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert (summary["rounds"], summary["samples"]) == (ROUNDS, sum(samples))
    assert summary["micro_batches_committed"] == sum(micro_batches) and summary["dropped"] == 0
    assert [row.samples for row in RunLogReader(tmp_path / "run" / "events.sqlite").rounds()] == samples
