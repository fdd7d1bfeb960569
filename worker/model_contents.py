"""The contents of the model's file: the names of the model's state_dict, and the run's tensor for each name."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from roundtable.common.protocol.messages.setup import InFile
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.storage.tensor_file import name_of
from roundtable.worker import tensor_names
from roundtable.worker.replica.buffers import stored_parts

log = logging.getLogger("roundtable.worker.contents")

#: An attribute of a tensor in a state_dict. It lists the tensors that make up this one, in order, along dimension 0.
JOINED = "joined_of"


def file_of(model: nn.Module, tensors: Sequence[torch.Tensor | None], specs: Sequence[TensorSpec]) -> list[InFile]:
    """Return the tensors of the model's file.

    `tensors` are those that servers keep, in the order in which `InFile` counts them. None stands for the bias of a layer
    without one. `specs` describe the first of them. Tied weights are there once for each of their names, and sparse buffers by
    their parts. Parameters come first, sorted by name. A model may add other tensors to its state_dict. Unless these are `JOINED`
    of parameters or buffers, they are left out with a warning.
    """
    number_of = {id(tensor): number for number, tensor in enumerate(tensors)}
    by_name = {spec.name: number for number, spec in enumerate(specs)}
    buffers = {id(buffer): name for name, buffer in tensor_names.buffers(model)}
    values = model.state_dict(keep_vars=True).items()
    state = {tensor_names.plain(name): value for name, value in values if isinstance(value, torch.Tensor)}
    trained = dict(sorted(tensor_names.parameters(model)))
    parameters = {id(parameter) for parameter in trained.values()}
    file, unknown = [], []
    for name, whole in state.items():
        pieces = getattr(whole, JOINED, [whole])
        counts = name in trained or (pieces[0] is not whole and all(id(piece) in parameters for piece in pieces))
        for suffix, part in stored_parts(whole):
            if suffix:
                numbers = [by_name.get(f"{buffers.get(id(whole))}{suffix}")]
            else:
                numbers = [number_of.get(id(piece)) for piece in pieces if piece.numel()]
            known = [number for number in numbers if number is not None]
            if len(known) < len(numbers):
                unknown.append(f"{name}{suffix}")
                continue
            file.append(InFile(f"{name}{suffix}", name_of(part.dtype), list(part.shape), known, counts))
    if unknown:
        log.warning("the model's file will not have %s, because it is no parameter or buffer", ", ".join(unknown[:5]))
    return sorted(file, key=lambda entry: (not entry.counts, entry.name if entry.counts else ""))
