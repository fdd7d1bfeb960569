"""Checks for parameters that a script changes during training. Servers do not see such changes, so they would be lost."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import some
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.client.push_pull import ParameterClient
from roundtable.worker.loop.weight_fetcher import fetch_again
from roundtable.worker.replica.buffers import as_bytes, same_bytes
from roundtable.worker.replica.replica import Replica

_WAY_OUT = (
    "servers hold the parameters, so this change would be lost. Change them before the first batch, keep values that the script "
    "changes in a buffer or outside of the model, and evaluate other weights in a copy of the model."
)
_version = operator.attrgetter("_version")


def check_layers(model: nn.Module, may_change: Container[int]) -> None:
    """Raise UsageError for a layer that writes to its weight in the forward, unless its id is among those that may change."""
    for name, module in model.named_modules():
        writes = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        if writes and id(module.weight) not in may_change:
            raise UsageError(
                f"the layer '{name}' has max_norm={module.max_norm:g}, so it writes to its weight in each forward; that would be "
                "lost, as servers hold the weights: leave max_norm out and scale the rows that are looked up in the forward, or "
                "train it under --policy local or average."
            )


class Edits:
    """Watches a replica's parameters for writes by the script.

    torch counts writes to a tensor, but not those through `.data`. This package writes through `.data`, so only the script's
    writes are counted.
    """

    def __init__(self, context: WorkerContext, client: ParameterClient, replica: Replica, only_frozen: bool = False) -> None:
        """`only_frozen`: the trained parameters are this worker's own, so the script may change them."""
        self._context = context
        self._client = client
        self._replica = replica
        self._only_frozen = only_frozen
        self._watched: dict[int, torch.Tensor] = {}
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []
        #: Where each watched parameter, and each module, is found.
        self._places: list[tuple[Mapping[str, Any], str, object]] = []

    def note(self) -> None:
        """Take the present parameters as unchanged."""
        parameters = self._replica.parameters
        self._watched = {index: tensor for index, tensor in parameters.items() if not tensor.is_inference()}
        self._tensors = list(self._watched.values())
        self._versions = list(map(_version, self._tensors))
        self._places = _places(self._replica.model, self._tensors)

    def check_places(self) -> None:
        """Raise UsageError if a parameter is no longer in the model."""
        if not all(place.get(name) is thing for place, name, thing in self._places):
            here = {id(parameter) for parameter in self._replica.model.parameters()}
            gone = [index for index, tensor in self._watched.items() if id(tensor) not in here]
            if gone:
                raise UsageError(f"the script has put another parameter in place of {self.named(gone)}: {_WAY_OUT}")
            self._places = _places(self._replica.model, self._tensors)

    def written(self) -> list[int]:
        """Return the numbers of parameters that were written to since `note`."""
        now = list(map(_version, self._tensors))
        if now == self._versions:
            return []
        pairs = zip(self._watched, now, self._versions, strict=True)
        return [index for index, version, before in pairs if version != before]

    def lost(self) -> list[int]:
        """Return the numbers of those whose values the servers hold."""
        written = self.written()
        if written and self._only_frozen:
            frozen = self._replica.frozen
            return [index for index in written if index in frozen]
        return written

    def check(self, round_: int, version: int | None, who: str = "the script") -> None:
        """Raise UsageError for a parameter that the script, or the part `who` of it, has changed in `round_`.

        `version`: the version of the weights in the model, which are fetched again for comparison. If it is None, servers may
        have a newer version by now, and any write counts as a change.
        """
        indices = self.lost()
        if not indices:
            return
        if version is not None:
            before = {index: self._replica.tensors[index].detach().clone() for index in indices}
            if not self._restore(version):
                return  # the round is over, and its weights are gone: frozen ones are compared the next time
            now = {index: self._replica.tensors[index].detach() for index in indices}
            indices = [index for index, values in before.items() if not same_bytes(as_bytes(values), as_bytes(now[index]))]
        if indices:
            raise UsageError(f"{who} has changed {self.named(indices)} in round {round_}: {_WAY_OUT}")
        self.note()

    def _restore(self, version: int) -> bool:
        """Put the servers' weights of `version` into watched parameters again. Return False if that round is over."""
        with self._context.io.lock:
            self._client.want_all()
        weights = fetch_again(self._context, self._client, version, "the weights")
        if weights is None:
            return False
        ours = self._replica.frozen if self._only_frozen else self._watched
        chunks = {chunk.id for index in ours for chunk in self._replica.chunks_of(index)}
        self._replica.load({chunk: found for chunk, found in weights.items() if chunk in chunks}, copy=self._only_frozen)
        return True

    def named(self, indices: Iterable[int]) -> str:
        return some([f"'{self._replica.specs[index].name}'" for index in indices])


def _places(model: nn.Module, tensors: Iterable[torch.Tensor]) -> list[tuple[Mapping[str, Any], str, object]]:
    """Return the dictionary, the name and the object for each parameter and module of `model`."""
    watched = {id(tensor) for tensor in tensors}
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items() if id(p) in watched]
    return [*parameters, *((m._modules, name, child) for m in modules for name, child in m._modules.items())]
