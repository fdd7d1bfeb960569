"""A model's tensors as chunks: gradients leave it, new weights enter it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from roundtable.common.model.layout import Chunk
from roundtable.common.model.partial_sum import Sum
from roundtable.common.model.tensor_bytes import dtype_of, to_frame
from roundtable.common.protocol.model_spec import ShardedLayerSpec, TableSpec
from roundtable.worker.replica.buffers import Rules
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.tensors.buffer_state import BufferState
from roundtable.worker.replica.tensors.contributions import Contributions
from roundtable.worker.replica.tensors.gradient_capture import GradientCapture
from roundtable.worker.replica.tensors.model_tensors import ModelTensors
from roundtable.worker.replica.tensors.weight_loader import WeightLoader


class Replica:
    """One worker's copy of the model. Buffers belong to it like parameters: both have a version."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[int, int],
        servers: int,
        tables: Sequence[TableSpec] = (),
        sharded_layers: Sequence[ShardedLayerSpec] = (),
        rules: Rules | None = None,
        at_once: bool = False,
        elsewhere: Collection[int] = (),
        whole: Collection[int] = (),
    ) -> None:
        """`groups` maps id(parameter) to the parameter's group. A parameter is frozen if it has no group or requires no gradient.

        `tables` and `sharded_layers` are on the servers alone, and `elsewhere` has the ids of their parameters. `rules` are the
        script's rules for buffers. `at_once`: servers apply each contribution by itself. `whole` has the ids of parameters
        that servers update whole.

        Raises UsageError for a parameter of a dtype that servers cannot keep, and for a rule that fits no buffer.
        """
        self.model = model
        self.is_scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        if self.is_scripted:  # otherwise torch rewrites the code after a few calls, and the bits depend on the number of calls
            torch._C._set_graph_executor_optimize(False)
        self._tensors = ModelTensors(model, groups, servers, tables, sharded_layers, rules or {}, elsewhere, whole)
        #: Parameters and parts of buffers by number. If a script moves a buffer to another device, there is a new tensor.
        self.tensors = self._tensors.tensors
        self.specs = self._tensors.specs
        #: Buffers that do not travel.
        self.constants = self._tensors.constants
        self.layout = self._tensors.layout
        #: Parameters by number.
        self.parameters = self._tensors.parameters
        #: Parameters that may be trained.
        self.trainable = self._tensors.trainable
        #: Frozen chunks that have had no gradient so far.
        self._frozen = {chunk.id: chunk for chunk in self.layout.chunks if chunk.frozen}
        self._buffers = BufferState(self._tensors)
        #: The hooks that leave gradients in the gradient buffer.
        self.capture = GradientCapture(self._tensors)
        self._contributions = Contributions(self._tensors, self._buffers, self.capture, at_once)
        self._loader = WeightLoader(self._tensors, self._buffers)
        #: The memory of servers on this host, in which parameters then lie.
        self.mapped = self._loader.mapped

    def chunks_of(self, index: int) -> list[Chunk]:
        """Return the chunks that tensor number `index` lies in."""
        return self._tensors.chunks_of[index]

    @property
    def frozen(self) -> dict[int, torch.Tensor]:
        """Parameters, by number, in chunks that have had no gradient so far."""
        return {piece.tensor: self.tensors[piece.tensor] for chunk in self._frozen.values() for piece in chunk.pieces}

    def thawed(self) -> list[Chunk]:
        """Return the frozen chunks that have a gradient for the first time, and count them as frozen no longer."""
        chunks = [c for c in self._frozen.values() if any(self.tensors[piece.tensor].grad is not None for piece in c.pieces)]
        for chunk in chunks:
            del self._frozen[chunk.id]
        return chunks

    def check_dtypes(self) -> None:
        """Raise UsageError if a parameter no longer has the dtype that servers keep."""
        self._tensors.check_dtypes()

    def check_constants(self) -> None:
        """Raise UsageError if a buffer that does not travel has changed."""
        for constant in self.constants:
            constant.check()

    # ---- out of the model

    def catch_gradients(self) -> None:
        """Make backward leave each large gradient in the gradient buffer given to `contribute_to`, from now on."""
        self.capture.install(self.model)

    def contribute_to(self, gradient_buffer: GradientBuffer) -> None:
        """Send the next gradients to `gradient_buffer`."""
        self.capture.contribute_to(gradient_buffer)

    def add_to(self, gradient_buffer: GradientBuffer) -> None:
        """Let `added` add the next gradients to those of another micro-batch, which are in `gradient_buffer`."""
        self.capture.add_to(gradient_buffer)

    def gradient(self, weight: float, without: Collection[int] = ()) -> dict[int, Sum]:
        """Return the contribution of one micro-batch by chunk, except the chunks `without`: gradients and buffers x weight.

        The values lie in the gradient buffer. The model's gradients are removed.
        """
        return self._contributions.gradient(weight, without)

    def added(self, samples: int, sums: Mapping[int, Sum]) -> dict[int, Sum]:
        """Add the contribution of one micro-batch in place to `sums`, those of another with as many samples, and return them.

        The number of samples is a power of two. Each bit is as if the result of `gradient` were added. The model's gradients
        are removed.
        """
        return self._contributions.added(samples, sums)

    def collect(self, chunk: Chunk, gradient_buffer: GradientBuffer) -> int:
        """Put the model's contribution to a chunk into the gradient buffer, and return the mask of its pieces."""
        return self._contributions.collect(chunk, gradient_buffer)

    def discard(self) -> None:
        """Remove the model's gradients without a contribution."""
        self.capture.discard()

    def added_to(self, chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
        """Return how much the buffers of a chunk, whose values are now `values`, have grown since the round began."""
        return values - self._buffers.of(chunk).to(values.dtype)

    def began(self) -> dict[int, torch.Tensor]:
        """Return the buffers as they were when the round began, by chunk."""
        return self._buffers.began()

    def present(self, values: Mapping[int, torch.Tensor]) -> dict[int, int]:
        """Return the mask of pieces to take over from `values`, a result of `weights`: parameters and changed buffers."""
        changed = self._buffers.changed
        return {
            chunk.id: sum(
                (chunk.kind == "param" or changed(chunk, p, values[chunk.id][p.offset : p.offset + p.length])) << bit
                for bit, p in enumerate(chunk.pieces)
            )
            for chunk in self.layout.chunks
            if chunk.id in values
        }

    def weights(self, chunks: Iterable[Chunk] | None = None) -> dict[int, torch.Tensor]:
        """Return a copy of the tensors of `chunks`, flat, by chunk, in the dtype that servers keep.

        Without `chunks`, copy all but the frozen chunks that have had no gradient.
        """
        if chunks is None:
            chunks = [chunk for chunk in self.layout.chunks if chunk.id not in self._frozen]
        return {chunk.id: self._tensors.flat(chunk, dtype_of(chunk.sum_dtype)) for chunk in chunks}

    def frozen_weights(self) -> dict[int, torch.Tensor]:
        """Return such a copy of the frozen chunks that have had no gradient but may be trained."""
        return self.weights([chunk for chunk in self._frozen.values() if chunk.group >= 0])

    def first_weights(self, chunk: int) -> memoryview:
        """Return the tensors of a chunk as a frame in their own dtype."""
        wanted = self.layout.chunks[chunk]
        return to_frame(self._tensors.flat(wanted, dtype_of(wanted.dtype)))

    # ---- into the model

    def load(self, weights: Mapping[int, Any], copy: bool = True) -> None:
        """Put new weights and buffers into the model. For each chunk there is a frame, or the place in a server's memory.

        Without `copy`, parameters in servers' memory lie there from then on. Raises WireError for a frame of the wrong size.
        """
        self._loader.load(weights, copy)

    def copy_from_servers(self) -> None:
        """Copy parameters that lie in servers' memory, where servers write newer ones in time, until the next `load`."""
        self._loader.move_all_out()

    @contextlib.contextmanager
    def holding(self, weights: Mapping[int, Any]) -> Iterator[None]:
        """Have other parameters in the model inside the context. Buffers stay as they are."""
        before = {index: tensor.detach().clone() for index, tensor in self.parameters.items()}
        self.load({chunk: found for chunk, found in weights.items() if self.layout.chunks[chunk].kind == "param"})
        try:
            yield
        finally:
            for index, values in before.items():
                self.parameters[index].data.copy_(values)

    def reset_buffers(self) -> None:
        """Reset the buffers to their values at the start of the round."""
        self._buffers.reset()
