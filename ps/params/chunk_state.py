"""The state of one chunk on a server: its master weights, and torch.optim's own optimizers, which update them block by block."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from roundtable.common.model.layout import Chunk, Layout, Piece
from roundtable.common.model.nonfinite import is_finite
from roundtable.common.model.tensor_bytes import dtype_of, stored_as
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.optimizer_classes import class_named, with_tuples
from roundtable.ps.params.whole_tensor import WholeTensor, as_tensor

#: Elements that are summed and updated at a time: few enough to stay in a core's cache through all steps.
#: A fused kernel is one step. Without one there are many steps, which need memory for temporaries and time to call.
_BLOCK, FUSED_BLOCK = 256 << 10, 1 << 20
#: A fused kernel gives the same bits on every processor if the length is a multiple of this, which makes whole vectors.
_WHOLE_VECTORS = 64
#: Prefixes of the optimizer's state in checkpoints: state of each element, and state of a whole tensor.
_EACH, _COMMON, _NUMBER = "optimizer", "optimizer-common", "optimizer-number"


@dataclass
class Block:
    """Elements start .. start+length-1 of a chunk, which are one parameter of an optimizer."""

    start: int
    length: int
    #: A bit mask of the chunk's pieces that the elements belong to.
    pieces: int
    #: True if the optimizer uses a fused kernel.
    fused: bool
    #: The block's master weights.
    parameter: torch.Tensor


class ChunkState:
    """One chunk: its master weights (flat, `sum_dtype`) and the optimizer over its blocks.

    A frozen chunk is `still` until a worker contributes to it. While it is still, its weights are the first ones, in the chunk's
    own dtype, and it has no blocks and no optimizers.
    """

    def __init__(self, chunk: Chunk, update: Update, rounds: bool, joins: bool = True, whole: WholeTensor | None = None) -> None:
        """`rounds`: a weight codec rounds the weights that workers get.

        `joins`: pieces that have always had gradients at the same times may share blocks. `whole` is the tensor that the chunk is
        a part of, if it is updated whole: it has the optimizer.
        """
        self.chunk = chunk
        self.whole = whole
        self.rounds = rounds
        self.dtype, self.sum_dtype = dtype_of(chunk.dtype), dtype_of(chunk.sum_dtype)
        self.still = chunk.frozen
        self.master = torch.zeros(chunk.numel, dtype=self.dtype if self.still else self.sum_dtype)
        self._class = update.class_of(chunk.group) if chunk.group >= 0 and whole is None else None
        self._update = update if self._class is not None else None
        self._settings = with_tuples(update.groups[chunk.group]) if self._update is not None else {}
        is_own_choice = any(self._settings.get(key) is not None for key in ("fused", "foreach"))
        self._fuses = self._class == "SGD" and not is_own_choice
        self._size = FUSED_BLOCK if self._fuses or self._settings.get("fused") else _BLOCK
        #: The optimizers with (True) and without (False) fused kernels, if there are blocks for them.
        self.optimizers: dict[bool, torch.optim.Optimizer] = {}
        self.blocks: list[Block] = []
        self._joins = joins
        if not self.still:
            self._make_whole()
            self._make_blocks()

    def stir(self) -> None:
        """Make masters and optimizers for a chunk that was still, because a worker contributes to it."""
        self.still = False
        self.master = self.master.to(self.sum_dtype, copy=True)
        self._make_whole()
        self._make_blocks()

    def _make_whole(self) -> None:
        """Let the master weights lie in the whole tensor, if there is one."""
        if self.whole is not None:
            start = self.chunk.pieces[0].start
            self.master = self.whole.values[start : start + self.chunk.numel].copy_(self.master)

    def _make_blocks(self) -> None:
        whole = range(len(self.chunk.pieces))
        self.blocks = [b for bits in ([whole] if self._joins else zip(whole)) for b in self._blocks(bits, self.master, 0)]
        self._make_optimizers()

    def _blocks(self, bits: Sequence[int], values: torch.Tensor, first: int) -> Iterator[Block]:
        """Yield blocks of the adjacent pieces `bits`, as far as these lie in `values`, which begin with element `first`."""
        pieces = self.chunk.pieces
        start = max(pieces[bits[0]].offset, first)
        end = min(pieces[bits[-1]].offset + pieces[bits[-1]].length, first + len(values))
        while start < end:
            length = min(self._size, end - start)
            fused = self._fuses and length >= _WHOLE_VECTORS
            length -= length % _WHOLE_VECTORS if fused else 0
            inside = (b for b in bits if pieces[b].offset < start + length and start < pieces[b].offset + pieces[b].length)
            mask = sum(1 << bit for bit in inside)
            yield Block(start, length, mask, fused, values[start - first : start - first + length])
            start += length

    def _make_optimizers(self) -> None:
        """Make the optimizers that the blocks need and that do not exist."""
        if self._update is None:
            return
        optimizer_class = class_named(self._class)
        # pass the settings to the constructor as well: some classes (Adagrad) make their first state there
        known = _only(self._settings, inspect.signature(optimizer_class).parameters)
        for fused in {block.fused for block in self.blocks} - self.optimizers.keys():
            group = {"params": [b.parameter for b in self.blocks if b.fused == fused], **self._settings}
            self.optimizers[fused] = optimizer_class([group | {"fused": True} if fused else group], **known)

    def separate(self, kinds: Sequence[object]) -> None:
        """Split blocks so that adjacent pieces share one only if their `kinds` are equal. `kinds` has one item for each piece."""
        blocks: list[Block] = []
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

    def state_of(self, block: Block) -> dict[str, Any]:
        """Return the optimizer's state for a block."""
        state: dict[str, Any] = self.optimizers[block.fused].state.get(block.parameter, {}) if self.optimizers else {}
        return state

    def divides(self, block: Block) -> bool:
        """Return True if the optimizer's kernel can divide gradients as it reads them."""
        return bool(self.optimizers) and bool(self.optimizers[block.fused].param_groups[0].get("fused"))

    def step(self, block: Block, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Update a block with a gradient. If `scale` is given, the fused kernel divides the gradient by it."""
        optimizer = self.optimizers[block.fused]
        optimizer.param_groups[0]["params"] = [block.parameter]
        block.parameter.grad, optimizer.grad_scale = gradient, scale  # type: ignore[attr-defined]
        optimizer.step()
        block.parameter.grad = None

    def move(self, block: Block, into: torch.Tensor) -> None:
        """Move the block's master weights to `into`, where they stay."""
        target = into[block.start : block.start + block.length]
        target.copy_(block.parameter)
        block.parameter.data = target

    @property
    def moves(self) -> bool:
        """Return True if workers get the master weights themselves, not a copy of another dtype or precision."""
        return self.dtype == self.sum_dtype and not self.rounds and self.whole is None

    def keys(self, layout: Layout) -> list[tuple[str, Sequence[int], Piece]]:
        """Return the name in checkpoints and the shape of each piece.

        A whole tensor has its name and shape in the model. A part of a tensor has its start in its name. None of this depends on
        the number of servers.
        """
        out: list[tuple[str, Sequence[int], Piece]] = []
        for piece in self.chunk.pieces:
            spec = layout.tensors[piece.tensor]
            whole = piece.length == spec.units
            shape = stored_as(spec)[1] if spec.is_bytes else spec.shape
            out.append((spec.name if whole else f"{spec.name}#{piece.start}", shape if whole else [piece.length], piece))
        return out

    def state(self, layout: Layout, copies: bool = True) -> Iterator[Entry]:
        """Yield the master weights and the optimizer's state for a checkpoint, as copies if `copies` is True, else as views."""
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
                elif isinstance(first, torch.Tensor):  # all blocks have the same value, such as the number of steps
                    yield Entry(f"{_COMMON}/{name}/{key}", first.shape, [first.clone()])
                elif first is not None:
                    yield Entry(f"{_NUMBER}/{name}/{key}", [], [as_tensor(first)])

    def _within(self, bit: int) -> Iterator[tuple[Block, slice, slice]]:
        """Yield each block of piece number `bit`, with the piece's slice of the block and the block's slice of the piece."""
        piece = self.chunk.pieces[bit]
        for block in self.blocks:
            if block.pieces >> bit & 1:
                start, end = max(piece.offset, block.start), min(piece.offset + piece.length, block.start + block.length)
                yield block, slice(start - block.start, end - block.start), slice(start - piece.offset, end - piece.offset)

    def restore(self, layout: Layout, files: TensorFiles) -> None:
        """Load the tensors that `state` gave."""
        if self.still and any(self._was_stirred(files, key) for key, *_ in self.keys(layout)):
            self.stir()
        each: list[dict[str, torch.Tensor]] = []
        common: list[dict[str, torch.Tensor]] = []
        numbers: list[dict[str, Any]] = []
        for key, _, piece in self.keys(layout):
            found = files[f"weights/{key}"].reshape(-1)
            found = found.view(torch.uint8) if layout.tensors[piece.tensor].is_bytes else found
            self.master[piece.offset : piece.offset + piece.length].copy_(found)
            named = self.optimizers or {}
            each.append({name: files[f"{_EACH}/{name}/{key}"].reshape(-1) for name in (files.below(_EACH, key) if named else ())})
            common.append({name: files[f"{_COMMON}/{name}/{key}"] for name in (files.below(_COMMON, key) if named else ())})
            numbers.append(
                {name: files[f"{_NUMBER}/{name}/{key}"].item() for name in (files.below(_NUMBER, key) if named else ())}
            )
        self.separate(
            [
                (*sorted(e), *((n, c[n].tolist()) for n in sorted(c)), *sorted(m.items()))
                for e, c, m in zip(each, common, numbers, strict=True)
            ]
        )
        own: dict[int, dict[str, list[torch.Tensor]]] = {}
        for bit, values in enumerate(each):
            for block, _, of_piece in self._within(bit):
                for name, value in values.items():
                    own.setdefault(block.start, {}).setdefault(name, []).append(value[of_piece])
        for block in self.blocks:
            first = (block.pieces & -block.pieces).bit_length() - 1
            state: dict[str, Any] = {name: torch.cat(values) for name, values in own.get(block.start, {}).items()}
            state |= {name: value.clone() for name, value in common[first].items()} | numbers[first]
            if state:
                self.optimizers[block.fused].state[block.parameter] = state

    def not_finite(self, block: Block, gradient: torch.Tensor) -> int:
        """Return the number of the first tensor in the block whose gradient is not finite."""
        bits = [bit for bit in range(len(self.chunk.pieces)) if block.pieces >> bit & 1]
        places = {bit: own for bit in bits for other, own, _ in self._within(bit) if other is block}
        return next(self.chunk.pieces[bit].tensor for bit in bits if not is_finite(gradient[places[bit]]))

    def _was_stirred(self, files: TensorFiles, key: str) -> bool:
        """Return True if a checkpoint has more than first weights for a piece: a worker has contributed to it."""
        if self.chunk.group < 0:
            return False
        with_state = files.below(_NUMBER, key) or files.below(_EACH, key) or files.below(_COMMON, key) or f"seen/{key}" in files
        with_state = with_state or (self.whole is not None and self.whole.was_trained(files))
        return bool(with_state) or files[f"weights/{key}"].dtype != self.dtype

    def place(self, into: torch.Tensor) -> None:
        """Write the weights to `into`. If workers get the master weights themselves, move them there."""
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


def _is_each(value: Any, block: Block) -> bool:
    """Return True if a value of the optimizer's state has the block's shape."""
    return isinstance(value, torch.Tensor) and value.shape == block.parameter.shape


def may_share_blocks(chunk: Chunk, update: Update) -> bool:
    """Return True if pieces of a chunk may share blocks."""
    optimizer = update.class_of(chunk.group) if chunk.group >= 0 else None
    if optimizer is None or len(chunk.pieces) == 1:
        return chunk.kind != "last"
    return _may_join(optimizer, msgspec.msgpack.encode(update.groups[chunk.group]), chunk.sum_dtype)


@functools.cache
def _may_join(optimizer: str, settings: bytes, dtype: str) -> bool:
    """Return True if updating pieces together gives the same bits as apart. The kernels decide, so try it out."""
    lengths = (1, 64, 3, 10, 32, 65, 17, 128, 7, 100, 31, 256, 5, 15) * 4
    starts = itertools.accumulate(lengths, initial=0)
    pieces = [Piece(number, 0, length, start) for number, (length, start) in enumerate(zip(lengths, starts, strict=False))]
    chunk = Chunk(0, 0, "param", 0, dtype, pieces)
    update = Update(optimizer, [msgspec.msgpack.decode(settings)])
    one, apart = (ChunkState(chunk, update, rounds=False, joins=joins) for joins in (True, False))
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


def _only(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in names}
