"""A model's buffers: which ones travel, and how the buffers of a round's micro-batches are merged.

Every micro-batch starts from the buffers as they were at the start of the round. A rule says how to merge the results. Running
statistics of normalisation layers are averaged, weighted by samples. Any other buffer gets its value from the last micro-batch,
in order, that changed it. A mean of queues, of unit vectors or of codebooks would have no meaning. With the rule `sum`, a counter
gets the total of all micro-batches.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from roundtable.common.protocol.model_spec import Rule
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names

#: The rules that a script can choose for a buffer. With `own`, each worker has its own buffer, which is never sent or reset.
BufferRule = Literal["mean", "max", "sum", "last", "own"]
Rules = Mapping[str, BufferRule]

_STATISTICS = ("running_mean", "running_var")


@dataclass
class Place:
    """A module's buffer by name."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        there = self.module._buffers  # in a scripted module this has no get()
        return there[self.name] if self.name in there else None  # noqa: SIM401

    @property
    def is_in_file(self) -> bool:
        return self.name not in getattr(self.module, "_non_persistent_buffers_set", ())


@dataclass
class Buffer:
    """A buffer that travels. `tensor` is the one that the model gets at the start of each micro-batch."""

    name: str
    rule: Rule
    tensor: torch.Tensor
    places: list[Place]

    def parts(self) -> list[tuple[str, torch.Tensor]]:
        """Return the name and tensor of each strided part. A sparse buffer has more than one."""
        return [(f"{self.name}{suffix}", part) for suffix, part in parts_of(self.tensor)]

    def now(self) -> torch.Tensor:
        """Return the tensor in the buffer's place in the model. Raises UsageError if it cannot travel in place of `tensor`."""
        for place in self.places:
            found = place.tensor
            if found is not self.tensor:
                return self._checked(found)
        return self.tensor

    def _checked(self, found: torch.Tensor | None) -> torch.Tensor:
        if found is None or kind_of(found) != kind_of(self.tensor):
            became = "none" if found is None else described(found)
            raise UsageError(
                f"the buffer '{self.name}' was {described(self.tensor)} and has become {became}. A buffer that travels must keep "
                f"its size and dtype. If it is only a cache, {advice(self.name, 'own')}"
            )
        return found.detach()

    def put_back(self) -> bool:
        """Put `tensor` back into the model. Return True if `tensor` is new, because the script has moved the buffer."""
        moved = False
        for place in self.places:
            found = place.tensor
            if found is not self.tensor:
                if found is not None and found.device != self.tensor.device:
                    self.tensor, moved = self.tensor.to(found.device), True
                setattr(place.module, place.name, self.tensor)
        return moved


@dataclass
class Constant:
    """A buffer that is not in the model's file and does not travel. It never changes, and each worker makes its own."""

    name: str
    place: Place
    tensor: torch.Tensor
    stamp: tuple[int, int]
    contents: list[torch.Tensor]

    def check(self) -> None:
        """Raise UsageError if the buffer has changed."""
        found = self.place.tensor
        if found is not None and _stamp(found) == self.stamp:
            return
        if found is None or kind_of(found) != kind_of(self.tensor) or not all(map(same_bytes, _bytes(found), self.contents)):
            raise UsageError(
                f"the buffer '{self.name}' has changed, but it does not travel, because it is not in the model's file "
                f"(persistent=False). If it is a part of the model's state, {advice(self.name, 'last')} If it is only a cache, "
                f"{advice(self.name, 'own')}"
            )
        self.tensor, self.stamp = found, _stamp(found)


