"""Weights that a forward pass may begin without: whatever touches one waits until it is here.

So the first layers compute while the weights of later ones are still on their way. Code that torch knows nothing of is met at the
door of the module that the parameter belongs to.
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
    """Which of a replica's parameters are awaited."""

    def __init__(self, replica: Replica, arrive: Callable[[int], None]) -> None:
        """`arrive(index)` is to come back when all weights of tensor number `index` were told to `came`."""
        self._replica = replica
        self._arrive = arrive
        #: Chunks still to come, by tensor.
        self._missing: dict[int, set[int]] = {}
        numbers = {id(tensor): index for index, tensor in enumerate(replica.tensors)}
        #: By module, its own parameters.
        self._own = {
            module: [numbers[id(p)] for p in module.parameters(recurse=False) if id(p) in numbers]
            for module in replica.model.modules()
        }
        #: At the doors of all modules, while something is awaited: a hook of one module would be copied and saved with it, and
        #: scripted modules take none.
        self._hook: RemovableHandle | None = None

    @property
    def needed_first(self) -> set[int]:
        """Chunks without which nothing can begin: those with buffers, and parameters of a kind of their own. All of them where
        the model is compiled, for then torch does not ask."""
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
        """Whether weights that the model is to have now are still to come."""
        return bool(self._missing)

    def expect(self, chunks: Iterable[int]) -> None:
        """The weights of these chunks are still to come."""
        for chunk in chunks:
            for piece in self._replica.layout.chunks[chunk].pieces:
                self._missing.setdefault(piece.tensor, set()).add(chunk)
        for index in self._missing:
            put_off(self._replica.tensors[index], functools.partial(self._arrive, index))
        if self._missing and self._hook is None:
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def came(self, chunks: Iterable[int]) -> None:
        """These chunks are in the model, or nobody needs to wait for them any more."""
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
        """Nobody needs to wait any more: the model keeps the values that it has."""
        self.came(chunk.id for chunk in self._replica.layout.chunks)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        for index in self._own.get(module, ()):
            if index in self._missing:
                self._arrive(index)
