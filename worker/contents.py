"""What the model's file is to have: the names of the model's state_dict, and which tensor of the run is under each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from common.messages import InFile
from common.tensorfile import name_of

log = logging.getLogger("worker.contents")


def file_of(model: nn.Module, tensors: Sequence[torch.Tensor | None]) -> list[InFile]:
    """The tensors of the model's file. `tensors` are those that servers keep, in the order in which `InFile` counts them; None is
    a bias that a layer has not.

    Tied weights are there once for each of their names. Parameters come first, in the order of their names. What a model adds to
    its state_dict by other means than parameters and buffers is left out, and told of.
    """
    number_of = {id(tensor): number for number, tensor in enumerate(tensors)}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    trained = dict(sorted(model.named_parameters()))
    names = [*(name for name in trained if name in state), *(name for name in state if name not in trained)]
    unknown = [name for name in names if state[name].numel() and id(state[name]) not in number_of]
    if unknown:
        log.warning("the model's file will not have %s, which no parameter or buffer is", ", ".join(unknown[:5]))
    return [
        InFile(name, name_of(state[name].dtype), list(state[name].shape), number_of.get(id(state[name]), -1), name in trained)
        for name in names
        if name not in unknown
    ]
