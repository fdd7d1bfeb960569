"""The numbers a server holds: master copies of its chunks, and torch.optim's own optimizers stepping on them."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from roundtable.common.codecs.registry import WEIGHT_SEED, for_pushes, for_weights, sends_changes
from roundtable.common.model.layout import Chunk, Layout, Piece
from roundtable.common.model.nonfinite import is_finite
from roundtable.common.model.partial_sum import Sum, add_up, adder, last_of, move, nothing, put_off
from roundtable.common.model.tensor_bytes import dtype_of, from_frame, stored_as, to_frame
from roundtable.common.policies import Policy
from roundtable.common.protocol.messages.session import Traffic
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.transport import bytes_of
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles

Norm = tuple[int, int, float]

#: Elements that are summed and updated at a time: few enough to stay in a core's cache on their way through all steps.
#: A fused kernel is one step; without one there are many, with memory of their own in between, and each takes time to call.
_BLOCK, _FUSED_BLOCK = 256 << 10, 1 << 20
#: A fused kernel gives the same bits where there are only whole vectors, of whatever processor.
_WHOLE_VECTORS = 64
#: What an optimizer's state is called in snapshots: that of each element, and that of all of a tensor.
_EACH, _COMMON = "optimizer", "optimizer-common"


class NotFinite(Exception):
    """The mean gradient of the tensor with this name is NaN or infinite somewhere."""


@dataclass
class _Block:
    """Elements start .. start+length-1 of a chunk, all of pieces in the mask `pieces`, as a parameter of an optimizer, `fused` or
    not."""

    start: int
    length: int
    pieces: int
    fused: bool
    parameter: torch.Tensor


class _Part:
    """One chunk: master values (flat, `sum_dtype`) and the optimizer over its blocks. `rounds`: workers get its weights by way of
    a codec. `joins`: pieces that have always had gradients at the same times share blocks.

    A frozen chunk is `still` until something is contributed to it: then its values are what came, in the chunk's own dtype, and
    there are no blocks and no optimizers.
    """

    def __init__(self, chunk: Chunk, update: Update, rounds: bool, joins: bool = True) -> None:
        self.chunk = chunk
        self.rounds = rounds
        self.dtype, self.sum_dtype = dtype_of(chunk.dtype), dtype_of(chunk.sum_dtype)
        self.still = chunk.frozen
        self.master = torch.zeros(chunk.numel, dtype=self.dtype if self.still else self.sum_dtype)
        self._update = update if chunk.group >= 0 and update.optimizer is not None else None
        self._settings = with_tuples(update.groups[chunk.group]) if self._update is not None else {}
        is_own_choice = any(self._settings.get(key) is not None for key in ("fused", "foreach"))
        self._fuses = self._update is not None and update.optimizer == "SGD" and not is_own_choice
        self._size = _FUSED_BLOCK if self._fuses or self._settings.get("fused") else _BLOCK
        #: The optimizer with and without fused kernels, as far as there are blocks for it.
        self.optimizers: dict[bool, torch.optim.Optimizer] = {}
        self.blocks: list[_Block] = []
        self._joins = joins
        if not self.still:
            self._make_blocks()

    def stir(self) -> None:
        """Something is contributed to a chunk that was still."""
        self.still = False
        self.master = self.master.to(self.sum_dtype, copy=True)
        self._make_blocks()

    def _make_blocks(self) -> None:
        whole = range(len(self.chunk.pieces))
        self.blocks = [b for bits in ([whole] if self._joins else zip(whole)) for b in self._blocks(bits, self.master, 0)]
        self._make_optimizers()

    def _blocks(self, bits: Sequence[int], values: torch.Tensor, first: int) -> Iterator[_Block]:
        """Blocks of the pieces `bits`, side by side, as far as these are in `values`, which begin with element `first`."""
        pieces = self.chunk.pieces
        start = max(pieces[bits[0]].offset, first)
        end = min(pieces[bits[-1]].offset + pieces[bits[-1]].length, first + len(values))
        while start < end:
            length = min(self._size, end - start)
            fused = self._fuses and length >= _WHOLE_VECTORS
            length -= length % _WHOLE_VECTORS if fused else 0
            inside = (b for b in bits if pieces[b].offset < start + length and start < pieces[b].offset + pieces[b].length)
            mask = sum(1 << bit for bit in inside)
            yield _Block(start, length, mask, fused, values[start - first : start - first + length])
            start += length

    def _make_optimizers(self) -> None:
        """Make those that are still to be made."""
        if self._update is None:
            return
        optimizer_class = getattr(torch.optim, self._update.optimizer or "")
        # what the constructor takes is given to it, for some classes (Adagrad) make their first state there
        known = _only(self._settings, inspect.signature(optimizer_class).parameters)
        for fused in {block.fused for block in self.blocks} - self.optimizers.keys():
            group = {"params": [b.parameter for b in self.blocks if b.fused == fused], **self._settings}
            self.optimizers[fused] = optimizer_class([group | {"fused": True} if fused else group], **known)

    def separate(self, kinds: Sequence[object]) -> None:
        """From now on pieces side by side share blocks only where `kinds`, one for each piece, are equal."""
        blocks: list[_Block] = []
        for block in self.blocks:
            bits = [bit for bit in range(len(kinds)) if block.pieces >> bit & 1]
            runs = [list(run) for _, run in itertools.groupby(bits, kinds.__getitem__)]
            if len(runs) == 1:
                blocks.append(block)
                continue
            parts = [part for run in runs for part in self._blocks(run, block.parameter, block.start)]
            blocks += parts
            self.blocks = [*blocks, block]
            self._make_optimizers()
            state = self.optimizers[block.fused].state.pop(block.parameter, {}) if self.optimizers else {}
            for part in parts if state else ():
                own = slice(part.start - block.start, part.start - block.start + part.length)
                self.optimizers[part.fused].state[part.parameter] = {
                    name: value[own].clone() if _is_each(value, block) else copy.deepcopy(value) for name, value in state.items()
                }
        self.blocks = blocks

    def state_of(self, block: _Block) -> dict[str, Any]:
        """What its optimizer has kept for a block."""
        state: dict[str, Any] = self.optimizers[block.fused].state.get(block.parameter, {}) if self.optimizers else {}
        return state

    def divides(self, block: _Block) -> bool:
        """Whether the optimizer can divide gradients as it reads them."""
        return bool(self.optimizers) and bool(self.optimizers[block.fused].param_groups[0].get("fused"))

    def step(self, block: _Block, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Update a block with a gradient, which its kernel is to divide by `scale`."""
        optimizer = self.optimizers[block.fused]
        optimizer.param_groups[0]["params"] = [block.parameter]
        block.parameter.grad, optimizer.grad_scale = gradient, scale  # type: ignore[attr-defined]
        optimizer.step()
        block.parameter.grad = None

    def move(self, block: _Block, into: torch.Tensor) -> None:
        """Have the block's master values in `into` from now on."""
        target = into[block.start : block.start + block.length]
        target.copy_(block.parameter)
        block.parameter.data = target

    @property
    def moves(self) -> bool:
        """Whether what workers get are the master values themselves, and not a copy of another dtype or precision."""
        return self.dtype == self.sum_dtype and not self.rounds

    def keys(self, layout: Layout) -> list[tuple[str, Sequence[int], Piece]]:
        """What its pieces are called in snapshots, and their shapes: a whole tensor as in the model, others by where they start.

        Neither depends on the number of servers, and nor do the places where tensors are cut.
        """
        out: list[tuple[str, Sequence[int], Piece]] = []
        for piece in self.chunk.pieces:
            spec = layout.tensors[piece.tensor]
            whole = piece.length == spec.units
            shape = stored_as(spec)[1] if spec.is_bytes else spec.shape
            out.append((spec.name if whole else f"{spec.name}#{piece.start}", shape if whole else [piece.length], piece))
        return out

    def state(self, layout: Layout, copies: bool = True) -> Iterator[Entry]:
        """The master values and the optimizer's state, for a snapshot: `copies`, or where they are."""
        take = torch.Tensor.clone if copies and not self.still else torch.Tensor.detach
        for bit, (key, shape, piece) in enumerate(self.keys(layout)):
            values, spec = self.master[piece.offset : piece.offset + piece.length], layout.tensors[piece.tensor]
            if spec.is_bytes:
                whole = piece.length == spec.units
                yield Entry(f"weights/{key}", shape, [take(values).view(stored_as(spec)[0] if whole else torch.uint8)])
                continue
            yield Entry(f"weights/{key}", shape, [take(values)])
            if self.still:
                continue
            parts = [(block, own, self.state_of(block)) for block, own, _ in self._within(bit)]
            for name, first in parts[0][2].items():
                if _is_each(first, parts[0][0]):
                    yield Entry(f"{_EACH}/{name}/{key}", shape, [take(state[name][own]) for _, own, state in parts])
                elif first is not None:  # the same for all blocks, such as the number of steps
                    yield Entry(f"{_COMMON}/{name}/{key}", first.shape, [first.clone()])

    def _within(self, bit: int) -> Iterator[tuple[_Block, slice, slice]]:
        """The blocks that piece number `bit` lies in, where it is in each, and what of the piece that is."""
        piece = self.chunk.pieces[bit]
        for block in self.blocks:
            if block.pieces >> bit & 1:
                start, end = max(piece.offset, block.start), min(piece.offset + piece.length, block.start + block.length)
                yield block, slice(start - block.start, end - block.start), slice(start - piece.offset, end - piece.offset)

    def restore(self, layout: Layout, files: TensorFiles) -> None:
        """Go on from what `state` gave."""
        if self.still and any(self._was_stirred(files, key) for key, *_ in self.keys(layout)):
            self.stir()
        each: list[dict[str, torch.Tensor]] = []
        common: list[dict[str, torch.Tensor]] = []
        for key, _, piece in self.keys(layout):
            found = files[f"weights/{key}"].reshape(-1)
            found = found.view(torch.uint8) if layout.tensors[piece.tensor].is_bytes else found
            self.master[piece.offset : piece.offset + piece.length].copy_(found)
            named = self.optimizers or {}
            each.append({name: files[f"{_EACH}/{name}/{key}"].reshape(-1) for name in (files.below(_EACH, key) if named else ())})
            common.append({name: files[f"{_COMMON}/{name}/{key}"] for name in (files.below(_COMMON, key) if named else ())})
        self.separate([(*sorted(e), *((n, c[n].tolist()) for n in sorted(c))) for e, c in zip(each, common, strict=True)])
        own: dict[int, dict[str, list[torch.Tensor]]] = {}
        for bit, values in enumerate(each):
            for block, _, of_piece in self._within(bit):
                for name, value in values.items():
                    own.setdefault(block.start, {}).setdefault(name, []).append(value[of_piece])
        for block in self.blocks:
            first = (block.pieces & -block.pieces).bit_length() - 1
            state = {name: torch.cat(values) for name, values in own.get(block.start, {}).items()}
            state |= {name: value.clone() for name, value in common[first].items()}
            if state:
                self.optimizers[block.fused].state[block.parameter] = state

    def not_finite(self, block: _Block, gradient: torch.Tensor) -> int:
        """The number of the first tensor of which the gradient of a block has a number that is not finite."""
        bits = [bit for bit in range(len(self.chunk.pieces)) if block.pieces >> bit & 1]
        places = {bit: own for bit in bits for other, own, _ in self._within(bit) if other is block}
        return next(self.chunk.pieces[bit].tensor for bit in bits if not is_finite(gradient[places[bit]]))

    def _was_stirred(self, files: TensorFiles, key: str) -> bool:
        """Whether a snapshot has more of a piece than the weights it began with."""
        if self.chunk.group < 0:
            return False
        with_state = files.below(_EACH, key) or files.below(_COMMON, key) or f"seen/{key}" in files
        return bool(with_state) or files[f"weights/{key}"].dtype != self.dtype

    def settle(self, into: torch.Tensor) -> None:
        """Have the weights in `into`: the master values themselves, wherever they are now, or a copy of them."""
        if self.still:
            self.master = into.copy_(self.master)
            return
        if not self.moves:
            into.copy_(self.master)
            return
        for block in self.blocks:
            if block.parameter.data_ptr() != into[block.start :].data_ptr():
                self.move(block, into)
        self.master = into


