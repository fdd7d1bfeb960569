"""Weights that may come after a forward pass has started: each use of such a weight waits until it is here.

So the first layers compute while the weights of later ones are still on their way. torch does not see all code that uses weights.
Therefore each module also waits for its own parameters before its forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from roundtable.worker.replica.lazy_parameter import LazyParameter, materialize, put_off
from roundtable.worker.replica.replica import Replica


class LazyWeights:
    """The parameters of a replica that are still to come."""

    def __init__(self, replica: Replica, arrive: Callable[[int], None]) -> None:
        """`arrive(index)` must return once all chunks of tensor number `index` were passed to `came`."""
        self._replica = replica
        self._arrive = arrive
        #: By tensor: the chunks still to come.
        self._missing: dict[int, set[int]] = {}
        numbers = {id(tensor): index for index, tensor in enumerate(replica.tensors)}
        #: By module: its own parameters.
        self._own = {
            module: [numbers[id(p)] for p in module.parameters(recurse=False) if id(p) in numbers]
            for module in replica.model.modules()
        }
        #: A hook on all modules, while a parameter is still to come. A hook on one module would be copied and saved with it,
        #: and scripted modules take none.
        self._hook: RemovableHandle | None = None

    @property
    def needed_first(self) -> set[int]:
        """The chunks without which no forward can start: those with buffers, or with parameters of a class of their own.

        If the model is compiled, these are all chunks, because compiled code does not ask the parameter's class.
        """
        whole = self._replica.is_scripted or "torch._dynamo" in sys.modules
        return {
            chunk.id
            for chunk in self._replica.layout.chunks
            if whole or any(not self._can_wait(piece.tensor) for piece in chunk.pieces)
        }

    def _can_wait(self, index: int) -> bool:
        return type(self._replica.tensors[index]) in (nn.Parameter, LazyParameter)

    @property
    def any(self) -> bool:
        """Whether weights are still to come that the model needs now."""
        return bool(self._missing)

    def expect(self, chunks: Iterable[int]) -> None:
        """Make the model wait for the weights of these chunks when it uses them."""
        for chunk in chunks:
            for piece in self._replica.layout.chunks[chunk].pieces:
                self._missing.setdefault(piece.tensor, set()).add(chunk)
        for index in self._missing:
            put_off(self._replica.tensors[index], functools.partial(self._arrive, index))
        if self._missing and self._hook is None:
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def came(self, chunks: Iterable[int]) -> None:
        """Stop waiting for these chunks: they are in the model, or are not needed any more."""
        found = set(chunks)
        for index in list(self._missing):
            self._missing[index] -= found
            if not self._missing[index]:
                del self._missing[index]
                materialize(self._replica.tensors[index])
        if not self._missing and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def give_up(self) -> None:
        """Stop waiting altogether. The model keeps the values that it has."""
        self.came(chunk.id for chunk in self._replica.layout.chunks)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        for index in self._own.get(module, ()):
            if index in self._missing:
                self._arrive(index)
