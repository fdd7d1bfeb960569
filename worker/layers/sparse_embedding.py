"""Embedding rows in a worker: `nn.Embedding(sparse=True)` whose rows are on the servers and nowhere else.

A forward pulls the rows of its ids as a small leaf of the graph, and contributes the gradient of that leaf. The table itself is
never here, so it may be larger than a worker's memory.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from roundtable.common.model.row_pages import pages
from roundtable.common.model.sparse_rows import RowSum, RowSums, add_rows, cut, no_rows, owner_of, page_ids
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.embedding import InitialRows, RowPush
from roundtable.common.protocol.messages.setup import Request
from roundtable.common.protocol.model_spec import TableSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names
from roundtable.worker.client.context import is_accepted
from roundtable.worker.client.embedding_client import EmbeddingClient
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.optim.optimizer import Groups
from roundtable.worker.replica.absent_parameter import absent

#: Classes of torch.optim that leave a row without a gradient alone, if momentum and weight decay are 0.
OPTIMIZERS = ("SGD", "Adagrad", "Adam", "AdamW")
#: Arguments of nn.Embedding that are not possible, and why.
_ARGUMENTS = {
    "padding_idx": "a row that must not be trained is not kept apart from the others",
    "max_norm": "it writes to the weights in the forward",
    "scale_grad_by_freq": "torch has no such gradient that is sparse",
}
_STD = "roundtable_std"


def make_embedding(rows: int, dim: int, std: float) -> nn.Embedding:
    """Return the layer for `roundtable.embedding`."""
    module = nn.Embedding(rows, dim, sparse=True, device="meta")
    setattr(module, _STD, std)
    return module


@dataclass(frozen=True)
class SparseEmbedding:
    """A sparse embedding: its description for the servers, and the layer that looks up its rows."""

    spec: TableSpec
    module: nn.Embedding


def find_tables(model: nn.Module, groups: Groups) -> list[SparseEmbedding]:
    """Return all sparse embeddings of `model` with a weight in one of the groups. Raises UsageError for an impossible one."""
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    tables = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and id(module.weight) in group_of:
            name = tensor_names.plain(f"{name}.weight" if name else "weight")
            _check_module(name, module, model)
            weight = module.weight
            std = float(getattr(module, _STD, 1.0)) if weight.is_meta else None
            tables.append(SparseEmbedding(TableSpec(name, weight.shape[0], weight.shape[1], group_of[id(weight)], std), module))
    return tables


def _check_module(name: str, module: nn.Embedding, model: nn.Module) -> None:
    why = f"'{name}' cannot be row-sparse: "
    instead = "; without sparse=True it is trained like any other parameter."
    for argument, reason in _ARGUMENTS.items():
        value = getattr(module, argument)
        if value is not None and value is not False:
            raise UsageError(f"{why}{argument} is set, and {reason}{instead}")
    if type(module).forward is not nn.Embedding.forward or "forward" in vars(module):
        raise UsageError(f"{why}its layer has a forward of its own, which would need the whole table{instead}")
    if sum(p is module.weight for other in model.modules() for p in other._parameters.values()) > 1:
        raise UsageError(f"{why}another layer has the same weight and would need the whole table{instead}")
    if module.weight.dtype != torch.float32:
        raise UsageError(f"{why}it is {module.weight.dtype}, and tables are kept in torch.float32{instead}")
    if not module.weight.numel():
        raise UsageError(f"{why}it is empty.")


def check_training(
    tables: Sequence[SparseEmbedding], cls: type[torch.optim.Optimizer], settings: Sequence[Mapping[str, Any]], policy: Policy
) -> None:
    """Raise UsageError if tables cannot be trained in this way. `settings` are those of all parameter groups."""
    for table in tables:
        name, group = table.spec.name, settings[table.spec.group]
        if policy.is_local:
            raise UsageError(
                f"'{name}' is row-sparse, but policy {policy.settings.policy} trains replicas that have all parameters: choose "
                "another policy, or leave out sparse=True."
            )
        if cls.__name__ not in OPTIMIZERS:
            raise UsageError(
                f"'{name}' is row-sparse, but {cls.__name__} cannot update some rows only: choose one of "
                f"{', '.join(OPTIMIZERS)}, or leave out sparse=True."
            )
        for key in ("momentum", "weight_decay"):
            if group.get(key):
                raise UsageError(
                    f"'{name}' is row-sparse, but {key}={group[key]:g} would move rows that no sample has touched: put it into a "
                    f"parameter group of its own with {key}=0."
                )
        if policy.settings.delay_compensation:
            raise UsageError(f"'{name}' is row-sparse, but servers do not keep old rows: leave out --delay-compensation.")


class RowSparse:
    """The tables of one worker's model, and the client that pulls and pushes their rows. There may be no table."""

    def __init__(
        self,
        link: IoThread,
        tables: Sequence[SparseEmbedding],
        servers: int,
        version: Callable[[], int],
        timeout: float,
        sends_first: bool,
        may_be_replaced: bool = False,
    ) -> None:
        """Make the layers look up rows on the servers from now on, and free their weights' memory. The servers must have the
        Setup.

        If `sends_first`, send first values. `version()` returns the round of the model's other weights. For `may_be_replaced` see
        `EmbeddingClient`.
        """
        self._link = link
        self._specs = [table.spec for table in tables]
        self._servers = servers
        self._version = version
        self._timeout = timeout
        self.client = EmbeddingClient(self._specs, servers, may_be_replaced)
        #: By table: the gradients since the last contribution, in the order in which backward made them.
        self._gradients: list[list[RowSum]] = [[] for _ in tables]
        self._weights: list[nn.Parameter] = []
        self._sent = 0
        for number, table in enumerate(tables):
            if sends_first and table.spec.std is None:
                self._send_first(number, table)
            self._take_over(number, table.module)

    def _send_first(self, table: int, of: SparseEmbedding) -> None:
        weight = of.module.weight.detach().cpu()
        for page in pages(of.spec):
            ids = page_ids(of.spec, page)
            owners = owner_of(ids, self._servers)
            for server in range(self._servers):
                init = InitialRows(self._sent, table, page)
                self._sent += 1
                frames = cut(weight[ids[owners == server]])
                self._link.request(f"server-{server}", init, is_accepted(Request.INITIAL_ROWS, init.id), self._timeout, frames)

    def _take_over(self, number: int, layer: nn.Embedding) -> None:
        def forward(module: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
            return self._look_up(number, input, contributes=module is layer and module.weight.requires_grad)

        # a copy of the model keeps this but contributes nothing; a model read from a file has torch's own forward again
        layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]
        layer.weight = absent(layer.weight, self._specs[number].name, layer.weight.requires_grad)
        self._weights.append(layer.weight)

    # ---- forward and backward

    def _look_up(self, table: int, ids: torch.Tensor, contributes: bool) -> torch.Tensor:
        """Return the rows (*, dim) of `ids` (*), integers of any shape. Raises IndexError for an id outside the table."""
        spec = self._specs[table]
        distinct, at = ids.detach().to("cpu", torch.int64).unique(return_inverse=True)
        if len(distinct) and not (distinct[0] >= 0 and distinct[-1] < spec.rows):
            raise IndexError(f"an id of '{spec.name}' is {int(distinct[0])} or {int(distinct[-1])}; it has {spec.rows} rows")
        rows = self._pull(table, distinct).to(ids.device)
        if contributes and torch.is_grad_enabled():

            def keep(leaf: torch.Tensor) -> None:
                assert leaf.grad is not None
                self._gradients[table].append(RowSum(distinct, leaf.grad.detach().cpu()))
                leaf.grad = None

            rows.requires_grad_().register_post_accumulate_grad_hook(keep)
        return embedding(at.to(ids.device), rows)

    def _pull(self, table: int, ids: torch.Tensor) -> torch.Tensor:
        with self._link.lock:
            messages = self.client.pull(table, ids, self._version(), time.monotonic())
        self._link.send(*messages)
        return self._wait(table)

    def _wait(self, table: int) -> torch.Tensor:
        self._link.wait(lambda: self.client.complete, self._timeout, lambda: self._waited_for(table))
        return self.client.take()

    def _waited_for(self, table: int) -> str:
        servers = " and ".join(self.client.missing())
        return f"rows of '{self._specs[table].name}' for round {self._version()} from {servers}"

    # ---- contributions

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradient of each table that has one, (N, dim), for the rows that were looked up.

        `contribution` uses the same tensors, so clipping them in place changes the contribution.
        """
        self._gradients = [[functools.reduce(add_rows, one)] if one else [] for one in self._gradients]
        return [one[0].values for one in self._gradients if one]

    def contribution(self, weight: float) -> RowSums:
        """Return the gradients since the last contribution, times the micro-batch's weight. There are none if that is 0."""
        self.gradients()
        sums = [
            RowSum(one[0].ids, one[0].values * weight) if one and weight else no_rows(spec)
            for spec, one in zip(self._specs, self._gradients, strict=True)
        ]
        self.forget()
        return sums

    def forget(self) -> None:
        """Drop the gradients, as zero_grad does."""
        for gradients in self._gradients:
            gradients.clear()

    def push(self, push: RowPush, sums: RowSums, bases: Mapping[int, int]) -> None:
        """Push a contribution to all servers. `push` lacks what differs between servers."""
        if self._specs:
            with self._link.lock:
                messages = self.client.push(push, sums, bases, time.monotonic())
            self._link.send(*messages)
