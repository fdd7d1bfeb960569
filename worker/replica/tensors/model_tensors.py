"""The tensors of a model that travel, in the order of the layout, and the chunks in which they lie."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from roundtable.common.model.layout import Chunk, Layout, Piece, make_layout
from roundtable.common.model.tensor_bytes import dtype_name
from roundtable.common.protocol.model_spec import ShardedLayerSpec, TableSpec, TensorSpec, is_trainable
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names
from roundtable.worker.replica.buffers import Buffer, Rules, as_bytes, find, parts_of

_dtype = operator.attrgetter("dtype")
_Named = list[tuple[str, torch.Tensor]]


class ModelTensors:
    """A model's parameters and buffers by number: first the trained parameters, then frozen ones, then parts of buffers."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[int, int],
        servers: int,
        tables: Sequence[TableSpec],
        sharded_layers: Sequence[ShardedLayerSpec],
        rules: Rules,
        elsewhere: Collection[int],
        whole: Collection[int] = (),
    ) -> None:
        """Find the model's tensors. `Replica` documents the arguments.

        Raises UsageError for a tensor that cannot travel, and for a rule that fits no buffer.
        """
        _check_model(model, groups)
        trained, frozen = _parameters_of(model, groups, elsewhere)
        #: `constants`: the buffers that do not travel.
        buffers, self.constants = find(model, rules)
        parts = [(name, part, buffer.rule) for buffer in buffers for name, part in buffer.parts()]
        named = [*trained, *frozen, *((name, part) for name, part, _ in parts)]
        _check_memory(named)
        self.tensors: list[torch.Tensor] = [tensor for _, tensor in named]
        first = len(trained) + len(frozen)
        #: By number of a buffer's part: the buffer, and the index of the part.
        self.buffer_of: dict[int, tuple[Buffer, int]] = dict(
            enumerate(((b, n) for b in buffers for n in range(len(b.parts()))), first)
        )
        self.specs = [
            *(_spec(name, p, groups[id(p)], whole=id(p) in whole) for name, p in trained),
            *(_spec(name, p, groups.get(id(p), -1), frozen=True, whole=id(p) in whole) for name, p in frozen),
            *(TensorSpec(name, list(t.shape), dtype_name(t.dtype), -1, rule) for name, t, rule in parts),
        ]
        self.layout: Layout = make_layout(self.specs, servers, tables, sharded_layers)
        #: By tensor: the chunks in which it lies.
        self.chunks_of: dict[int, list[Chunk]] = {}
        for chunk in self.layout.chunks:
            for piece in chunk.pieces:
                self.chunks_of.setdefault(piece.tensor, []).append(chunk)
        #: By chunk that has whole parameters only: those parameters.
        self.packed = {
            chunk.id: [self.tensors[piece.tensor] for piece in chunk.pieces]
            for chunk in self.layout.chunks
            if chunk.kind == "param" and all(self._is_whole(piece) for piece in chunk.pieces)
        }
        #: Parameters that may be trained.
        self.trainable = [tensor for tensor, spec in zip(self.tensors, self.specs, strict=True) if spec.group >= 0]
        #: By number: parameters.
        self.parameters = dict(enumerate(self.tensors[:first]))
        self._dtypes = list(map(_dtype, self.parameters.values()))

    def _is_whole(self, piece: Piece) -> bool:
        return piece.length == self.tensors[piece.tensor].numel() and not self.specs[piece.tensor].is_bytes

    def check_dtypes(self) -> None:
        """Raise UsageError if a parameter no longer has the dtype that servers keep."""
        now = list(map(_dtype, self.parameters.values()))
        if now != self._dtypes:
            index = next(index for index, dtype in enumerate(self._dtypes) if now[index] != dtype)
            raise UsageError(
                f"the script has made '{self.specs[index].name}' {now[index]}, but servers have it as {self._dtypes[index]}: "
                "convert the model before run.replicate() and run.optimizer()."
            )

    def elements(self, index: int) -> torch.Tensor:
        """Return the present elements of tensor number `index`, flat, in the form that chunks have."""
        if index not in self.buffer_of:
            tensor = self.tensors[index].detach()
            return as_bytes(tensor) if self.specs[index].is_bytes else tensor.reshape(-1)
        buffer, part = self.buffer_of[index]
        now = list(parts_of(buffer.now()))[part][1]
        return as_bytes(now) if buffer.rule == "last" else now.reshape(-1)

    def flat(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of the tensors of a chunk."""
        values = torch.empty(chunk.numel, dtype=dtype)
        for piece in chunk.pieces:
            source = self.elements(piece.tensor)[piece.start : piece.start + piece.length]
            values[piece.offset : piece.offset + piece.length].copy_(source)
        return values

    def write(self, piece: Piece, values: torch.Tensor) -> None:
        """Write a piece of a chunk's `values` into the model."""
        tensor = self.tensors[piece.tensor].data  # an autograd graph that has saved the tensor must see the new values
        part = values[piece.offset : piece.offset + piece.length]
        if self.specs[piece.tensor].is_bytes:
            if not tensor.is_contiguous():
                whole = as_bytes(tensor).clone()
                whole[piece.start : piece.start + piece.length].copy_(part)
                tensor.copy_(whole.view(tensor.dtype).view(tensor.shape))
                return
            as_bytes(tensor)[piece.start : piece.start + piece.length].copy_(part)
        elif piece.length == tensor.numel():
            tensor.copy_(part.view(tensor.shape))
        elif tensor.is_contiguous():
            tensor.view(-1)[piece.start : piece.start + piece.length].copy_(part)
        else:
            whole = tensor.contiguous()
            whole.view(-1)[piece.start : piece.start + piece.length].copy_(part)
            tensor.copy_(whole)


def _check_model(model: nn.Module, groups: Mapping[int, int]) -> None:
    """Raise UsageError if a tensor has no shape yet, or if `groups` has parameters of another model."""
    for name, tensor in [*tensor_names.parameters(model), *tensor_names.buffers(model)]:
        if is_lazy(tensor):
            raise UsageError(f"'{name}' has no shape yet: pass one batch through the model before run.optimizer().")
    strangers = len(groups.keys() - {id(p) for p in model.parameters()})
    if strangers:
        raise UsageError(f"{strangers} of the optimizer's parameters are not in the model that was replicated.")


def _parameters_of(model: nn.Module, groups: Mapping[int, int], elsewhere: Collection[int]) -> tuple[_Named, _Named]:
    """Return the trained parameters that are here, and the frozen ones."""
    here = [
        (name, p) for name, p in tensor_names.parameters(model) if id(p) not in elsewhere and (p.requires_grad or not p.is_meta)
    ]
    trained: _Named = [(name, p) for name, p in here if id(p) in groups and p.requires_grad]
    frozen: _Named = [(name, p) for name, p in here if not (id(p) in groups and p.requires_grad)]
    return trained, frozen


def _check_memory(named: _Named) -> None:
    """Raise UsageError for a tensor that is not dense, or that shares memory with another one."""
    places: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named:
        if tensor.layout != torch.strided:
            raise UsageError(f"the parameter '{name}' is {tensor.layout}, which cannot travel: make it dense, or a buffer.")
        if tensor.numel() and (other := places.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            raise UsageError(f"'{name}' and '{other}' are two tensors in the same memory: assign one to both names, or copy.")


def _spec(name: str, tensor: torch.Tensor, group: int, frozen: bool = False, whole: bool = False) -> TensorSpec:
    dtype = dtype_name(tensor.dtype)
    group = group if is_trainable(dtype) or not frozen else -1
    return TensorSpec(name, list(tensor.shape), dtype, group, frozen=frozen, whole=whole and group >= 0)
