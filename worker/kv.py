"""The key-value client: named tensors on the servers, for those who write their own loop.

The interface is that of Li et al., "Scaling distributed machine learning with the parameter server" (OSDI 2014): `push` and
`pull` return at once with a timestamp, and `wait` blocks until what it stands for is done.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from common.allocator import keep_memory
from common.errors import UsageError
from common.layout import CHUNK_BYTES
from common.messages import Body, KvPull, KvPush, KvReply, Refused
from common.tensors import dtype_name, from_frame, to_frame
from common.wire import SEND_AGAIN_S, Frames
from worker.exchange import Send
from worker.link import Link


@dataclass
class _Request:
    """One block's message, until it is answered."""

    server: str
    body: KvPush | KvPull
    frames: list[memoryview]
    sent_at: float
    #: Where a pulled block goes.
    out: torch.Tensor | None = None


@dataclass
class _Timestamp:
    """What one push or pull still waits for."""

    outstanding: set[int] = field(default_factory=set)
    error: str = ""


class KvClient:
    """Pushes to and pulls from keys. A push counts once, whatever is lost or repeated on the way.

    Tensors are cut into blocks of a chunk's size, spread over the servers. Pushes by one worker to one key are applied in
    order; those of several workers in any order, so `add` sums are exact only up to rounding.
    """

    def __init__(self, link: Link, servers: int, timeout: float) -> None:
        self._link = link
        self._servers = servers
        self._timeout = timeout
        self._next_id = 0
        self._requests: dict[int, _Request] = {}
        self._timestamps: dict[int, _Timestamp] = {}
        self._owner: dict[int, int] = {}
        #: Answers so far, by which the coordinator sees that something moves.
        self.answered = 0
        keep_memory()
        with link.lock:
            self._before_message: Callable[[str, Body, Frames], None] = link.on_message
            self._before_tick: Callable[[float], list[Send]] = link.on_tick
            link.on_message, link.on_tick = self._on_message, self._on_tick

    def push(self, key: str, tensor: torch.Tensor, op: Literal["add", "set"] = "add") -> int:
        """Add `tensor` to the value of `key`, or set it; a new key starts from the first push. Returns a timestamp.

        The values are copied before this returns.
        """
        values = tensor.detach().to("cpu").reshape(-1)
        step = CHUNK_BYTES // values.element_size()
        timestamp = self._new()
        for block, part in enumerate(values.split(step)):  # one is on its way while the next is copied
            body = KvPush(self._take_id(), key, block, values.numel(), dtype_name(values.dtype), op)
            self._submit(timestamp, self._server(key, block), body, [to_frame(part.clone())], None)
        return timestamp

    def pull(self, key: str, out: torch.Tensor) -> int:
        """Read the value of `key` into `out` (contiguous, on the CPU), which is filled when `wait` returns. Returns a
        timestamp."""
        if not out.is_contiguous() or out.device.type != "cpu":
            raise UsageError(f"the tensor to pull key '{key}' into must be contiguous and on the CPU.")
        flat = out.detach().view(-1)
        timestamp = self._new()
        for block, part in enumerate(flat.split(CHUNK_BYTES // flat.element_size())):
            body = KvPull(self._take_id(), key, block, flat.numel())
            self._submit(timestamp, self._server(key, block), body, [], part)
        return timestamp

    def wait(self, timestamp: int) -> None:
        """Block until the push or pull with this timestamp is done.

        Raises UsageError where it cannot be (no such key, another size), ClusterError after the run's time-out.
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

    def _server(self, key: str, block: int) -> str:
        start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        return f"server-{(start + block) % self._servers}"

    def _submit(
        self, timestamp: int, server: str, body: KvPush | KvPull, frames: list[memoryview], out: torch.Tensor | None
    ) -> None:
        with self._link.lock:
            self._requests[body.id] = _Request(server, body, frames, time.monotonic(), out)
            self._timestamps[timestamp].outstanding.add(body.id)
            self._owner[body.id] = timestamp
        self._link.send(Send(server, body, frames))

    def _on_message(self, sender: str, body: Body, frames: Frames) -> None:
        if isinstance(body, KvReply):
            self._done(body.id, "", frames, body.dtype)
        elif isinstance(body, Refused) and body.about.startswith("Kv"):
            self._done(int(body.about.partition(":")[2]), body.reason, (), "")
        else:
            self._before_message(sender, body, frames)

    def _done(self, request_id: int, error: str, frames: Frames, dtype: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.answered += 1
        state = self._timestamps.get(self._owner.pop(request_id))
        if not error and request.out is not None:
            key = request.body.key
            if dtype != dtype_name(request.out.dtype):
                error = f"key '{key}' holds {dtype}, but was pulled into {dtype_name(request.out.dtype)}."
            else:
                try:
                    request.out.copy_(from_frame(frames[0], dtype, request.out.numel(), f"key '{key}'"))
                except Exception as wrong:
                    error = f"key '{key}' does not fit: {wrong}."
        if state is not None:
            state.outstanding.discard(request_id)
            if error and (not state.error or request.body.block == 0):  # the first block is there if the key is
                state.error = error

    def _on_tick(self, now: float) -> list[Send]:
        again = [r for r in self._requests.values() if now >= r.sent_at + SEND_AGAIN_S]
        for request in again:
            request.sent_at = now
        return [*self._before_tick(now), *(Send(r.server, r.body, r.frames) for r in again)]
