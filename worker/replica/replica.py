"""A model's tensors as chunks: gradients out of it, new weights into it."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from roundtable.common.model.layout import Chunk, Layout, Piece, gradient_offsets, make_layout
from roundtable.common.model.partial_sum import Sum, adder, is_change, nothing, weighted
from roundtable.common.model.tensor_bytes import ALIGNED, dtype_name, dtype_of, from_frame, to_frame
from roundtable.common.protocol.model_spec import ClassSpec, TableSpec, TensorSpec, is_trainable
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names
from roundtable.worker.replica import inplace_wgrad
from roundtable.worker.replica.buffers import Rules, as_bytes, find, parts_of, same_bytes
from roundtable.worker.replica.gradient_buffers import GradientBuffer
from roundtable.worker.replica.mapped_weights import InWeightBuffer, MappedWeights, shaped

#: Gradients of fewer bytes are taken over together when all are made, for a call each takes longer than the copy.
_SMALL_BYTES = 64 << 10
_dtype = operator.attrgetter("dtype")


class Replica:
    """One worker's copy of the model. Buffers are as much part of it as parameters: both have a version."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[int, int],
        servers: int,
        tables: Sequence[TableSpec] = (),
        classifiers: Sequence[ClassSpec] = (),
        rules: Rules | None = None,
        at_once: bool = False,
        elsewhere: Collection[int] = (),
    ) -> None:
        """`groups` maps id(parameter) to its parameter group. A parameter is frozen if it is not in it or requires no gradient.
        `tables` and `classifiers` are on the servers alone, and `elsewhere` has the ids of their parameters. `rules` are what the
        script says of buffers. `at_once`: servers apply each contribution by itself.

        Raises UsageError where a parameter has a dtype that servers cannot keep, and for a rule that fits no buffer.
        """
        self.model = model
        self.is_scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        if self.is_scripted:  # else torch rewrites the code after a few calls, and the bits depend on how many there were
            torch._C._set_graph_executor_optimize(False)
        for name, tensor in [*tensor_names.parameters(model), *tensor_names.buffers(model)]:
            if is_lazy(tensor):
                raise UsageError(f"'{name}' has no shape yet: pass one batch through the model before run.optimizer().")
        strangers = len(groups.keys() - {id(p) for p in model.parameters()})
        if strangers:
            raise UsageError(f"{strangers} of the optimizer's parameters are not in the model that was replicated.")
        here = [
            (name, p)
            for name, p in tensor_names.parameters(model)
            if id(p) not in elsewhere and (p.requires_grad or not p.is_meta)
        ]
        trained = [(name, p) for name, p in here if id(p) in groups and p.requires_grad]
        frozen = [(name, p) for name, p in here if not (id(p) in groups and p.requires_grad)]
        #: Buffers that do not travel.
        buffers, self.constants = find(model, rules or {})
        parts = [(name, part, buffer.rule) for buffer in buffers for name, part in buffer.parts()]
        named = [*trained, *frozen, *((name, part) for name, part, _ in parts)]
        self.tensors: list[torch.Tensor] = [tensor for _, tensor in named]
        #: The buffer that a tensor is part number n of, and n.
        first = len(trained) + len(frozen)
        self._buffer_of = dict(enumerate(((b, n) for b in buffers for n in range(len(b.parts()))), first))
        places: dict[tuple[torch.device, int], str] = {}
        for name, tensor in named:
            if tensor.layout != torch.strided:
                raise UsageError(f"the parameter '{name}' is {tensor.layout}, which cannot travel: make it dense, or a buffer.")
            if tensor.numel() and (other := places.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
                raise UsageError(f"'{name}' and '{other}' are two tensors in the same memory: assign one to both names, or copy.")
        self.specs = [
            *(_spec(name, p, groups[id(p)]) for name, p in trained),
            *(_spec(name, p, groups.get(id(p), -1), frozen=True) for name, p in frozen),
            *(TensorSpec(name, list(t.shape), dtype_name(t.dtype), -1, rule) for name, t, rule in parts),
        ]
        self.layout: Layout = make_layout(self.specs, servers, tables, classifiers)
        #: The memory of servers on this host, which parameters then lie in.
        self.mapped = MappedWeights(self.layout)
        self._chunks_of: dict[int, list[Chunk]] = {}
        for chunk in self.layout.chunks:
            for piece in chunk.pieces:
                self._chunks_of.setdefault(piece.tensor, []).append(chunk)
        #: Chunks whose contributions are the changes of buffers.
        self._changes = {chunk.id for chunk in self.layout.chunks if is_change(chunk, at_once)}
        #: The tensors of chunks that have whole parameters only.
        self._packed = {
            chunk.id: [self.tensors[piece.tensor] for piece in chunk.pieces]
            for chunk in self.layout.chunks
            if chunk.kind == "param" and all(self._is_whole(piece) for piece in chunk.pieces)
        }
        #: Of those, by chunk and gradient buffer, where each tensor's gradient is contributed from.
        self._parts: dict[tuple[int, GradientBuffer], Sequence[torch.Tensor]] = {}
        #: Parameters that may be trained; and of these, by number, those without a hook for their gradient: torch takes none
        #: before they require one.
        self.trainable = [tensor for tensor, spec in zip(self.tensors, self.specs, strict=True) if spec.group >= 0]
        self._uncaught = {i for i, spec in enumerate(self.specs) if spec.group >= 0 and spec.numel}
        #: Frozen chunks that have had no gradient so far.
        self._frozen = {chunk.id: chunk for chunk in self.layout.chunks if chunk.frozen}
        #: Parameters by number.
        self.parameters = dict(enumerate(self.tensors[:first]))
        self._dtypes = list(map(_dtype, self.parameters.values()))
        self._buffer_chunks = [chunk for chunk in self.layout.chunks if chunk.kind != "param"]
        #: Buffers as they were when the round began: every micro-batch starts from these.
        self._buffers: dict[int, torch.Tensor] = {}
        #: Parameters that lie in servers' memory.
        self._in_memory: set[int] = set()
        #: Where gradients go as backward makes them, for the parameters that have a place in the gradient buffer; and those whose
        #: place has been given away already.
        self._gradient_buffer: GradientBuffer | None = None
        self._places: dict[GradientBuffer, dict[int, torch.Tensor]] = {}
        self._given: set[int] = set()
        #: Whether gradients are added to what is in the gradient buffer.
        self._adds = False
        self._on_gradient: Callable[[int], None] | None = None
        self._made = threading.Lock()
        #: Tensors whose gradients are not caught.
        self._not_caught: list[int] = []

    def __deepcopy__(self, memo: object) -> Replica:
        """There is one. Who copies the model copies its hooks, which lead here and do nothing for other parameters."""
        return self

    def chunks_of(self, index: int) -> list[Chunk]:
        """The chunks that tensor number `index` is cut into or packed in."""
        return self._chunks_of[index]

    # ---- out of the model

    def catch_gradients(self) -> None:
        """From now on have backward leave each large gradient in the gradient buffer given to `contribute_to`."""
        self._catch_all()
        inplace_wgrad.install(self.model, self)

    def _catch_all(self) -> None:
        """Catch the gradients of those that have become able to have one: small ones only where each is pushed as it comes."""
        for index in [index for index in self._uncaught if self.tensors[index].requires_grad]:
            self._uncaught.remove(index)
            if self.tensors[index].nbytes < _SMALL_BYTES and self._on_gradient is None:
                self._not_caught.append(index)
            else:
                self._catch_these([index])

    def _catch_these(self, indices: Iterable[int]) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # a hook needs no weights, which may still be awaited
            for index in indices:
                self.tensors[index].register_post_accumulate_grad_hook(functools.partial(self._catch, index))

    @property
    def on_gradient(self) -> Callable[[int], None] | None:
        """Called with a tensor's number when backward has made its gradient: of one at a time, though backward has a thread for
        each GPU."""
        return self._on_gradient

    @on_gradient.setter
    def on_gradient(self, called: Callable[[int], None] | None) -> None:
        self._on_gradient = called
        if called is not None:
            self._catch_these(self._not_caught)
            self._not_caught = []

    @property
    def frozen(self) -> dict[int, torch.Tensor]:
        """Parameters, by number, in chunks that have had no gradient so far."""
        return {piece.tensor: self.tensors[piece.tensor] for chunk in self._frozen.values() for piece in chunk.pieces}

    def thawed(self) -> list[Chunk]:
        """Frozen chunks that have a gradient for the first time."""
        chunks = [c for c in self._frozen.values() if any(self.tensors[piece.tensor].grad is not None for piece in c.pieces)]
        for chunk in chunks:
            del self._frozen[chunk.id]
        return chunks

    def contribute_to(self, gradient_buffer: GradientBuffer) -> None:
        """The next gradients go to `gradient buffer`."""
        self._catch_all()
        self._gradient_buffer, self._adds, self._given = gradient_buffer, False, set()
        if gradient_buffer not in self._places:
            offsets, _ = gradient_offsets(self.layout)
            places = {
                id(tensor): self._place(gradient_buffer, offsets, tensor, self._chunks_of[index])
                for index, tensor in enumerate(self.tensors)
                if self.specs[index].group >= 0 and tensor.numel() and self._is_plain(tensor, self._chunks_of[index][0])
            }
            self._places[gradient_buffer] = {key: place for key, place in places.items() if place.data_ptr() % ALIGNED == 0}

    def add_to(self, gradient_buffer: GradientBuffer) -> None:
        """The next gradients are to be added, by `added`, to those of another micro-batch, which are in `gradient buffer`."""
        self._gradient_buffer, self._adds = gradient_buffer, True

    def _is_plain(self, tensor: torch.Tensor, chunk: Chunk) -> bool:
        """Whether its gradient and its elements in chunks are one and the same memory, on the CPU."""
        return tensor.device.type == "cpu" and tensor.is_contiguous() and chunk.dtype == chunk.sum_dtype

    def _place(
        self, gradient_buffer: GradientBuffer, offsets: Mapping[int, int], tensor: torch.Tensor, chunks: list[Chunk]
    ) -> torch.Tensor:
        first = next(piece for piece in chunks[0].pieces if self.tensors[piece.tensor] is tensor)
        start = offsets[chunks[0].id] + first.offset * tensor.element_size()
        place = (
            gradient_buffer.memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        )
        return place.data  # with a count of its own of how often it is written to

    def place(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Where the gradient of `weight` is to be computed; None where that is not for this backward to decide."""
        if self._gradient_buffer is None or self._adds or weight.grad is not None or id(weight) in self._given:
            return None
        place = self._places[self._gradient_buffer].get(id(weight))
        if place is None or place.dtype != weight.dtype:
            return None
        self._given.add(id(weight))
        return place.view(place.shape)  # a new tensor, for autograd keeps it only if nobody else does

    @torch.no_grad()
    def _catch(self, index: int, parameter: torch.Tensor) -> None:
        """Called by autograd when the gradient of a parameter has been accumulated."""
        gradient = parameter.grad
        if self._gradient_buffer is None or self._adds or gradient is None or gradient.requires_grad or gradient.is_sparse:
            return
        if parameter is not self.tensors[index]:
            return  # of a copy of the model
        place = self._places[self._gradient_buffer].get(id(parameter))
        if place is not None and gradient.dtype == place.dtype and gradient.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(gradient)
        if self._on_gradient is not None:
            with self._made:
                self._on_gradient(index)

    @torch.no_grad()
    def gradient(self, samples: int, without: Collection[int] = ()) -> dict[int, Sum]:
        """The contribution of one micro-batch by chunk, but for those in `without`: gradient x samples, buffers x samples. It
        is in the gradient buffer; the model's gradients are taken away."""
        assert self._gradient_buffer is not None
        gradient_buffer, out = self._gradient_buffer, {}
        for chunk in self.layout.chunks:
            if chunk.id not in without:
                is_nothing, values = self._has_none(chunk), gradient_buffer.chunks[chunk.id]
                out[chunk.id] = (
                    nothing() if is_nothing else weighted(values, self.collect(chunk, gradient_buffer), samples, chunk.kind)
                )
        self.discard()
        return out

    @torch.no_grad()
    def added(self, samples: int, sums: Mapping[int, Sum]) -> dict[int, Sum]:
        """`sums`, of another micro-batch of as many samples, a power of two, with the contribution of this one: to the bit what
        adding what `gradient` gives makes of them, and where they are. The model's gradients are taken away."""
        assert self._gradient_buffer is not None
        out = {}
        for chunk in self.layout.chunks:
            total = sums[chunk.id]
            if total.is_nothing:
                out[chunk.id] = self._own(chunk, self._gradient_buffer.chunks[chunk.id], {}, samples)
            elif chunk.kind == "param":
                present = self._add_pieces(chunk, total.values)
                out[chunk.id] = Sum(total.values, total.present | present, owned=True, scale=total.scale)
            else:
                values = torch.empty_like(total.values)
                out[chunk.id] = adder(chunk)(total, self._own(chunk, values, {}, samples))
        self.discard()
        return out

    def _is_whole(self, piece: Piece) -> bool:
        return piece.length == self.tensors[piece.tensor].numel() and not self.specs[piece.tensor].is_bytes

    def _has_none(self, chunk: Chunk) -> bool:
        """Whether no parameter in it has a gradient."""
        return chunk.kind == "param" and all(self.tensors[piece.tensor].grad is None for piece in chunk.pieces)

    def _own(self, chunk: Chunk, values: torch.Tensor, places: Mapping[int, torch.Tensor], samples: int) -> Sum:
        """What the model contributes to a chunk now, times its samples, in `values`."""
        if self._has_none(chunk):
            return nothing()
        return weighted(values, self._collect(chunk, values, places), samples, chunk.kind)

    def _add_pieces(self, chunk: Chunk, total: torch.Tensor) -> int:
        """Add a chunk's gradients to `total`; the mask of the pieces that have one."""
        present, parts, gradients = 0, [], []
        for bit, piece in enumerate(chunk.pieces):
            part = total[piece.offset : piece.offset + piece.length]
            gradient = self.tensors[piece.tensor].grad
            if gradient is None:
                part.add_(0.0)  # as the contribution is 0 there
                continue
            gradient = gradient.to_dense() if gradient.is_sparse else gradient.detach()
            parts.append(part)
            gradients.append(gradient.reshape(-1)[piece.start : piece.start + piece.length].to(part.device, part.dtype))
            present |= 1 << bit
        if parts:
            torch._foreach_add_(parts, gradients)
        return present

    def discard(self) -> None:
        """Take away the model's gradients and contribute nothing."""
        self._gradient_buffer = None
        for tensor in self.tensors:
            tensor.grad = None

    @torch.no_grad()
    def collect(self, chunk: Chunk, gradient_buffer: GradientBuffer) -> int:
        """Have what the model contributes to a chunk in the gradient buffer; return the mask of its pieces."""
        if chunk.id in self._packed:
            return self._collect_packed(chunk, gradient_buffer)
        return self._collect(chunk, gradient_buffer.chunks[chunk.id], self._places[gradient_buffer])

    def _collect_packed(self, chunk: Chunk, gradient_buffer: GradientBuffer) -> int:
        """`collect` for a chunk of whole parameters, in few calls."""
        tensors, key = self._packed[chunk.id], (chunk.id, gradient_buffer)
        if key not in self._parts:
            self._parts[key] = shaped(gradient_buffer.chunks[chunk.id], tensors)
        present, parts, gradients = 0, [], []
        for bit, (tensor, part) in enumerate(zip(tensors, self._parts[key], strict=True)):
            gradient = tensor.grad
            if gradient is None:
                part.zero_()
                continue
            present |= 1 << bit
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if gradient.data_ptr() != part.data_ptr():
                parts.append(part)
                gradients.append(gradient)
        if parts:
            torch._foreach_copy_(parts, gradients)
        return present

    def _collect(self, chunk: Chunk, values: torch.Tensor, places: Mapping[int, torch.Tensor]) -> int:
        present = 0
        for bit, piece in enumerate(chunk.pieces):
            part = values[piece.offset : piece.offset + piece.length]
            if chunk.kind != "param":
                part.copy_(self._elements(piece.tensor)[piece.start : piece.start + piece.length])
                present |= self._changed(chunk, piece, part) << bit
                continue
            tensor = self.tensors[piece.tensor]
            source = tensor.grad
            if source is None:
                part.zero_()
                continue
            if source.is_sparse:
                source = source.to_dense()
            place = places.get(id(tensor))
            if place is None or source.data_ptr() != place.data_ptr():
                part.copy_(source.detach().reshape(-1)[piece.start : piece.start + piece.length])
            present |= 1 << bit
        if chunk.id in self._changes:
            values[: chunk.numel].sub_(self._buffers[chunk.id].to(values.dtype))
        return present

    def _elements(self, index: int) -> torch.Tensor:
        """The elements of tensor number `index` as the model has it now, flat, as chunks have them."""
        if index not in self._buffer_of:
            tensor = self.tensors[index].detach()
            return as_bytes(tensor) if self.specs[index].is_bytes else tensor.reshape(-1)
        buffer, part = self._buffer_of[index]
        now = list(parts_of(buffer.now()))[part][1]
        return as_bytes(now) if buffer.rule == "last" else now.reshape(-1)

    def _changed(self, chunk: Chunk, piece: Piece, now: torch.Tensor) -> bool:
        """Whether a buffer is not what it was when the round began. Else servers keep it: a mean would differ by rounding. One
        that travels as bytes has changed as a whole or not at all, lest it become a mixture."""
        if chunk.kind == "last":
            return self._changed_anywhere(piece.tensor)
        then = self._began(chunk, piece)
        return not torch.equal(now.to(then.dtype), then)

    def _changed_anywhere(self, index: int) -> bool:
        """Whether the buffer that tensor number `index` is a part of is not what it was."""
        buffer, part = self._buffer_of[index]
        for number, (_, now) in enumerate(parts_of(buffer.now()), index - part):
            elements = as_bytes(now)
            for chunk in self._chunks_of.get(number, ()):
                for piece in chunk.pieces:
                    here = elements[piece.start : piece.start + piece.length]
                    if piece.tensor == number and not same_bytes(here, self._began(chunk, piece)):
                        return True
        return False

    def _began(self, chunk: Chunk, piece: Piece) -> torch.Tensor:
        """A piece of a buffer as it was when the round began."""
        return self._buffers[chunk.id][piece.offset : piece.offset + piece.length]

    def added_to(self, chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
        """What was added to the buffers of a chunk since the round began, given what they are now."""
        return values - self._buffers[chunk.id].to(values.dtype)

    def began(self) -> dict[int, torch.Tensor]:
        """Buffers as they were when the round began, by chunk."""
        return dict(self._buffers)

    def check_dtypes(self) -> None:
        """Raise UsageError where a parameter no longer has the dtype that servers keep."""
        now = list(map(_dtype, self.parameters.values()))
        if now != self._dtypes:
            index = next(index for index, dtype in enumerate(self._dtypes) if now[index] != dtype)
            raise UsageError(
                f"the script has made '{self.specs[index].name}' {now[index]}, but servers have it as {self._dtypes[index]}: "
                "convert the model before run.replicate() and run.optimizer()."
            )

    def check_constants(self) -> None:
        """Raise UsageError where a buffer that does not travel has changed."""
        for constant in self.constants:
            constant.check()

    def present(self, values: Mapping[int, torch.Tensor]) -> dict[int, int]:
        """The mask of pieces to take over from `values`, which are those of `weights`: parameters and changed buffers."""
        return {
            chunk.id: sum(
                (chunk.kind == "param" or self._changed(chunk, p, values[chunk.id][p.offset : p.offset + p.length])) << bit
                for bit, p in enumerate(chunk.pieces)
            )
            for chunk in self.layout.chunks
            if chunk.id in values
        }

    def weights(self, chunks: Iterable[Chunk] | None = None) -> dict[int, torch.Tensor]:
        """A copy of some tensors by chunk, flat, in the dtype that servers keep; of all that are not as they came first."""
        if chunks is None:
            chunks = [chunk for chunk in self.layout.chunks if chunk.id not in self._frozen]
        return {chunk.id: self._flat(chunk, dtype_of(chunk.sum_dtype)) for chunk in chunks}

    def frozen_weights(self) -> dict[int, torch.Tensor]:
        """Likewise of those that are as they came first but may be trained."""
        return self.weights([chunk for chunk in self._frozen.values() if chunk.group >= 0])

    def first_weights(self, chunk: int) -> memoryview:
        """The tensors of a chunk, as a frame in their own dtype."""
        wanted = self.layout.chunks[chunk]
        return to_frame(self._flat(wanted, dtype_of(wanted.dtype)))

    def _flat(self, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(chunk.numel, dtype=dtype)
        for piece in chunk.pieces:
            source = self._elements(piece.tensor)[piece.start : piece.start + piece.length]
            values[piece.offset : piece.offset + piece.length].copy_(source)
        return values

    # ---- into the model

    @torch.no_grad()
    def load(self, weights: Mapping[int, Any], copy: bool = True) -> None:
        """Take over new weights and buffers: for each chunk that has come a frame, or where it is in a server's memory.

        Without `copy` parameters that are in servers' memory lie there from then on. Raises WireError for a frame of the
        wrong size.
        """
        with torch._C.DisableTorchFunctionSubclass():  # parameters that are awaited are to come here
            self.check_dtypes()
            self._load(weights, copy)

    @contextlib.contextmanager
    def holding(self, weights: Mapping[int, Any]) -> Iterator[None]:
        """Have other parameters while this lasts; buffers stay as they are."""
        before = {index: tensor.detach().clone() for index, tensor in self.parameters.items()}
        self.load({chunk: found for chunk, found in weights.items() if self.layout.chunks[chunk].kind == "param"})
        try:
            yield
        finally:
            for index, values in before.items():
                self.parameters[index].data.copy_(values)

    def _load(self, weights: Mapping[int, Any], copy: bool) -> None:
        chunks = [self.layout.chunks[chunk] for chunk in sorted(weights)]
        values = {chunk.id: self._values(chunk, weights[chunk.id]) for chunk in chunks}
        for chunk in chunks:
            if chunk.id in self._packed:
                self._load_packed(chunk, weights[chunk.id], values[chunk.id], copy)
        cut = [chunk for chunk in chunks if chunk.id not in self._packed]
        tensors = {piece.tensor: [weights.get(c.id) for c in self._chunks_of[piece.tensor]] for c in cut for piece in c.pieces}
        adopted = {index for index, found in tensors.items() if not copy and self._adopt(index, self._chunks_of[index], found)}
        self._put_back(piece.tensor for chunk in cut for piece in chunk.pieces)
        # only now, for what a script wrote into one of those may have hidden others on the same page
        for chunk in cut:
            for piece in chunk.pieces:
                if piece.tensor not in adopted:
                    self._write(piece, values[chunk.id])
        for chunk in chunks:
            if chunk.kind != "param":
                self._buffers[chunk.id] = values[chunk.id].clone()

    def _load_packed(self, chunk: Chunk, found: Any, values: torch.Tensor, copy: bool) -> None:
        """Load a chunk of whole parameters, in few calls."""
        tensors = self._packed[chunk.id]
        adopts = isinstance(found, InWeightBuffer) and not copy
        if adopts:
            self.mapped.forget_writes(values)
        views = self.mapped.shaped(chunk, found, tensors) if isinstance(found, InWeightBuffer) else shaped(values, tensors)
        targets, sources = [], []
        for piece, tensor, view in zip(chunk.pieces, tensors, views, strict=True):
            if adopts and view.data_ptr() % ALIGNED == 0 and tensor.device.type == "cpu" and tensor.is_contiguous():
                tensor.data = view
                self._in_memory.add(piece.tensor)
                continue
            if not copy and piece.tensor in self._in_memory:
                self._move_out(piece.tensor)
            targets.append(tensor.data)  # a graph that has kept it already is to see what comes now
            sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _move_out(self, index: int) -> None:
        """Have a place of its own again for a parameter that lies in a server's memory."""
        self.tensors[index].data = torch.empty_like(self.tensors[index])
        self._in_memory.remove(index)

    def _values(self, chunk: Chunk, found: Any) -> torch.Tensor:
        if isinstance(found, InWeightBuffer):
            return self.mapped.chunk(chunk, found)
        return from_frame(found, chunk.dtype, chunk.numel, f"chunk {chunk.id}")

    def _adopt(self, index: int, chunks: list[Chunk], found: list[Any]) -> bool:
        """Have a parameter lie where its weights are. False if they must be copied."""
        tensor = self.tensors[index]
        if chunks[0].kind != "param" or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        places = [place for place in found if isinstance(place, InWeightBuffer)]
        flat = self.mapped.tensor(index, chunks, places) if len(places) == len(found) else None
        if flat is None or flat.data_ptr() % ALIGNED:
            if index in self._in_memory:
                self._move_out(index)
            return False
        self.mapped.forget_writes(flat)
        tensor.data = flat.view(tensor.dtype).view(tensor.shape)
        self._in_memory.add(index)
        return True

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Put the buffers back to what they were when the round began."""
        self._put_back(self._buffer_of)
        for chunk in self._buffer_chunks:
            for piece in chunk.pieces:
                self._write(piece, self._buffers[chunk.id])

    def _put_back(self, indices: Iterable[int]) -> None:
        """Have the model use the tensors that are written to, for a script may have put others in the place of buffers."""
        moved = [
            b
            for b, part in (self._buffer_of[index] for index in indices if index in self._buffer_of)
            if not part and b.put_back()
        ]
        for index, (buffer, part) in self._buffer_of.items() if moved else ():
            self.tensors[index] = buffer.parts()[part][1]

    def _write(self, piece: Piece, values: torch.Tensor) -> None:
        tensor = self.tensors[piece.tensor].data  # a graph that has kept it already is to see what comes now
        part = values[piece.offset : piece.offset + piece.length]
        if self.specs[piece.tensor].is_bytes:
            if not tensor.is_contiguous():
                whole = as_bytes(tensor).clone()
                whole[piece.start : piece.start + piece.length].copy_(part)
                tensor.copy_(whole.view(tensor.dtype).view(tensor.shape))
                return
            as_bytes(tensor)[piece.start : piece.start + piece.length].copy_(part)
        elif piece.length == tensor.numel():
            tensor.copy_(part.view(tensor.shape))
        elif tensor.is_contiguous():
            tensor.view(-1)[piece.start : piece.start + piece.length].copy_(part)
        else:
            whole = tensor.contiguous()
            whole.view(-1)[piece.start : piece.start + piece.length].copy_(part)
            tensor.copy_(whole)


def _spec(name: str, tensor: torch.Tensor, group: int, frozen: bool = False) -> TensorSpec:
    dtype = dtype_name(tensor.dtype)
    return TensorSpec(name, list(tensor.shape), dtype, group if is_trainable(dtype) or not frozen else -1, frozen=frozen)