def _is_each(value: torch.Tensor | None, block: _Block) -> bool:
    """Whether a value that an optimizer keeps for a block has a number for each element of it."""
    return value is not None and value.shape == block.parameter.shape


def _joins(chunk: Chunk, update: Update) -> bool:
    """Whether pieces of a chunk may share blocks."""
    if chunk.group < 0 or update.optimizer is None or len(chunk.pieces) == 1:
        return chunk.kind != "last"
    return _may_join(update.optimizer, msgspec.msgpack.encode(update.groups[chunk.group]), chunk.sum_dtype)


@functools.cache
def _may_join(optimizer: str, settings: bytes, dtype: str) -> bool:
    """Whether pieces can be updated as one with the same bits, which depends on the kernels: it is tried out."""
    lengths = (1, 64, 3, 10, 32, 65, 17, 128, 7, 100, 31, 256, 5, 15) * 4
    starts = itertools.accumulate(lengths, initial=0)
    pieces = [Piece(number, 0, length, start) for number, (length, start) in enumerate(zip(lengths, starts, strict=False))]
    chunk = Chunk(0, 0, "param", 0, dtype, pieces)
    update = Update(optimizer, [msgspec.msgpack.decode(settings)])
    one, apart = (_Part(chunk, update, rounds=False, joins=joins) for joins in (True, False))
    generator = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        size = torch.randint(-5, 3, (chunk.numel,), generator=generator)
        return (torch.randn(chunk.numel, generator=generator) * 10.0**size).to(one.sum_dtype)

    start = drawn()
    gradients = [drawn() for _ in range(4)]
    for part in (one, apart):
        part.master.copy_(start)
        for gradient in gradients:
            for block in part.blocks:
                part.step(block, gradient[block.start : block.start + block.length].clone())
    return torch.equal(one.master.view(torch.uint8), apart.master.view(torch.uint8))


