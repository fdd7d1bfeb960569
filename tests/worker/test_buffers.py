"""Buffers of every kind travel as their rule says, and what cannot travel is told of by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_replica import Cluster
from torch import nn

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.policies import load
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.model_parts import sizes
from roundtable.ps.params.dense import DenseParameters
from roundtable.worker.model_contents import file_of
from roundtable.worker.replica.buffers import Rules, find
from roundtable.worker.replica.replica import Replica

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
]  # fmt: skipfrom worker.contents import file_of


class Net(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def loss(self, change: Callable[[Net], None] = lambda net: None) -> torch.Tensor:
        change(self)
        return self.weight.sum()


def train(net: Net, *changes: Callable[[Any], None], rules: Rules | None = None, servers: int = 2) -> Cluster:
    """One round, each micro-batch of which changes buffers in its own way; with momentum, for there to be state to be saved."""
    cluster = Cluster(net, servers, torch.optim.SGD, rules=rules, lr=0.1, momentum=0.9)
    cluster.round([lambda change=change: net.loss(change) for change in changes], [4] * len(changes))  # type: ignore[misc]
    return cluster


def nothing(net: Net) -> None:
    pass


def bits(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_buffer_of_any_dtype_gets_the_value_of_the_last_micro_batch_that_changed_it(dtype: torch.dtype, tmp_path: Path) -> None:
    start, *values = (torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(4))
    seen = []

    def change(n: int) -> Callable[[Any], None]:
        def to(net: Any) -> None:
            seen.append(bits(net.state))
            net.state.copy_(values[n])

        return to

    net = Net(state=start.clone(), constant=start.clone())
    cluster = train(net, change(0), nothing, change(1), change(2), nothing)
    assert bits(net.state) == bits(values[2]) != bits(start) and bits(net.constant) == bits(start)  # type: ignore[arg-type]
    assert seen == [bits(start)] * 3  # each begins where the round does

    for store in cluster.stores:
        tensor_file.write(tmp_path / f"{cluster.stores.index(store)}.safetensors", store.state({}), {})
    files = TensorFiles(sorted(tmp_path.iterdir()))
    replica, policy = cluster.replica, load(Settings())
    cluster.stores = [DenseParameters(replica.layout, n, Update("SGD", [{"lr": 0.1, "momentum": 0.9}]), policy) for n in range(2)]
    for store in cluster.stores:
        store.restore(files)
    net.state.zero_()  # type: ignore[operator]
    cluster.pull()
    assert bits(net.state) == bits(values[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc])
def test_a_sparse_buffer_travels_by_its_parts(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    net = Net(adjacency=make(dense))

    def change(net: Any) -> None:
        net.adjacency = make(10 * dense.flip(1))

    train(net, change, lambda net: net.adjacency.values().mul_(3) if net.adjacency.layout != torch.sparse_coo else change(net))
    expected = 3 * dense if make is not torch.Tensor.to_sparse else 10 * dense.flip(1)
    assert torch.equal(net.adjacency.to_dense(), expected)  # type: ignore[operator]

    def grow(net: Any) -> None:
        net.adjacency = make(torch.ones(2, 3))

    with pytest.raises(UsageError, match=r"'adjacency' was .* with 2 entries and has become float32 .* with 6 entries"):
        train(net, grow)


def test_a_buffer_of_several_chunks_is_of_one_micro_batch_and_no_mixture() -> None:
    net = Net(queue=torch.zeros(CHUNK_BYTES // 4 + 7))

    def first(net: Any) -> None:
        net.queue.fill_(1.0)

    def second(net: Any) -> None:
        net.queue[-1] = 2.0  # which is in the last chunk

    train(net, first, second)
    assert net.queue[:-1].eq(0).all() and net.queue[-1] == 2  # type: ignore[index, operator]


@pytest.mark.parametrize("servers", [1, 3])
def test_a_script_may_put_other_tensors_in_the_place_of_buffers(servers: int) -> None:
    """As in `self.average = 0.9 * self.average + ...`, with a graph that hangs on."""
    net = Net(average=torch.ones(3), t=torch.ones(2, 3).t())
    net.again = nn.Module()
    net.again.register_buffer("shared", net.average)  # type: ignore[arg-type]

    def change(net: Any) -> None:
        net.average = net.average * 2 + 0 * net.weight.sum()
        net.t = net.t + 1

    cluster = train(net, change, change, servers=servers)
    assert net.average.tolist() == [2.0] * 3 and net.t.tolist() == [[2.0, 2.0]] * 3  # type: ignore[union-attr, operator]
    cluster.round([lambda: net.loss(change)], [4])
    assert net.average.tolist() == [4.0] * 3 and net.again.shared is net.average  # type: ignore[union-attr, operator]


def test_what_is_merged_how_depends_on_the_layer_and_on_what_the_script_says() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("running_mean", "running_var", "scale"):
                self.register_buffer(name, torch.ones(2))

    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm2d(2),
            "instance": nn.InstanceNorm1d(2, track_running_stats=True),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            "own": Own(),
            "net": Net(queue=torch.ones(2, 2), place=torch.zeros(1, dtype=torch.int64), cache=torch.zeros(2)),
        }
    )
    buffers, constants = find(model, {"net.*": "last", "net.cache": "own", "own.scale": "mean"})
    spectral = "spectral.parametrizations.weight.0"
    assert {buffer.name: buffer.rule for buffer in buffers} == {
        "batch.running_mean": "mean", "batch.running_var": "mean", "batch.num_batches_tracked": "max",
        "instance.running_mean": "mean", "instance.running_var": "mean", "instance.num_batches_tracked": "max",
        f"{spectral}._u": "last", f"{spectral}._v": "last",
        "own.running_mean": "mean", "own.running_var": "mean", "own.scale": "mean",
        "net.queue": "last", "net.place": "last",
    }  # fmt: skip
    assert constants == []


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"quue": "last"}, "a rule is for the buffer 'quue', but the model has no such buffer; it has 'queue', 'place'."),
        ({"queue": "first"}, "there is no rule 'first' for the buffer 'queue': give one of mean, max, sum, last, own."),
        ({"*": "mean"}, "the buffer 'place' is int64 [1], which has no mean: give 'last', 'max' or 'sum'."),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rules: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(Net(queue=torch.ones(2), place=torch.zeros(1, dtype=torch.int64)), rules)
    assert str(caught.value) == said


def test_a_buffer_that_is_in_no_file_does_not_travel_and_must_not_change() -> None:
    net = Net()
    net.register_buffer("rotary", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)
    cluster = train(net, nothing)
    assert [spec.name for spec in cluster.replica.specs] == ["weight"]
    cluster.replica.check_constants()
    net.rotary = net.rotary.clone()  # type: ignore[operator]
    cluster.replica.check_constants()  # the same again
    net.rotary[0] = 7  # type: ignore[index, operator]
    with pytest.raises(UsageError, match=r"'rotary' has changed.*buffers=\{'rotary': 'last'\}.*buffers=\{'rotary': 'own'\}"):
        cluster.replica.check_constants()
    named = train(net, lambda net: net.rotary.zero_(), rules={"rotary": "last"})
    assert named.replica.specs[-1].name == "rotary" and not net.rotary.any()  # type: ignore[operator, union-attr]
    own = train(net, lambda net: net.rotary.add_(1), rules={"rotary": "own"})
    own.replica.check_constants()
    assert len(own.replica.specs) == 1 and net.rotary.tolist() == [1] * 4  # type: ignore[operator, union-attr]


def test_the_models_file_has_pairs_for_a_dtype_without_a_name_and_the_parts_of_a_sparse_buffer() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("turns", torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128))
    model.register_buffer("adjacency", torch.tensor([[0.0, 5.0], [0.0, 0.0]]).to_sparse())
    replica = Replica(model, {id(model.weight): 0, id(model.bias): 0}, 1)
    names = [spec.name for spec in replica.specs]
    file = {entry.name: entry for entry in file_of(model, replica.tensors, replica.specs)}
    assert (file["turns"].dtype, file["turns"].shape) == ("F64", [2, 2])
    assert (file["adjacency.indices"].shape, file["adjacency.values"].dtype) == ([2, 1], "F32")
    assert {name: names[entry.of[0]] for name, entry in file.items()} == {name: name for name in names}
    assert sizes(replica.layout)[file["turns"].of[0]] == 32
