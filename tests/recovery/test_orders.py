"""Real runs with all kinds of orders, in which a worker is killed and the power is cut: each sample counts as often as the order
says, and under `sync` the weights are those of a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_orders import EPOCHS, LABELS, LENGTHS, SAMPLES, WEIGHTS, Counting, dataset, network, own_order

from benchmarks.live import Cluster
from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.runtime.failpoints import VARIABLE
from roundtable.common.storage.run_files import MODEL_FILE
from roundtable.worker.data.orders import OrderFunction, class_balanced_order, length_bucketed_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("train_orders.py")
KILL = {VARIABLE: "worker-1:computing:14:kill"}


def draw(epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, "order", epoch))


#: The order of each loop of the script, and the sizes of the rounds of an epoch.
LOOPS: list[tuple[OrderFunction, list[int]]] = [
    (lambda seed, epoch: torch.randperm(SAMPLES, generator=draw(epoch)), [25, 25, 25, 25, 17]),
    (lambda seed, epoch: torch.multinomial(torch.tensor(WEIGHTS).double(), 60, True, generator=draw(epoch)), [25, 25]),
    (class_balanced_order(LABELS), [25, 25, 25, 25, 17]),
    (length_bucketed_order(LENGTHS, 8), [25, 25, 25, 25, 17]),
    (lambda seed, epoch: torch.arange(0, SAMPLES, 2)[torch.randperm(59, generator=draw(epoch))], [25, 25, 9]),
    (own_order, [25, 25, 25]),
]
#: How rounds are cut: no micro-batch has one sample.
CUTS = {25: [8, 8, 7, 2], 17: [8, 7, 2], 9: [7, 2]}


def rounds() -> Iterator[list[list[int]]]:
    """The samples of each round's micro-batches."""
    for loop, (order, sizes) in enumerate(LOOPS):
        for epoch in range(loop * EPOCHS, (loop + 1) * EPOCHS):
            indices = torch.as_tensor(order(0, epoch)).tolist()
            for size in sizes:
                whole, indices = indices[:size], indices[size:]
                yield [part.tolist() for part in torch.tensor(whole).split(CUTS[size])]


def plain_loop() -> Counting:
    model, (x, y, _) = network(), dataset().tensors
    parameters = list(model.parameters())
    for micro_batches in rounds():
        terms = []
        for part in micro_batches:
            loss = nn.functional.cross_entropy(model(x[part], torch.tensor(part)), y[part])
            terms.append([gradient * len(part) for gradient in torch.autograd.grad(loss, parameters)])
        samples = sum(map(len, micro_batches))
        while len(terms) > 1:
            paired = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(terms[::2], terms[1::2], strict=False)]
            terms = paired + ([terms[-1]] if len(terms) % 2 else [])
        for parameter, total in zip(parameters, terms[0], strict=True):
            parameter.grad = total / samples
        torch.optim.SGD(parameters, lr=0.1).step()
    return model


@pytest.mark.parametrize("policy", ["sync", *(pytest.param(name, marks=pytest.mark.long) for name in ("ssp", "async", "local"))])
def test_each_sample_counts_as_often_as_its_order_says_after_a_killed_worker_and_a_power_cut(
    policy: str, cluster: Callable[..., Cluster], resumed: Callable[..., Cluster]
) -> None:
    run = cluster("--workers", 2, "--servers", 2, "--policy", policy, "--checkpoint-every", 0.2, SCRIPT, env=KILL)
    least = 1 if policy == "local" else 20  # a checkpoint of it counts merges
    run.until(lambda: any(event.data["round"] > least for event in run.events("checkpoint")), "checkpoint")
    run.cut_power()
    summary = resumed("--workers", 3).summary()
    expected = plain_loop()
    assert summary["rounds"] == 2 * sum(len(sizes) for _, sizes in LOOPS) and summary["dropped"] == 0
    found = load_file(run.folder / MODEL_FILE)
    assert found["seen"].tolist() == expected.seen.tolist()
    if policy == "sync":
        assert all(torch.equal(found[name], parameter) for name, parameter in expected.named_parameters())
    if policy != "local":
        assert len(list(run.folder.glob("failpoint-*"))) == 1
    log = (run.folder / "logs" / "worker-0.log").read_text()
    assert f"{summary['rounds']} rounds in all" in log