class DenseParameters:
    """The chunks of one server. Knows arithmetic only: when to do what is the shard's business."""

    def __init__(self, layout: Layout, server: int, update: Update, policy: Policy) -> None:
        self._layout = layout
        self._gradient_codec = for_pushes(policy.settings, layout)
        self._weight_codec = codec = for_weights(policy.settings, layout)
        self._sends_changes = sends_changes(policy.settings)
        self._parts = {
            chunk.id: _Part(chunk, update, codec is not None and codec.covers(chunk.id), _joins(chunk, update))
            for chunk in layout.on(server)
        }
        self._clip_norm = update.clip_norm
        double = any(spec.dtype == "float64" for spec in layout.tensors if spec.group >= 0)
        self._norm_dtype = torch.float64 if double else torch.float32
        self._policy = policy
        self._at_once = policy.applies == "push"
        self._checks = policy.settings.on_nonfinite == "fail" and policy.applies == "round" and not policy.is_local
        #: By dtype, memory for blocks: the first is for gradients, the others for what is added up on the way to them.
        self._scratch = {dt: [torch.empty(_FUSED_BLOCK, dtype=dt)] for dt in {p.sum_dtype for p in self._parts.values()}}

    def receive(self, chunk: int, frame: Any, present: int, scale: float = 1.0) -> Sum:
        """A contribution out of a frame. Raises WireError if it has not the chunk's size or names pieces it lacks."""
        part = self._parts[chunk].chunk
        if not part.has_values(present):
            return nothing()
        return self.view(chunk, from_frame(frame, part.sum_dtype, part.numel, f"chunk {chunk}"), present, scale)

    def decode(self, chunk: int, frame: Any, present: int, seed: int) -> Sum:
        """A contribution out of a frame of the push codec. Raises WireError for what is none, or names pieces the chunk lacks."""
        if self._gradient_codec is None:
            raise WireError(f"chunk {chunk} is coded in a run without a codec")
        values = self._gradient_codec.decode(chunk, bytes_of(frame), seed)
        contribution = self.view(chunk, values, present, 1.0)
        contribution.owned = True
        return contribution

    def view(self, chunk: int, values: torch.Tensor, present: int, scale: float, stays: bool = False) -> Sum:
        """A contribution in memory that this server can read, and that `stays` as it is until its round is over. Raises WireError
        if it names pieces the chunk lacks."""
        part = self._parts[chunk].chunk
        if not 0 <= present < 1 << len(part.pieces):
            raise WireError(f"chunk {chunk} has {len(part.pieces)} pieces, not those of mask {present:#x}")
        if present and part.frozen and part.group < 0:
            raise WireError(f"a gradient came for chunk {chunk}, which was not given to the optimizer")
        if not part.has_values(present):
            return nothing()
        return Sum(values, present, scale=1.0 if part.kind in ("max", "sum", "last") else scale, stays=stays)

    def is_still(self, chunk: int) -> bool:
        """Whether it is a frozen chunk whose weights are those that came first, for nothing was contributed to it."""
        return self._parts[chunk].still

    def adder(self, chunk: int) -> Callable[[Sum, Sum], Sum]:
        """The function that adds two sums of `chunk`, left first."""
        return adder(self._parts[chunk].chunk)

    def load(self, chunk: int, frame: Any) -> None:
        """Start from the weights in `frame`, which have the chunk's own dtype."""
        part = self._parts[chunk]
        part.master.copy_(from_frame(frame, part.chunk.dtype, part.chunk.numel, f"chunk {chunk}"))

    def settle(self, chunk: int, into: torch.Tensor, before: torch.Tensor | None = None) -> memoryview | None:
        """Have the weights in `into`, as `apply` does, where workers had them `before` in memory that `into` is not.

        With a weight codec these are what its frame decodes to, and the masters stay what they are. Returned is that frame: of
        the weights, or of their change since `before`; None where they are sent as they are.
        """
        part = self._parts[chunk]
        if part.still or not part.rounds:
            part.settle(into)
            return None
        return self._round(part, into, before)

    def _round(self, part: _Part, into: torch.Tensor, before: torch.Tensor | None) -> memoryview | None:
        """`settle` where there is a codec. Changes have nothing to start from at first, and none of them may be infinite."""
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
        """The weights now, flat and in the chunk's own dtype, in memory that no later update touches: in `into` if given. A codec
        that sends weights, not changes, has rounded them, and `frame` tells how they are sent."""
        part = self._parts[chunk]
        into = torch.empty(part.chunk.numel, dtype=part.dtype) if into is None else into
        if part.rounds and not part.still and not self._sends_changes:
            self._round(part, into, None)
            return into
        return into.copy_(part.master)

    def frame(self, chunk: int, weights: torch.Tensor) -> memoryview | None:
        """What to send instead of weights that `publish` gave; None if they are sent as they are."""
        if not self._parts[chunk].rounds or self._parts[chunk].still or self._weight_codec is None:
            return None
        coded = self._weight_codec.encode(chunk, weights, WEIGHT_SEED, None)
        return to_frame(coded.frame) if coded is not None else None

    def state(self, seen: Mapping[int, torch.Tensor], copies: bool = True) -> Iterator[Entry]:
        """Everything, for a snapshot: `copies`, or what nothing changes any more. `seen` are the weights by chunk that workers
        compute from now: where these get changes from one round to the next, they are not what the masters are."""
        for number, part in self._parts.items():
            yield from part.state(self._layout, copies)
            if part.rounds and self._sends_changes and not part.still:
                for key, shape, piece in part.keys(self._layout):
                    yield Entry(f"seen/{key}", shape, [seen[number][piece.offset : piece.offset + piece.length].clone()])

    def restore(self, files: TensorFiles) -> None:
        """Go on from what `state` gave, on however many servers. Raises KeyError where something is missing."""
        for part in self._parts.values():
            part.restore(self._layout, files)

    def restore_seen(self, chunk: int, files: TensorFiles, into: torch.Tensor) -> None:
        """Have in `into` what workers computed from."""
        part = self._parts[chunk]
        if part.rounds and self._sends_changes and not part.still:
            for key, _, piece in part.keys(self._layout):
                into[piece.offset : piece.offset + piece.length].copy_(files[f"seen/{key}"].reshape(-1))

    def master(self, chunk: int) -> torch.Tensor:
        """A copy of the weights that no weight codec has rounded, in the chunk's own dtype."""
        part = self._parts[chunk]
        return part.master.to(part.dtype, copy=True)

    @property
    def traffic(self) -> Traffic:
        """Seconds that codecs took here."""
        codecs = [codec for codec in (self._gradient_codec, self._weight_codec) if codec is not None]
        return Traffic(
            encode_seconds=sum(codec.encode_seconds for codec in codecs),
            decode_seconds=sum(codec.decode_seconds for codec in codecs),
        )

    def mean(self, chunk: int, total: Sequence[Sum], samples: int) -> Sum:
        """The sample-weighted mean whose sum `total` is, alone or in two halves, in memory of its own."""
        part, present = self._parts[chunk], _present(total)
        if not part.chunk.has_values(present):
            return nothing()
        if part.still:
            part.stir()
        out = torch.empty(part.chunk.numel, dtype=part.sum_dtype)
        for block in part.blocks:
            place = out[block.start : block.start + block.length]
            _divided(part, self._sum(part, block, total, place), samples, place)
        return Sum(out, present, owned=True)

    def _sum(self, of: _Part, block: _Block, total: Sequence[Sum], out: torch.Tensor) -> Sum:
        """The sum of a block, in `out` if anything was added; in this order, whatever the block and wherever the values lie."""
        if of.chunk.kind == "last":
            total = [last_of(total, block.pieces.bit_length() - 1)]  # of one piece
        whole = total[0] if len(total) == 1 else put_off(*total)
        scratch = self._scratch[of.sum_dtype]

        def place(depth: int) -> torch.Tensor:
            while len(scratch) <= depth:  # what is deepest comes first
                scratch.append(torch.empty_like(scratch[0]))
            return scratch[depth][: block.length] if depth else out

        return add_up(of.chunk.kind, whole.section(block.start, block.length), place)

    def norms(self, chunk: int, mean: Sum) -> list[Norm]:
        """2-norm of the gradient of each piece that has one."""
        part = self._parts[chunk].chunk
        if part.kind != "param":
            return []
        return [
            (piece.tensor, piece.start, float(torch.linalg.vector_norm(mean.values[piece.offset : piece.offset + piece.length])))
            for bit, piece in enumerate(part.pieces)
            if mean.present >> bit & 1
        ]

    def clip_factor(self, norms: Sequence[Norm]) -> torch.Tensor | None:
        """What to multiply gradients by, given the norms of all pieces on all servers in order; None for nothing.

        The arithmetic is that of `torch.nn.utils.clip_grad_norm_`, so the bits are too (a tensor cut into chunks: to rounding).
        """
        if self._clip_norm is None or not norms:
            return None
        total = torch.linalg.vector_norm(torch.tensor([norm for _, _, norm in norms], dtype=self._norm_dtype))
        return torch.clamp(self._clip_norm / (total + 1e-6), max=1.0)

    def factor(self, value: float) -> torch.Tensor:
        """The factor of `clip_factor` whose value this is."""
        return torch.tensor(value, dtype=self._norm_dtype)

    def apply(
        self,
        chunk: int,
        total: Sequence[Sum],
        samples: int,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None = None,
        lr_scale: float = 1.0,
        then: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        before: torch.Tensor | None = None,
    ) -> memoryview | None:
        """Make new weights from the mean contribution, whose sum `total` is, alone or in two halves.

        `hypers` overrides settings of the parameter group; `factor` is the clipping; `lr_scale` multiplies the learning rate;
        `then` holds the weights (of `publish`) that the contribution was computed from, for policies that correct for what has
        happened since. What has no optimizer becomes the mean; sums, parameters that were frozen at first, and all buffers where
        each push is applied at once, `move`. The new weights
        are written to `into`, flat and of the chunk's own dtype, and the old ones, which are in `before`, left alone; without it
        they take the old ones' place. A chunk that is still and gets nothing stays where it is. Returns what `settle` does.

        Raises NotFinite where the run is to fail then; the chunk is half updated and of no use any more.
        """
        part = self._parts[chunk]
        present = _present(total)
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
                part.move(block, into)  # just before its update, for then it is in the cache
            if not present & block.pieces:
                continue
            overwrites = not (part.optimizers or self._at_once or part.chunk.kind == "sum" or part.chunk.frozen)
            out = block.parameter if overwrites else self._scratch[part.sum_dtype][0][: block.length]
            found = self._sum(part, block, total, out)
            may_divide = part.divides(block) and found.values is out and factor is None and then is None
            scale = _for_kernel(samples / found.scale) if may_divide else None
            gradient = out if scale is not None else _divided(part, found, samples, out)
            if self._checks and not is_finite(gradient):  # here, for it is in the cache
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
        return self.settle(chunk, into, before) if into is not None else None


def _divided(of: _Part, total: Sum, samples: int, out: torch.Tensor) -> torch.Tensor:
    """Write the mean whose sum `total` is to `out`."""
    if of.chunk.kind in ("max", "sum", "last"):
        return out if total.values is out else out.copy_(total.values)
    return torch.div(total.values, samples / total.scale, out=out)


def _for_kernel(divisor: float) -> torch.Tensor | None:
    """What a fused kernel is to divide by, as it takes it; None where that is another number."""
    found = torch.tensor(divisor, dtype=torch.float32)
    return found if found.item() == divisor else None


def _present(total: Sequence[Sum]) -> int:
    """Pieces that any of these contributions has a gradient for."""
    return functools.reduce(operator.or_, (half.present for half in total))


def _only(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in names}


def with_tuples(hypers: Mapping[str, Any]) -> dict[str, Any]:
    """MessagePack has no tuples; torch.optim expects them (betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in hypers.items()}
