"""The hybrid of data and model parallelism: convolutions on the workers, fully connected layers on the servers.

After Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (2014): where weights are few and activities
many, batches are divided; where it is the other way round, layers are. For a layer of D features and R outputs on M servers
8 x (M x D + R) bytes travel for each sample, instead of 8 x R x D for each worker and round.

Of that paper's schemes this is (b): the features of one worker's micro-batch go to all servers, which compute it at once while
others are on their way. Only the gradients of the layers' own weights are made from the whole batch together, at the round's
end, as in (a): so the result does not depend on who sent what when.
"""

from __future__ import annotations

from torch import nn

from roundtable.common.runtime.errors import UsageError
from roundtable.worker.layers.sharded_linear import ColumnParallelLinear, ShardedLinear


def shard_fully_connected(model: nn.Module, classes: int) -> ShardedLinear:
    """Have all fully connected layers of `model` on the servers, each of which begins with the values that it has. Returned is
    the last one, an nn.Linear to `classes`: what it gets is what the model then returns.

    Raises UsageError where the model ends in something else.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != classes or not linears[-1][0]:
        raise UsageError(f"the model does not end in an nn.Linear to {classes} classes, which is what parallel = hybrid shards.")
    for name, linear in linears[:-1]:
        model.set_submodule(name, ColumnParallelLinear.of(linear))
    name, linear = linears[-1]
    layer = ShardedLinear.of(linear)
    model.set_submodule(name, layer)
    return layer
