"""The key-value client: named tensors on the servers, for scripts with their own loop.

`push` and `pull` return at once with a timestamp, and `wait` blocks until that push or pull is done. The interface is that of Li
et al., "Scaling distributed machine learning with the parameter server" (OSDI 2014).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from roundtable.common.model.layout import CHUNK_BYTES
from roundtable.common.model.tensor_bytes import dtype_name, from_frame, to_frame
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.kv import KvPull, KvPush, KvReply
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames
from roundtable.common.runtime.allocator import keep_memory
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.client.io_thread import IoThread


@dataclass
class _Request:
    """One block of a push, or a whole pull, until it is answered."""

    server: str
    body: KvPush | KvPull
    frames: list[memoryview]
    sent_at: float
    #: The tensors that the blocks of a pull are written to.
    out: Sequence[torch.Tensor] = ()
    #: The newest version of which a block has come.
    version: int = -1
    #: The blocks of that version still to come.
    missing: set[int] = field(default_factory=set)


@dataclass
class _Timestamp:
    """The requests that one push or pull still waits for."""

    outstanding: set[int] = field(default_factory=set)
    error: str = ""


class KvClient:
    """Pushes tensors to keys, and pulls them. Each push counts once, even if messages are lost or repeated.

    A key's name decides which server it is on. To spread a large value over servers, use several keys. The servers apply the
    pushes of one worker to one key in order, but those of several workers in any order. Sums by `add` are thus exact only up to
    rounding. A pull sees each push as a whole or not at all.
    """

    def __init__(self, link: IoThread, servers: int, timeout: float) -> None:
        self._link = link
        self._servers = servers
        self._timeout = timeout
        self._next_id = 0
        self._requests: dict[int, _Request] = {}
        self._timestamps: dict[int, _Timestamp] = {}
        self._owner: dict[int, int] = {}
        #: Number of answers so far, which shows the coordinator that there is progress.
        self.answered = 0
        keep_memory()
        with link.lock:
            self._before_message: Callable[[str, Body, Frames], None] = link.on_message
            self._before_tick: Callable[[float], list[Send]] = link.on_tick
            link.on_message, link.on_tick = self._on_message, self._on_tick

    def push(self, key: str, tensor: torch.Tensor, op: Literal["add", "set"] = "add") -> int:
        """Add `tensor` to the value of `key`, or set the value to it, and return a timestamp.

        A new key starts from its first push. The values are copied before this returns.
        """
        values = tensor.detach().to("cpu").reshape(-1)
        step = CHUNK_BYTES // values.element_size()
        timestamp = self._new()
        for block, part in enumerate(values.split(step)):  # one block is sent while the next one is copied
            body = KvPush(self._take_id(), key, block, values.numel(), dtype_name(values.dtype), op, timestamp)
            self._submit(timestamp, self._server(key), body, [to_frame(part.clone())])
        return timestamp

    def pull(self, key: str, out: torch.Tensor) -> int:
        """Read the value of `key` into `out` (contiguous, on the CPU), and return a timestamp.

        `out` is filled when `wait` returns. Raises UsageError if `out` is not contiguous or not on the CPU.
        """
        if not out.is_contiguous() or out.device.type != "cpu":
            raise UsageError(f"the tensor to pull key '{key}' into must be contiguous and on the CPU.")
        flat = out.detach().view(-1)
        timestamp = self._new()
        body = KvPull(self._take_id(), key, flat.numel())
        self._submit(timestamp, self._server(key), body, [], flat.split(CHUNK_BYTES // flat.element_size()))
        return timestamp

    def wait(self, timestamp: int) -> None:
        """Block until the push or pull with this timestamp is done.

        Raises UsageError if it cannot be done (no such key, another size), and NoAnswer after the run's time-out.
        """
        state = self._timestamps.get(timestamp)
        if state is None:
            raise UsageError(f"no push or pull has timestamp {timestamp}, or it was waited for before.")

        def what() -> str:
            servers = sorted({self._requests[i].server for i in state.outstanding})
            return f"{' and '.join(servers)} to answer push or pull {timestamp}"

        self._link.wait(lambda: not state.outstanding, self._timeout, what)
        del self._timestamps[timestamp]
        if state.error:
            raise UsageError(state.error)

    # ---- inside

    def _new(self) -> int:
        timestamp = self._take_id()
        self._timestamps[timestamp] = _Timestamp()
        return timestamp

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _server(self, key: str) -> str:
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        return f"server-{number % self._servers}"

    def _submit(
        self,
        timestamp: int,
        server: str,
        body: KvPush | KvPull,
        frames: list[memoryview],
        out: Sequence[torch.Tensor] = (),
    ) -> None:
        with self._link.lock:
            self._requests[body.id] = _Request(server, body, frames, time.monotonic(), out)
            self._timestamps[timestamp].outstanding.add(body.id)
            self._owner[body.id] = timestamp
        self._link.send(Send(server, body, frames))

    def _on_message(self, sender: str, body: Body, frames: Frames) -> None:
        if isinstance(body, KvReply):
            request = self._requests.get(body.id)
            if request is not None and request.out:
                self._take_block(request, body, frames)
            elif request is not None:
                self._done(body.id)
        elif isinstance(body, Refused) and body.about.startswith("Kv"):
            self._done(int(body.about.partition(":")[2]), body.reason)
        else:
            self._before_message(sender, body, frames)

    def _take_block(self, request: _Request, body: KvReply, frames: Frames) -> None:
        """Store a block of a pull, unless a block of a newer version has come already."""
        request.sent_at = time.monotonic()
        if body.version < request.version:
            return
        if body.version > request.version:
            request.version, request.missing = body.version, set(range(len(request.out)))
        key, out = request.body.key, request.out[min(body.block, len(request.out) - 1)]
        if body.dtype != dtype_name(out.dtype):
            self._done(body.id, f"key '{key}' holds {body.dtype}, but was pulled into {dtype_name(out.dtype)}.")
            return
        try:
            out.copy_(from_frame(frames[0], body.dtype, out.numel(), f"key '{key}'"))
        except Exception as wrong:
            self._done(body.id, f"key '{key}' does not fit: {wrong}.")
            return
        request.missing.discard(body.block)
        if not request.missing:
            self._done(body.id)

    def _done(self, request_id: int, error: str = "") -> None:
        if self._requests.pop(request_id, None) is None:
            return
        self.answered += 1
        state = self._timestamps.get(self._owner.pop(request_id))
        if state is not None:
            state.outstanding.discard(request_id)
            state.error = state.error or error

    def _on_tick(self, now: float) -> list[Send]:
        again = [r for r in self._requests.values() if now >= r.sent_at + SEND_AGAIN_S]
        for request in again:
            request.sent_at = now
        return [*self._before_tick(now), *(Send(r.server, r.body, r.frames) for r in again)]
