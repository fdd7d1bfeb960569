"""Weights that are not copied: tensors over the memory of a server on the same host.

The mapping is private. A script's writes to a weight stay in this process and are gone with the next version, as with
weights that are sent. If a tensor's chunks lie on several servers, their memory is mapped side by side to make up the tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from roundtable.common.model.layout import ALIGN_BYTES, Chunk, Layout, Piece, weight_offsets
from roundtable.common.model.tensor_bytes import dtype_of
from roundtable.common.protocol.shared_memory import HEADER_BYTES, Handle, NotShared, Region, attach

#: Bits of an entry of the kernel's pagemap. The page is in memory, is on disk, or belongs to a file rather than this process.
_PRESENT, _SWAPPED, _SHARED = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
#: How many combinations of several servers' weight buffers are mapped for one tensor. Further combinations are copied.
_COMBINATIONS = 32


@dataclass(frozen=True)
class InWeightBuffer:
    """The place of a chunk's weights: a weight buffer in the memory of server `server`.

    `region` counts that server's memories from 0, because a process that takes the server's place has its own. `still`: no
    process writes to this weight buffer again.
    """

    server: int
    weight_buffer: int
    region: int = 0
    still: bool = False


class MappedWeights:
    """The memory of all servers that share theirs with this worker."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        #: By server and number of the region.
        self._regions: dict[tuple[int, int], Region] = {}
        self._offsets = {server: weight_offsets(layout.on(server)) for server in range(layout.servers)}
        self._tensors: dict[tuple[int, tuple[InWeightBuffer, ...]], torch.Tensor] = {}
        self._chunks: dict[tuple[int, InWeightBuffer], torch.Tensor] = {}
        #: By chunk of whole tensors: the tensors.
        self._shaped: dict[tuple[int, InWeightBuffer], Sequence[torch.Tensor]] = {}
        self._pagemap = -1

    def attach(self, server: int, handle: Handle) -> int:
        """Map the memory of a server, and return its number among those that the server has had.

        Raises NotShared if the memory cannot be reached.
        """
        if self._pagemap < 0:
            try:
                self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise NotShared(f"what a script writes into weights could not be told apart ({error.strerror}).") from None
        number = max((known for of, known in self._regions if of == server), default=-1) + 1
        self._regions[server, number] = attach(handle, private=True)
        return number

    def chunk(self, chunk: Chunk, at: InWeightBuffer) -> torch.Tensor:
        """Return the flat weights of a chunk in the chunk's dtype."""
        key = chunk.id, at
        if key not in self._chunks:
            self._let_go(at)
            memory, dtype = self._regions[at.server, at.region].memory, dtype_of(chunk.dtype)
            self._chunks[key] = torch.frombuffer(memory, dtype=dtype, count=chunk.numel, offset=self._offset(chunk, at))
        return self._chunks[key]

    def shaped(self, chunk: Chunk, at: InWeightBuffer, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the weights of a chunk of whole tensors, each in the shape of the one in `like`."""
        key = chunk.id, at
        if key not in self._shaped:
            flat = zip(chunk.pieces, like, strict=True)
            self._shaped[key] = [self._alone(chunk, piece, at).view(tensor.shape) for piece, tensor in flat]
        return self._shaped[key]

    def _let_go(self, at: InWeightBuffer) -> None:
        """Release a server's earlier memory, because its weights are in new memory from now on."""
        for server, number in [key for key in self._regions if key[0] == at.server and key[1] < at.region]:
            self._regions.pop((server, number)).close()
        old = [key for key in self._chunks if key[1].server == at.server and key[1].region < at.region]
        for key in old:
            del self._chunks[key]
            self._shaped.pop(key, None)
        for whole in [w for w in self._tensors if any(p.server == at.server and p.region < at.region for p in w[1])]:
            del self._tensors[whole]

    def _offset(self, chunk: Chunk, at: InWeightBuffer) -> int:
        offsets, size = self._offsets[at.server]
        return HEADER_BYTES + at.weight_buffer * size + offsets[chunk.id]

    def tensor(self, index: int, chunks: Sequence[Chunk], at: Sequence[InWeightBuffer]) -> torch.Tensor | None:
        """Return tensor number `index`, flat. `chunks` in order make it up, and `at` are their places.

        Return None if the tensor cannot be mapped and must be copied.
        """
        key = index, tuple(at)
        if key not in self._tensors:
            if len(chunks) == 1:
                piece = next(piece for piece in chunks[0].pieces if piece.tensor == index)
                self._tensors[key] = self._alone(chunks[0], piece, at[0])
            else:
                known = sum(other == index for other, _ in self._tensors)
                whole = all(chunk.weight_bytes % ALIGN_BYTES == 0 for chunk in chunks[:-1])
                if not whole or known >= _COMBINATIONS or ALIGN_BYTES % mmap.PAGESIZE:
                    return None
                self._tensors[key] = self._join(chunks, at)
        return self._tensors[key]

    def _alone(self, chunk: Chunk, piece: Piece, at: InWeightBuffer) -> torch.Tensor:
        """Return the elements of a piece with a storage of their own, because saving a tensor saves its whole storage."""
        whole = self.chunk(chunk, at)
        if piece.length in (0, chunk.numel):
            return whole[: piece.length]
        start = self._offset(chunk, at) + piece.offset * whole.itemsize
        return torch.frombuffer(self._regions[at.server, at.region].memory, dtype=whole.dtype, count=piece.length, offset=start)

    def _join(self, chunks: Sequence[Chunk], at: Sequence[InWeightBuffer]) -> torch.Tensor:
        size = sum(chunk.weight_bytes for chunk in chunks)
        start = end = _map(None, size, -1, 0)
        for chunk, place in zip(chunks, at, strict=True):
            _map(end, chunk.weight_bytes, self._regions[place.server, place.region].fd, self._offset(chunk, place))
            end += chunk.weight_bytes
        buffer = (ctypes.c_char * size).from_address(start)
        return torch.frombuffer(buffer, dtype=dtype_of(chunks[0].dtype))

    def forget_writes(self, flat: torch.Tensor) -> None:
        """Undo this process's writes to a tensor of `tensor`, which hide newer values of the server.

        The kernel knows which pages were written to. torch does not count all writes of a script (`weight.data.clamp_()`).
        """
        first, last = flat.data_ptr() // mmap.PAGESIZE, (flat.data_ptr() + flat.nbytes - 1) // mmap.PAGESIZE
        entries = np.frombuffer(os.pread(self._pagemap, 8 * (last + 1 - first), 8 * first), dtype=np.uint64)
        own = (entries & _SWAPPED) | ((entries & _PRESENT) & ~((entries & _SHARED) << np.uint64(2)))
        if own.any():
            size = (last + 1 - first) * mmap.PAGESIZE
            if _libc().madvise(first * mmap.PAGESIZE, size, mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "weights written by the script cannot be given up")


def shaped(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return views of `flat` in the shapes of the tensors in `like`, which make it up."""
    views: Sequence[torch.Tensor] = torch._C._nn.unflatten_dense_tensors(flat, list(like))
    return views


def _map(at: int | None, size: int, fd: int, offset: int) -> int:
    """Map `size` bytes of a file, from `offset` on, to the address `at`.

    Without `at`, reserve them anywhere. Return the address.
    """
    libc = _libc()
    fixed = 0x10  # MAP_FIXED, which the module mmap does not name
    flags = mmap.MAP_PRIVATE | (fixed if at is not None else mmap.MAP_ANONYMOUS)
    access = mmap.PROT_READ | mmap.PROT_WRITE if at is not None else 0
    address: int | None = libc.mmap(at, size, access, flags, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{size} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
    return address


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
