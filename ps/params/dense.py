"""The dense parameters of a server: it reads contributions to its chunks, adds them up, and updates the weights."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from roundtable.common.codecs.registry import WEIGHT_SEED, for_pushes, for_weights, sends_changes
from roundtable.common.model.layout import Layout
from roundtable.common.model.nonfinite import is_finite
from roundtable.common.model.partial_sum import Sum, add_up, adder, is_mean, last_of, move, nothing, put_off
from roundtable.common.model.tensor_bytes import from_frame, to_frame
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.chunk_state import FUSED_BLOCK, Block, ChunkState, may_share_blocks
from roundtable.ps.params.clipping import Clipping, Norm
from roundtable.ps.params.optimizer_classes import with_tuples
from roundtable.ps.params.whole_tensor import whole_tensors


class NotFinite(Exception):
    """The mean gradient of the tensor with this name is NaN or infinite somewhere."""


class DenseParameters:
    """The chunks of one server. This class does the arithmetic. The shard decides when."""

    def __init__(self, layout: Layout, server: int, update: Update, policy: Policy) -> None:
        self._layout = layout
        self._gradient_codec = for_pushes(policy.settings, layout)
        self._weight_codec = codec = for_weights(policy.settings, layout)
        self._sends_changes = sends_changes(policy.settings)
        self._wholes = whole_tensors(layout, server, update)
        self._parts = {
            chunk.id: ChunkState(
                chunk, update, codec is not None and codec.covers(chunk.id), may_share_blocks(chunk, update),
                self._wholes.get(chunk.pieces[0].tensor) if chunk.whole else None,
            )
            for chunk in layout.on(server)
        }  # fmt: skip
        self.clipping = Clipping(layout, update)
        self._policy = policy
        self._at_once = policy.applies == "push"
        self._checks = policy.settings.on_nonfinite == "fail" and policy.applies == "round" and not policy.is_local
        #: By dtype: memory for blocks. The first is for gradients, the others are for intermediate sums.
        self._scratch = {dt: [torch.empty(FUSED_BLOCK, dtype=dt)] for dt in {p.sum_dtype for p in self._parts.values()}}

    def receive(self, chunk: int, frame: Any, present: int, scale: float = 1.0) -> Sum:
        """Return the contribution in a frame.

        Raises WireError if the frame has not the chunk's size or `present` names pieces that the chunk lacks.
        """
        part = self._parts[chunk].chunk
        if not part.has_values(present):
            return nothing()
        return self.view(chunk, from_frame(frame, part.sum_dtype, part.numel, f"chunk {chunk}"), present, scale)

    def decode(self, chunk: int, frame: Any, present: int, seed: int) -> Sum:
        """Return the contribution in a frame of the push codec.

        Raises WireError if the frame cannot be decoded or `present` names pieces that the chunk lacks.
        """
        if self._gradient_codec is None:
            raise WireError(f"chunk {chunk} is coded in a run without a codec")
        values = self._gradient_codec.decode(chunk, bytes_of(frame), seed)
        contribution = self.view(chunk, values, present, 1.0)
        contribution.owned = True
        return contribution

    def view(self, chunk: int, values: torch.Tensor, present: int, scale: float, stays: bool = False) -> Sum:
        """Return the contribution in memory that this server can read.

        `stays`: the memory does not change until the round is over. Raises WireError if `present` names pieces that the chunk
        lacks, or if the optimizer was not given the chunk.
        """
        part = self._parts[chunk].chunk
        if not 0 <= present < 1 << len(part.pieces):
            raise WireError(f"chunk {chunk} has {len(part.pieces)} pieces, not those of mask {present:#x}")
        if present and part.frozen and part.group < 0:
            raise WireError(f"a gradient came for chunk {chunk}, which was not given to the optimizer")
        if not part.has_values(present):
            return nothing()
        return Sum(values, present, scale=1.0 if part.kind in ("max", "sum", "last") else scale, stays=stays)

    def is_still(self, chunk: int) -> bool:
        """Return True if the chunk is frozen and no worker has contributed to it, so that it has its first weights."""
        return self._parts[chunk].still

    def adder(self, chunk: int) -> Callable[[Sum, Sum], Sum]:
        """Return the function that adds two sums of `chunk`, left + right."""
        return adder(self._parts[chunk].chunk)

    def load(self, chunk: int, frame: Any) -> None:
        """Set the first weights from `frame`, which has the chunk's own dtype."""
        part = self._parts[chunk]
        part.master.copy_(from_frame(frame, part.chunk.dtype, part.chunk.numel, f"chunk {chunk}"))

    def place(self, chunk: int, into: torch.Tensor, before: torch.Tensor | None = None) -> memoryview | None:
        """Write the weights to `into`. Return the weight codec's frame to send instead of them, or None.

        With a weight codec, the weights in `into` are those that the frame decodes to. The masters stay as they are. The frame
        has the weights, or their change since `before`, the weights that workers had. `before` and `into` must not overlap.
        """
        part = self._parts[chunk]
        if part.still or not part.rounds:
            part.place(into)
            return None
        return self._round(part, into, before)

    def _round(self, part: ChunkState, into: torch.Tensor, before: torch.Tensor | None) -> memoryview | None:
        """Do the work of `place` with a codec.

        If the codec sends changes, there is no frame if `before` is None or a change is not finite.
        """
        codec, coded = self._weight_codec, None
        assert codec is not None
        if not self._sends_changes:
            before = None
            coded = codec.encode(part.chunk.id, part.master, WEIGHT_SEED, None)
        elif before is not None and (change := part.master - before).isfinite().all():
            coded = codec.encode(part.chunk.id, change, WEIGHT_SEED, None)
        if coded is None:
            into.copy_(part.master)
            return None
        frame = to_frame(coded.frame)
        decoded = codec.decode(part.chunk.id, frame, WEIGHT_SEED)
        if before is None:
            into.copy_(decoded)
        else:
            torch.add(before, decoded, out=into)  # as workers do
        return frame

    def publish(self, chunk: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the current weights, flat and in the chunk's own dtype, in `into` or in new memory.

        Later updates do not change them. A codec that sends weights, not changes, has rounded them. `frame` returns the frame to
        send for them.
        """
        part = self._parts[chunk]
        into = torch.empty(part.chunk.numel, dtype=part.dtype) if into is None else into
        if part.rounds and not part.still and not self._sends_changes:
            self._round(part, into, None)
            return into
        return into.copy_(part.master)

    def frame(self, chunk: int, weights: torch.Tensor) -> memoryview | None:
        """Return the codec's frame to send instead of `weights`, which `publish` gave, or None if there is none."""
        if not self._parts[chunk].rounds or self._parts[chunk].still or self._weight_codec is None:
            return None
        coded = self._weight_codec.encode(chunk, weights, WEIGHT_SEED, None)
        return to_frame(coded.frame) if coded is not None else None

    def state(self, seen: Mapping[int, torch.Tensor], copies: bool = True) -> Iterator[Entry]:
        """Yield all tensors for a checkpoint, as copies if `copies` is True, else as views, which must not change any more.

        `seen` has by chunk the weights that workers compute from. They differ from the masters if a codec sends changes.
        """
        for number, part in self._parts.items():
            yield from part.state(self._layout, copies)
            if part.rounds and self._sends_changes and not part.still:
                for key, shape, piece in part.keys(self._layout):
                    yield Entry(f"seen/{key}", shape, [seen[number][piece.offset : piece.offset + piece.length].clone()])
        for whole in self._wholes.values():
            yield from whole.state()

    def restore(self, files: TensorFiles) -> None:
        """Load the tensors that `state` gave, on any number of servers. Raises KeyError if a tensor is missing."""
        for part in self._parts.values():
            part.restore(self._layout, files)
        for whole in self._wholes.values():
            whole.restore(files)

    def restore_seen(self, chunk: int, files: TensorFiles, into: torch.Tensor) -> None:
        """Write to `into` the weights that workers computed from, if the checkpoint has them apart from the masters."""
        part = self._parts[chunk]
        if part.rounds and self._sends_changes and not part.still:
            for key, _, piece in part.keys(self._layout):
                into[piece.offset : piece.offset + piece.length].copy_(files[f"seen/{key}"].reshape(-1))

    def master(self, chunk: int) -> torch.Tensor:
        """Return a copy of the master weights, which no codec has rounded, in the chunk's own dtype."""
        part = self._parts[chunk]
        return part.master.to(part.dtype, copy=True)

    @property
    def traffic(self) -> Traffic:
        """Return the seconds that codecs took on this server."""
        codecs = [codec for codec in (self._gradient_codec, self._weight_codec) if codec is not None]
        return Traffic(
            encode_seconds=sum(codec.encode_seconds for codec in codecs),
            decode_seconds=sum(codec.decode_seconds for codec in codecs),
        )

    def mean(self, chunk: int, total: Sequence[Sum], weight: float) -> Sum:
        """Return the mean contribution of weight `weight`, in new memory. `total` is its sum, or the two halves of it."""
        part, present = self._parts[chunk], _present(total)
        if not part.chunk.has_values(present):
            return nothing()
        if part.still:
            part.stir()
        out = torch.empty(part.chunk.numel, dtype=part.sum_dtype)
        for block in part.blocks:
            place = out[block.start : block.start + block.length]
            _divided(part, self._sum(part, block, total, place), weight, place)
        return Sum(out, present, owned=True)

    def _sum(self, of: ChunkState, block: Block, total: Sequence[Sum], out: torch.Tensor) -> Sum:
        """Return the sum of a block. It lies in `out` if there was anything to add.

        The order of additions depends neither on the block nor on where the values lie.
        """
        if of.chunk.kind == "last":
            total = [last_of(total, block.pieces.bit_length() - 1)]  # such a block has one piece
        whole = total[0] if len(total) == 1 else put_off(*total)
        scratch = self._scratch[of.sum_dtype]

        def place(depth: int) -> torch.Tensor:
            while len(scratch) <= depth:  # the deepest sum is placed first
                scratch.append(torch.empty_like(scratch[0]))
            return scratch[depth][: block.length] if depth else out

        return add_up(of.chunk.kind, whole.section(block.start, block.length), place)

    def norms(self, chunk: int, mean: Sum) -> list[Norm]:
        """Return the 2-norm of the gradient of each piece that has one."""
        part = self._parts[chunk].chunk
        if part.kind != "param":
            return []
        return [
            (piece.tensor, piece.start, float(torch.linalg.vector_norm(mean.values[piece.offset : piece.offset + piece.length])))
            for bit, piece in enumerate(part.pieces)
            if mean.present >> bit & 1
        ]

    def apply(
        self,
        chunk: int,
        total: Sequence[Sum],
        weight: float,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None = None,
        lr_scale: float = 1.0,
        then: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> memoryview | None:
        """Update a chunk with the mean contribution over `samples` samples. Return the frame to send, as `place` does.

        `total` is the sum of the contributions, or the two halves of it. `hypers` overrides settings of the parameter group.
        `factor` is the clipping factor. `lr_scale` multiplies the learning rate. `then` has the weights (of `publish`) from which
        the contribution was computed, for policies that correct for later updates.

        A chunk without an optimizer takes the mean as its new values. Three kinds `move` by the contribution instead: sums,
        parameters that were frozen at first, and, if each push is applied at once, all buffers.

        The new weights are written to `into`, flat and of the chunk's own dtype. The old weights, in `before`, stay as they are.
        Without `into` the new weights replace the old ones. A still chunk without a contribution stays where it is.

        A tensor that is updated whole is updated when this was called for all of its chunks. Then the weights of all are written.

        Raises NotFinite if the mean is not finite and the run must fail then. The chunk is half updated and must not be used.
        """
        part = self._parts[chunk]
        present = _present(total)
        if part.whole is not None:
            gradient = self.mean(chunk, total, weight).values if present else None
            if gradient is not None and self._checks and not is_finite(gradient):
                raise NotFinite(part.whole.name)
            if gradient is not None and then is not None:
                gradient = self._policy.compensate(gradient, part.master, then.to(part.sum_dtype))
            due = part.whole.take(part.chunk, gradient, (into, before), hypers, factor, lr_scale)
            frames = [self.place(i, to, since) for i, (to, since) in due.items() if to is not None and not self._parts[i].still]
            return frames[-1] if frames else None
        if part.still:
            if not present:
                return None
            part.stir()
        if any(0 < present & block.pieces < block.pieces for block in part.blocks):
            part.separate([present >> bit & 1 for bit in range(len(part.chunk.pieces))])
        groups = [optimizer.param_groups[0] for optimizer in part.optimizers.values()]
        for group in groups:
            group.update(with_tuples(hypers))
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * lr_scale
        for block in part.blocks:
            if into is not None and part.moves:
                part.move(block, into)  # just before its update, so that it is in the cache
            if not present & block.pieces:
                continue
            overwrites = not (part.optimizers or self._at_once or part.chunk.kind == "sum" or part.chunk.frozen)
            out = block.parameter if overwrites else self._scratch[part.sum_dtype][0][: block.length]
            found = self._sum(part, block, total, out)
            may_divide = part.divides(block) and found.values is out and factor is None and then is None
            scale = _for_kernel(weight / found.scale) if may_divide else None
            gradient = out if scale is not None else _divided(part, found, weight, out)
            if self._checks and not is_finite(gradient):  # here, while it is in the cache
                raise NotFinite(self._layout.tensors[part.not_finite(block, gradient)].name)
            if part.optimizers:
                if factor is not None:
                    gradient.mul_(factor)
                if then is not None:
                    old = then[block.start : block.start + block.length].to(part.sum_dtype)
                    gradient = self._policy.compensate(gradient, block.parameter, old)
                part.step(block, gradient, scale)
            elif not overwrites:
                move(part.chunk, block.parameter, gradient)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        return self.place(chunk, into, before) if into is not None else None


def _divided(of: ChunkState, total: Sum, weight: float, out: torch.Tensor) -> torch.Tensor:
    """Write the mean of weight `weight` to `out` and return it. `total` is the sum."""
    if not is_mean(of.chunk.kind):
        return out if total.values is out else out.copy_(total.values)
    return torch.div(total.values, weight / total.scale, out=out)


def _for_kernel(divisor: float) -> torch.Tensor | None:
    """Return a divisor as the tensor that a fused kernel takes, or None if float32 cannot represent it."""
    found = torch.tensor(divisor, dtype=torch.float32)
    return found if found.item() == divisor else None


def _present(total: Sequence[Sum]) -> int:
    """Return the bit mask of the pieces for which any of the contributions has values."""
    return functools.reduce(operator.or_, (half.present for half in total))
