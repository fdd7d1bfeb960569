"""What the model's file is to have: the names of the model's state_dict, and which tensor of the run is under each."""

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

#: The attribute of a tensor in a state_dict that consists of others, one after another along dimension 0: a list of these.
JOINED = "joined_of"


def file_of(model: nn.Module, tensors: Sequence[torch.Tensor | None], specs: Sequence[TensorSpec]) -> list[InFile]:
    """The tensors of the model's file. `tensors` are those that servers keep, in the order in which `InFile` counts them; None is
    a bias that a layer has not. `specs` name the first of them.

    Tied weights are there once for each of their names, and sparse buffers by their parts. Parameters come first, in the order of
    their names. What a model adds to its state_dict by other means than parameters and buffers is left out, and told of, unless
    it is `JOINED` of some.
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
        log.warning("the model's file will not have %s, which no parameter or buffer is", ", ".join(unknown[:5]))
    return sorted(file, key=lambda entry: (not entry.counts, entry.name if entry.counts else ""))
