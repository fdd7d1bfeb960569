"""What the model's file is to have: the names of the model's state_dict, and which tensor of the run is under each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from common.layout import TensorSpec
from common.messages import InFile
from common.tensorfile import name_of
from worker.buffers import stored_parts

log = logging.getLogger("worker.contents")


def file_of(model: nn.Module, tensors: Sequence[torch.Tensor | None], specs: Sequence[TensorSpec]) -> list[InFile]:
    """The tensors of the model's file. `tensors` are those that servers keep, in the order in which `InFile` counts them; None is
    a bias that a layer has not. `specs` name the first of them.

    Tied weights are there once for each of their names, and sparse buffers by their parts. Parameters come first, in the order of
    their names. What a model adds to its state_dict by other means than parameters and buffers is left out, and told of.
    """
    number_of = {id(tensor): number for number, tensor in enumerate(tensors)}
    by_name = {spec.name: number for number, spec in enumerate(specs)}
    buffers = {id(buffer): name for name, buffer in model.named_buffers()}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    trained = dict(sorted(model.named_parameters()))
    file, unknown = [], []
    for name in [*(name for name in trained if name in state), *(name for name in state if name not in trained)]:
        whole = state[name]
        for suffix, part in stored_parts(whole):
            number = by_name.get(f"{buffers.get(id(whole))}{suffix}", -1) if suffix else number_of.get(id(whole), -1)
            if number < 0 and part.numel():
                unknown.append(f"{name}{suffix}")
                continue
            file.append(InFile(f"{name}{suffix}", name_of(part.dtype), list(part.shape), number, name in trained))
    if unknown:
        log.warning("the model's file will not have %s, which no parameter or buffer is", ", ".join(unknown[:5]))
    return file
