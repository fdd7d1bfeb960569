"""A worker's reports to the coordinator, sent until they are acknowledged: metrics, and tensors for the model's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.commit import Metrics
from roundtable.common.protocol.messages.saving import MOST_RECOMPUTED, Recomputed
from roundtable.common.protocol.messages.setup import Accepted, Request
from roundtable.common.protocol.transport import Frames
from roundtable.common.storage.event_log import some
from roundtable.worker.client.io_thread import IoThread

#: Seconds after which a report is sent again.
_AGAIN_S = 1.0


@dataclass
class _Report:
    body: Body
    frames: Frames
    sent_at: float = 0.0


class ReportQueue:
    """Reports that the coordinator has not acknowledged. `tick` and `accepted` are called with the lock held."""

    def __init__(self, io: IoThread) -> None:
        self._io = io
        self._reports: dict[tuple[Request, int], _Report] = {}
        self._next = {Request.METRICS: 0, Request.RECOMPUTED: 0}

    def metrics(self, round_: int, numbers: dict[str, float]) -> None:
        """Report metrics that belong to no micro-batch."""
        self._add(Request.METRICS, Metrics(self._take_number(Request.METRICS), round_, numbers), ())
        self._io.heartbeat_soon()

    def recomputed(self, round_: int, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Report tensors that replace those in the model's file. `names` are theirs."""
        for start in range(0, len(names), MOST_RECOMPUTED):
            message = Recomputed(self._take_number(Request.RECOMPUTED), round_, names[start : start + MOST_RECOMPUTED])
            found = (tensors[name].detach().cpu() for name in message.names)
            copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in found]
            self._add(Request.RECOMPUTED, message, list(map(to_frame, copies)))
        if names:
            self._io.heartbeat_soon()

    def forget_recomputed(self) -> None:
        """Drop reports of tensors that were computed from earlier weights."""
        with self._io.lock:
            self._reports = {key: report for key, report in self._reports.items() if key[0] is not Request.RECOMPUTED}

    def _take_number(self, kind: Request) -> int:
        number = self._next[kind]
        self._next[kind] += 1
        return number

    def _add(self, kind: Request, body: Metrics | Recomputed, frames: Frames) -> None:
        with self._io.lock:
            self._reports[kind, body.id] = _Report(body, frames)

    def accepted(self, answer: Accepted) -> None:
        """Forget a report that the coordinator has acknowledged."""
        self._reports.pop((answer.request, answer.id), None)

    def has_all(self, kind: Request) -> bool:
        """Return whether the coordinator has all reports of a kind."""
        return all(known is not kind for known, _ in self._reports)

    def metrics_text(self) -> str:
        """Return in words which metrics are not acknowledged."""
        rounds = sorted({report.body.round for report in self._reports.values() if isinstance(report.body, Metrics)})
        return f"the metrics that were logged in round {some(list(map(str, rounds)))}"

    def tick(self, now: float) -> list[Send]:
        """Return the reports to send now."""
        due = [report for report in self._reports.values() if now > report.sent_at + _AGAIN_S]
        for report in due:
            report.sent_at = now
        return [Send(COORDINATOR, report.body, report.frames) for report in due]
