"""Memory that two processes of one host share, so that tensors between them need not be sent.

A region is an anonymous file in memory. It has no name that could be left behind, and needs no folder. The kernel frees it when
the last process that maps it has ended in any way. Its owner sends a `Handle` to other processes. A token in the region proves
to the process that opens it that both have the same memory, because host names prove nothing.
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
#: Bytes at the start of a region that hold its token. The contents come after them.
HEADER_BYTES = PAGE
_TOKEN_BYTES = 16
#: MAP_NORESERVE, which the module mmap does not name.
_NO_RESERVE = 0x4000
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Handle(msgspec.Struct, frozen=True):
    """The place of a region: file `fd` of process `pid`, with `size` bytes that start with `token` (hexadecimal)."""

    pid: Count
    fd: Count
    size: Count
    token: Name


class NotShared(PsError):
    """The memory cannot be shared: it is on another host or in another container, or access is denied."""


class Region:
    """A region that is mapped here. `memory` is all of it, including the header, and `fd` its file."""

    def __init__(self, fd: int, memory: mmap.mmap, handle: Handle) -> None:
        self.fd = fd
        self.memory = memory
        self.handle = handle

    def close(self) -> None:
        """Close the file. The mapping ends when its memory is no longer used."""
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.fd = -1


def create(size: int) -> Region:
    """Return a new region with `size` zeroed bytes after the header. A page takes up memory when it is first written to.

    Raises NotShared if the system has no such memory.
    """
    try:
        fd = os.memfd_create("roundtable", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        raise NotShared(f"no shared memory can be had ({error}).") from None
    try:
        os.ftruncate(fd, HEADER_BYTES + size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # no process can shrink the memory while another reads it
        memory = mmap.mmap(fd, HEADER_BYTES + size)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise NotShared(f"shared memory of {(HEADER_BYTES + size) >> 20} MiB cannot be had ({error}).") from None
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory[:_TOKEN_BYTES] = token
    return Region(fd, memory, Handle(os.getpid(), fd, HEADER_BYTES + size, token.hex()))


def attach(handle: Handle, *, private: bool = False) -> Region:
    """Map another process's region for reading. If `private`, writes are possible and stay in this process.

    Raises NotShared unless it is the memory that the handle means.
    """
    try:
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise NotShared(f"the memory of process {handle.pid} cannot be reached from here ({error.strerror}).") from None
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != handle.size:
            raise NotShared(f"the memory of process {handle.pid} is not what was offered.")
        if private:  # do not reserve as much memory again: a page without writes takes up none
            memory = mmap.mmap(fd, handle.size, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            memory = mmap.mmap(fd, handle.size, access=mmap.ACCESS_READ)
        if memory[:_TOKEN_BYTES].hex() != handle.token:
            raise NotShared(f"process {handle.pid} here is not the one that offered its memory.")
    except (OSError, ValueError) as error:  # the file is no memory file
        os.close(fd)
        raise NotShared(f"the memory of process {handle.pid} cannot be mapped ({error}).") from None
    except NotShared:
        os.close(fd)
        raise
    return Region(fd, memory, handle)
