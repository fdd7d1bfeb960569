"""Running statistics of batch normalisation for merged weights.

The mean of several networks is another network. Its layers see other activations, so the mean of the running statistics does not
fit it. Izmailov et al., "Averaging weights leads to wider optima and better generalization" (UAI 2018), compute them again by one
pass over training data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset

from roundtable.common.config.batch_plan import derive_seed
from roundtable.worker.data.arguments import dataset_size
from roundtable.worker.data.loader import seed_everything
from roundtable.worker.data.streams.sources import is_stream, stream_of
from roundtable.worker.data.streams.stream import Stream


def has_statistics(model: nn.Module) -> bool:
    """Return whether the model has running statistics."""
    layers = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(layer.track_running_stats for layer in layers)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's running statistics, by their names in the state_dict of `model`."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return {
        f"{name}.{key}" if name else key: buffer
        for name, layer in layers
        if layer.track_running_stats
        for key, buffer in layer.named_buffers(recurse=False)
    }


def recompute(model: nn.Module, dataset: Dataset[Any], batch: int, seed: int) -> None:
    """Replace the running statistics of `model` by means over one pass through `dataset`, in batches of `batch`.

    Order, augmentation and dropout are drawn from `seed`, so every worker gets the same bits from the same weights. Samples of a
    stream come in its own order. Samples are inputs, or tuples whose first item is the input. A short last batch is left out,
    because each batch counts alike. Weights and training modes stay as they were. A model without such layers is not changed.
    """
    if not has_statistics(model):
        return
    if is_stream(dataset):
        dataset = stream_of(dataset)
    batch = min(batch, dataset_size(dataset))
    seed = derive_seed(seed, "batchnorm")
    order = torch.Generator().manual_seed(seed)
    shuffle = not isinstance(dataset, Stream)
    loader = DataLoader(dataset, batch_size=batch, shuffle=shuffle, generator=order, drop_last=True)
    modes = [(module, module.training) for module in model.modules()]
    seed_everything(seed)
    update_bn(loader, model, device=next(model.parameters()).device)
    for module, training in modes:
        module.training = training