def find(model: nn.Module, rules: Rules) -> tuple[list[Buffer], list[Constant]]:
    """Return the buffers of `model` that travel, and those that never change.

    `rules` maps names, or patterns with *, to rules. The last pattern that fits a buffer decides. Raises UsageError for a rule
    that does not exist, fits no buffer, or cannot merge a buffer that it fits.
    """
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            places.setdefault(id(tensor), []).append(Place(module, name))
    found = dict(tensor_names.buffers(model))
    _check_rules(rules, found)
    buffers, constants = [], []
    for name, tensor in found.items():
        if not tensor.numel():
            continue
        there = places[id(tensor)]
        given = next((rule for pattern, rule in reversed(list(rules.items())) if fnmatch.fnmatchcase(name, pattern)), None)
        if given == "own":
            continue
        if given is None and not any(place.is_in_file for place in there):
            constants.append(Constant(name, there[0], tensor, _stamp(tensor), [part.clone() for part in _bytes(tensor)]))
        else:
            buffers.append(Buffer(name, given or _rule_for(there[0], tensor), tensor, there))
    return buffers, constants


def _check_rules(rules: Rules, buffers: Mapping[str, torch.Tensor]) -> None:
    for pattern, rule in rules.items():
        fits = [name for name in buffers if fnmatch.fnmatchcase(name, pattern)]
        if rule not in get_args(BufferRule):
            raise UsageError(
                f"there is no rule '{rule}' for the buffer '{pattern}': give one of {', '.join(get_args(BufferRule))}."
            )
        if not fits:
            there = ", ".join(f"'{name}'" for name in list(buffers)[:10]) or "none"
            raise UsageError(f"a rule is for the buffer '{pattern}', but the model has no such buffer; it has {there}.")
        for name in fits:
            if rule == "mean" and not buffers[name].is_floating_point():
                raise UsageError(
                    f"the buffer '{name}' is {described(buffers[name])}, which has no mean: give 'last', 'max' or 'sum'."
                )
            if rule in ("mean", "max", "sum") and buffers[name].layout != torch.strided:
                raise UsageError(f"the buffer '{name}' is sparse: give 'last' or 'own'.")


def _rule_for(place: Place, tensor: torch.Tensor) -> Rule:
    """Return the rule of a buffer for which the script gives none."""
    is_norm = isinstance(place.module, _NormBase) or all(hasattr(place.module, name) for name in _STATISTICS)
    if not is_norm or tensor.layout != torch.strided:
        return "last"
    if place.name in _STATISTICS and tensor.is_floating_point():
        return "mean"
    return "max" if place.name == "num_batches_tracked" else "last"


def parts_of(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each strided part of a tensor, with a suffix for its name. The suffix is '' if there is one part."""
    if tensor.layout == torch.strided:
        yield "", tensor
    elif tensor.layout == torch.sparse_coo:
        yield ".indices", tensor._indices()
        yield ".values", tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield ".crow_indices", tensor.crow_indices()
        yield ".col_indices", tensor.col_indices()
        yield ".values", tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield ".ccol_indices", tensor.ccol_indices()
        yield ".row_indices", tensor.row_indices()
        yield ".values", tensor.values()
    else:
        raise UsageError(f"a buffer has the layout {tensor.layout}, which cannot travel.")


def stored_parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `parts_of` a tensor in the form that files store."""
    for suffix, part in parts_of(tensor):
        has_name = part.dtype not in (torch.complex128, torch.complex32)  # safetensors does not know these
        yield suffix, part if has_name else torch.view_as_real(part.detach().resolve_conj())


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a strided tensor, flat (uint8). They share the memory of a contiguous tensor."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two flat tensors of bytes are equal, on any devices."""
    return torch.equal(one.to(other.device), other)


def _bytes(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [as_bytes(part) for _, part in parts_of(tensor)]


def kind_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return the properties that a travelling buffer must keep: layout, dtypes and shapes."""
    return tensor.layout, *((suffix, part.dtype, part.shape) for suffix, part in parts_of(tensor))


def described(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype and shape in words, such as 'float32 [3, 4]'."""
    count = "" if tensor.layout == torch.strided else f" with {tensor._nnz()} entries"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{count}"


def advice(name: str, rule: BufferRule) -> str:
    """Return what a script must call to have a buffer merged by a rule."""
    return f"say run.replicate(model, buffers={{'{name}': '{rule}'}})."


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """Return a value that changes when torch writes to a tensor, or when another tensor takes its place."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version
