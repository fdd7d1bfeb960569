"""The hybrid of data and model parallelism: convolutions on the workers, fully connected layers on the servers.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014). If a layer has few weights and many
activities, batches are divided. In the opposite case, the layer is divided. Take a layer of D features and R outputs on M
servers. The hybrid sends 8 x (M x D + R) bytes for each sample, instead of 8 x R x D for each worker and round.

This is scheme (b) of that paper. The features of one worker's micro-batch go to all servers, which compute it at once while
others are on their way. Only the layers' own weight gradients are made from the whole batch, at the end of the round, as in
scheme (a). So the result does not depend on the order of messages.
"""

from __future__ import annotations

from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.layers.sharded_linear import ColumnParallelLinear, ShardedLinear


def shard_fully_connected(model: nn.Module, classes: int) -> ShardedLinear:
    """Move all fully connected layers of `model` to the servers with their present values, and return the last one.

    The last one must be an nn.Linear to `classes`. The model then returns that layer's input. Raises UsageError if the model
    ends in another layer.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != classes or not linears[-1][0]:
        raise UsageError(f"the model does not end in an nn.Linear to {classes} classes, which parallel = hybrid needs.")
    for name, linear in linears[:-1]:
        model.set_submodule(name, ColumnParallelLinear.of(linear))
    name, linear = linears[-1]
    layer = ShardedLinear.of(linear)
    model.set_submodule(name, layer)
    return layer
