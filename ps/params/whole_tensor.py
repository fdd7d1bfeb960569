"""A tensor whose update looks at more than one element: it lies on one server, and is updated whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from roundtable.common.model.layout import Chunk, Layout, together
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.optimizer_classes import class_named, with_tuples

#: Prefixes of the optimizer's state in checkpoints: tensors, and numbers.
_STATE, _NUMBER = "optimizer-whole", "optimizer-number"
#: Where a chunk's new weights go, and where its old ones are.
Places = tuple[torch.Tensor | None, torch.Tensor | None]


class WholeTensor:
    """The master weights of a tensor, its optimizer, and its mean gradient as that comes chunk by chunk.

    The optimizer is made with the first gradient, because it may keep a copy of the first weights.
    """

    def __init__(self, name: str, shape: Sequence[int], chunks: int, update: Update, group: int, dtype: torch.dtype) -> None:
        self.name, self._shape, self._chunks = name, tuple(shape), chunks
        self._class = class_named(update.class_of(group))
        self._settings = with_tuples(update.groups[group])
        #: The master weights, flat. Chunks have views of them.
        self.values = torch.zeros(math.prod(shape), dtype=dtype)
        self._parameter = self.values.view(self._shape)
        self._optimizer: torch.optim.Optimizer | None = None
        self._gradient: torch.Tensor | None = None
        self._over(torch.empty(self._shape, dtype=dtype, device="meta"))  # an error is raised here
        #: By chunk whose part of a round's gradient is here, or that has none: where its weights go.
        self._due: dict[int, Places] = {}

    def take(
        self,
        chunk: Chunk,
        gradient: torch.Tensor | None,
        places: Places,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None,
        lr_scale: float,
    ) -> dict[int, Places]:
        """Take a chunk's part of the mean gradient; None if the chunk has none. With the last chunk's, update the weights.

        Return the places of all chunks after an update, else an empty dict. Other arguments are as in `DenseParameters.apply`.
        """
        self._due[chunk.id] = places
        if gradient is not None:
            if self._gradient is None:
                self._gradient = torch.zeros_like(self.values)
            start = chunk.pieces[0].start
            self._gradient[start : start + chunk.numel] = gradient if factor is None else gradient * factor
        if len(self._due) < self._chunks:
            return {}
        due, self._due = self._due, {}
        if self._gradient is not None:
            self._step(self._gradient, hypers, lr_scale)
        self._gradient = None
        return due

    def _step(self, gradient: torch.Tensor, hypers: Mapping[str, Any], lr_scale: float) -> None:
        optimizer = self._made()
        group = optimizer.param_groups[0]
        group.update(with_tuples(hypers))
        rate = group["lr"]
        group["lr"] = rate * lr_scale
        self._parameter.grad = gradient.view(self._shape)
        optimizer.step()
        self._parameter.grad = None
        group["lr"] = rate

    def _made(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = self._over(self._parameter)
        return self._optimizer

    def _over(self, parameter: torch.Tensor) -> torch.optim.Optimizer:
        known = {key: value for key, value in self._settings.items() if key in inspect.signature(self._class).parameters}
        return self._class([{"params": [parameter], **self._settings}], **known)

    def state(self) -> Iterator[Entry]:
        """Yield the optimizer's state for a checkpoint, as copies."""
        state = self._optimizer.state.get(self._parameter, {}) if self._optimizer is not None else {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                yield Entry(f"{_STATE}/{name}/{self.name}", value.shape, [value.clone()])
            elif isinstance(value, int | float):
                yield Entry(f"{_NUMBER}/{name}/{self.name}", [], [as_tensor(value)])

    def was_trained(self, files: TensorFiles) -> bool:
        """Return True if a checkpoint has state of this tensor's optimizer."""
        return bool(files.below(_STATE, self.name) or files.below(_NUMBER, self.name))

    def restore(self, files: TensorFiles) -> None:
        """Load the state that `state` gave. The weights are in place already."""
        found: dict[str, Any] = {name: files[f"{_STATE}/{name}/{self.name}"].clone() for name in files.below(_STATE, self.name)}
        found |= {name: files[f"{_NUMBER}/{name}/{self.name}"].item() for name in files.below(_NUMBER, self.name)}
        if found:
            self._made().state[self._parameter] = found


def as_tensor(number: float) -> torch.Tensor:
    """Return a number of an optimizer's state as checkpoints have it."""
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)


def whole_tensors(layout: Layout, server: int, update: Update) -> dict[int, WholeTensor]:
    """Return the tensors on a server that are updated whole, by number."""
    found = {}
    for chunks in together(chunk for chunk in layout.on(server) if chunk.whole):
        number, dtype = chunks[0].pieces[0].tensor, dtype_of(chunks[0].sum_dtype)
        spec = layout.tensors[number]
        found[number] = WholeTensor(spec.name, spec.shape, len(chunks), update, spec.group, dtype)
    return found
