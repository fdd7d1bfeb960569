"""Memory that two processes of one host both touch, so that tensors between them need not be sent.

A region is an anonymous file in memory: it has no name that could be left behind, no folder that could be too small, and
the kernel frees it when the last process that maps it is gone, however it went. Its owner tells others a `Handle`; whoever
opens it finds out by a token in the region itself whether it really is the same memory: host names prove nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets

import msgspec

from roundtable.common.config.field_types import Count, Name
from roundtable.common.runtime.errors import PsError

PAGE = mmap.PAGESIZE
#: Bytes at a region's beginning that hold its token; what is kept in it comes after.
HEADER_BYTES = PAGE
_TOKEN_BYTES = 16
#: MAP_NORESERVE, which the module mmap does not name.
_NO_RESERVE = 0x4000
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Handle(msgspec.Struct, frozen=True):
    """Where to find a region: the file `fd` of process `pid`, `size` bytes long, beginning with `token` (hexadecimal)."""

    pid: Count
    fd: Count
    size: Count
    token: Name


class NotShared(PsError):
    """The memory is not to be had here: another host, another container, or no leave."""


class Region:
    """A region that is mapped here. `memory` is all of it, header included; `fd` its file."""

    def __init__(self, fd: int, memory: mmap.mmap, handle: Handle) -> None:
        self.fd = fd
        self.memory = memory
        self.handle = handle

    def close(self) -> None:
        """Give the file back; the mapping goes when nobody uses its memory any more."""
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.fd = -1


def create(size: int) -> Region:
    """A new region with room for `size` bytes after the header, zeroed; pages take up memory when first written to.

    Raises NotShared where the system has no such memory to give.
    """
    try:
        fd = os.memfd_create("roundtable", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        raise NotShared(f"no shared memory can be had ({error}).") from None
    try:
        os.ftruncate(fd, HEADER_BYTES + size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # nobody can pull the memory away from under a reader
        memory = mmap.mmap(fd, HEADER_BYTES + size)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise NotShared(f"shared memory of {(HEADER_BYTES + size) >> 20} MiB cannot be had ({error}).") from None
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[:_TOKEN_BYTES] = token
    return Region(fd, memory, Handle(os.getpid(), fd, HEADER_BYTES + size, token.hex()))


def attach(handle: Handle, *, private: bool = False) -> Region:
    """Map another process's region to read it. `private`: it may be written to, and what is written stays in this process.

    Raises NotShared unless it is the very memory that the handle means.
    """
    try:
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise NotShared(f"the memory of process {handle.pid} cannot be reached from here ({error.strerror}).") from None
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != handle.size:
            raise NotShared(f"the memory of process {handle.pid} is not what was offered.")
        if private:  # without a claim to as much memory again, for what is never written to takes up none
            memory = mmap.mmap(fd, handle.size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(fd, handle.size, access=mmap.ACCESS_READ)
        if memory[:_TOKEN_BYTES].hex() != handle.token:
            raise NotShared(f"process {handle.pid} here is not the one that offered its memory.")
    except (OSError, ValueError) as error:  # not such a file at all
        os.close(fd)
        raise NotShared(f"the memory of process {handle.pid} cannot be mapped ({error}).") from None
    except NotShared:
        os.close(fd)
        raise
    return Region(fd, memory, handle)
