"""Simulated workers: many in one process. Each has its own sockets, speaks the protocol of real workers, and computes nothing.

`benchmarks.connections` starts `python -m benchmarks.simulated JOB`, which needs no torch. A worker joins and sets up. In each
round it sends a gradient of random numbers for every micro-batch of its share or reassigned to it. While it waits, it asks for
more.
"""

from __future__ import annotations

import array
import itertools
import json
import random
import select
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from roundtable.common.config.batch_plan import Segment, make_segment
from roundtable.common.model.layout import make_layout
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, VersionExpired, Weights
from roundtable.common.protocol.messages.session import (
    Goodbye,
    Heartbeat,
    Hello,
    MembershipUpdate,
    Reassign,
    Refused,
    RequestWork,
    Stop,
)
from roundtable.common.protocol.messages.setup import Accepted, InFile, InitialWeights, Plan, PlanReply, Setup, SetupReply, Update
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.session import Session
from roundtable.common.protocol.transport import (
    ASK_AGAIN_S,
    PATIENCE_BY_WORKER_S,
    SEND_AGAIN_S,
    Frames,
    Stamp,
    allow_files,
    dealer,
    is_bulk,
    new_incarnation,
    receive,
    send,
)
from roundtable.common.runtime.errors import ClusterError, PsError, WireError
from roundtable.worker.loop.task_queue import TaskQueue

COORDINATOR, SERVER = "coordinator", "server-0"
#: The second socket to the server, for tensors.
_BULK = "server-0/bulk"
#: The fewest seconds that a real worker waits for weights before it asks for more to do.
_PATIENCE_S = 0.05
#: Seconds between two looks at the clock.
_TICK_S = 0.02
#: A worker's reported speed: seconds a micro-batch, and samples a second. All report the same, so that shares do not change.
_SECONDS, _RATE = 0.01, 100.0
#: Sockets of a worker.
_SOCKETS = 3
#: Open files of a worker: the connection of each socket, and the file by which ZeroMQ wakes its reader.
FILES_PER_WORKER = 2 * _SOCKETS


class Job(msgspec.Struct, frozen=True):
    """Workers `first` .. `first + count - 1` of a run of `workers`, for `rounds` rounds. The model has `values` weights."""

    coordinator: str
    first: int
    count: int
    workers: int
    rounds: int
    values: int
    timeout: float
    out: str

    @property
    def segment(self) -> Segment:
        """Return the segment: one micro-batch of one sample for each worker and round."""
        samples, whole = self.workers * self.rounds, self.workers
        return make_segment(before=None, samples=samples, global_batch=whole, micro_batch=1, epochs=1, round_limit=None)


class _Question(msgspec.Struct, frozen=True):
    """A request that is sent every `again_s` seconds until a message comes for which `answers` is true."""

    to: str
    body: Body
    answers: Callable[[Body], bool]
    frames: Frames = ()
    again_s: float = ASK_AGAIN_S


class _Worker:
    """One worker. `tick` does what is due, and `handle` takes a message. `_live` yields the worker's questions one by one."""

    def __init__(self, context: zmq.Context[Any], job: Job, index: int, gradient: bytes, now: float) -> None:
        self.job = job
        self.index = index
        self.sockets = {COORDINATOR: dealer(context, job.coordinator)}
        self.attendance = Session(Hello("worker", index), job.coordinator, now)
        #: Round -> the time when the weights for it had arrived.
        self.done_at: dict[int, float] = {}
        self._context = context
        self._stamp = Stamp(sender="worker", incarnation=new_incarnation())
        self._ticket = 0
        self._gradient = gradient
        self._patience_s = max(_PATIENCE_S, PATIENCE_BY_WORKER_S * job.workers)
        self._tasks = TaskQueue("", [])
        self._life = self._live()
        self._question: _Question | None = None
        self._asked_at = self._patient_until = now
        #: (round, micro-batch) -> a push that is not acknowledged, and the time when it was sent.
        self._outstanding: dict[tuple[int, int], tuple[Push, float]] = {}

    def _live(self) -> Generator[_Question, Body | None, None]:
        """Yield a worker's questions in its order. Each `send` brings the answer."""
        job, segment = self.job, self.job.segment
        file = [InFile("w", "F32", [job.values], [0], True)]
        setup = Setup([TensorSpec("w", [job.values], "float32", 0)], Update("SGD", [{"lr": 1e-3}]), file=file)
        chunks = [chunk.id for chunk in make_layout(setup.tensors, 1).chunks]
        for to in (COORDINATOR, SERVER):
            yield _Question(to, setup, _is(SetupReply))
        if self.index == 0:
            yield _Question(SERVER, InitialWeights(chunks), _is(Accepted), [self._gradient])
        ready = yield _Question(COORDINATOR, Plan(segment), _is(PlanReply))
        yield _Question(SERVER, Plan(segment, ready.seal if isinstance(ready, PlanReply) else 0), _is(PlanReply))
        round_ = 0
        for number in itertools.count(1):
            answer = yield _Question(SERVER, Pull(round_, number), _weights(round_), again_s=SEND_AGAIN_S)
            if isinstance(answer, VersionExpired):  # other workers have done this one's share
                round_ = answer.newest
                continue
            self.done_at[round_] = time.monotonic()
            if round_ == job.rounds:
                break
            self._tasks.open(round_, segment.round(round_).micro_batches)
            self._compute()
            round_ += 1
        while True:
            yield _Question(COORDINATOR, Goodbye(round=job.rounds), lambda body: isinstance(body, Stop))

    def _compute(self) -> None:
        """Push a gradient for each micro-batch that there is to compute."""
        while (task := self._tasks.next()) is not None:
            metrics = {"loss": (random.random(), 1.0)}
            push = Push(task.round, task.k, task.k + 1, 1, 1, [0], [1], metrics=metrics)
            self._outstanding[task.round, task.k] = push, time.monotonic()
            self._send(SERVER, push, [self._gradient])

    def _send(self, to: str, body: Body, frames: Frames = ()) -> None:
        bulk = to == SERVER and is_bulk(body, frames)
        header = self._stamp.encode(body, self._ticket if to == SERVER else None)
        send(self.sockets[_BULK if bulk else to], header, frames, copy=True)

    def tick(self, now: float) -> None:
        for body in self.attendance.tick(now, self._heartbeat):
            self._send(COORDINATOR, body)
        for key, (push, sent_at) in self._outstanding.items():
            if now >= sent_at + SEND_AGAIN_S:
                self._outstanding[key] = push, now
                self._send(SERVER, push, [self._gradient])
        if self._question is not None and now >= self._asked_at + self._question.again_s:
            self._ask(now)
        if self._waits and now >= self._patient_until:
            self._patient_until = now + self._patience_s
            self._send(COORDINATOR, RequestWork(self._tasks.round))

    @property
    def _waits(self) -> bool:
        """Return whether the worker has done its share of a round and waits for the weights after it."""
        return self._question is not None and isinstance(self._question.body, Pull) and self._tasks.round >= 0

    def _heartbeat(self) -> Heartbeat:
        sent = [k for round_, k in self._outstanding if round_ == self._tasks.round]
        return Heartbeat("waiting", self._tasks.round, -1, self._tasks.left(self._tasks.round), sent, _SECONDS, _RATE)

    def handle(self, name: str, header: Any) -> None:
        """Take a message. Raises PsError if the run has failed or this worker is refused."""
        body = self._stamp.open(header).read()
        now = time.monotonic()
        if name == COORDINATOR:
            self.attendance.handle(body, now)
        match body:
            case Ack():
                self._outstanding.pop((body.round, body.lo), None)
            case MembershipUpdate():
                self._tasks.tables = body.share_tables
            case Reassign():
                self._tasks.reassigned(body)
                self._compute()
            case Refused():
                raise ClusterError(f"{name}: {body.reason}")
            case Stop() if not body.ok:
                raise ClusterError(f"stopped because {body.reason}")
        if self._question is None:
            self._begin(now)
        elif self._question.answers(body):
            self._go_on(body, now)

    def _begin(self, now: float) -> None:
        welcome = self.attendance.welcome
        if welcome is not None:
            self._stamp.sender, self._stamp.run, self._ticket = welcome.process, welcome.run, welcome.ticket
            self._tasks = TaskQueue(welcome.process, welcome.share_tables)
            for name in (SERVER, _BULK):
                sock = self.sockets[name] = dealer(self._context, welcome.servers[0].address)
                send(sock, self._stamp.encode(Heartbeat(), self._ticket), copy=True)  # tells the server whose connection this is
            self._go_on(None, now)

    def _go_on(self, answer: Body | None, now: float) -> None:
        self._question = self._life.send(answer)
        self._patient_until = now + self._patience_s
        self._ask(now)
        if self._waits and self.attendance.heartbeat_soon(now):
            self.tick(now)

    def _ask(self, now: float) -> None:
        assert self._question is not None
        self._asked_at = now
        self._send(self._question.to, self._question.body, self._question.frames)


def _is(kind: type[Body]) -> Callable[[Body], bool]:
    return lambda body: isinstance(body, kind)


def _weights(clock: int) -> Callable[[Body], bool]:
    return lambda body: isinstance(body, Weights | VersionExpired) and body.for_round == clock


def run(job: Job) -> None:
    """Run these workers until the run ends. Write for each round when the last of them had the weights after it.

    Raises PsError if the run fails, or lasts for longer than the job's timeout.
    """
    allow_files(FILES_PER_WORKER * job.count)
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, _SOCKETS * job.count + 1)
    gradient = array.array("f", (random.gauss(0.0, 1.0) for _ in range(job.values))).tobytes()
    start = time.monotonic()
    workers = [_Worker(context, job, job.first + i, gradient, start) for i in range(job.count)]
    try:
        _loop(workers, start + job.timeout)
    finally:
        context.destroy(linger=0)
    last = [max(worker.done_at.get(round_, 0.0) for worker in workers) for round_ in range(job.rounds + 1)]
    Path(job.out).write_text(json.dumps(last), encoding="utf-8")


def _loop(workers: list[_Worker], deadline: float) -> None:
    """Run the workers until each was told to stop.

    ZeroMQ's own poller looks at every socket each time. epoll reports only sockets with messages. A socket's file reports
    messages only once, so the loop reads the socket until it is empty, and again after it was used.
    """
    epoll = select.epoll()
    by_file: dict[int, tuple[_Worker, str]] = {}
    ticked_at = float("-inf")
    while going := [worker for worker in workers if worker.attendance.stop is None]:
        files = {file for file, _ in epoll.poll(_TICK_S)}
        now = time.monotonic()
        if now >= ticked_at + _TICK_S:
            ticked_at = now
            for worker in going:
                worker.tick(now)
            files = set(by_file)
        if now > deadline:
            raise ClusterError(f"{len(going)} simulated workers have not ended in time.")
        for worker in going if len(by_file) < _SOCKETS * len(workers) else ():
            for name, sock in worker.sockets.items():
                if (file := sock.fileno()) not in by_file:
                    by_file[file] = worker, name
                    epoll.register(file, select.EPOLLIN | select.EPOLLET)
        while files:
            used: set[int] = set()
            for file in files:
                worker, name = by_file[file]
                while (frames := receive(worker.sockets[name])) is not None:
                    worker.handle(name, frames[0].buffer)
                    used.update(sock.fileno() for sock in worker.sockets.values())
            files = used & by_file.keys()


if __name__ == "__main__":
    from roundtable.cluster.run.exit_codes import report

    try:
        run(msgspec.json.decode(sys.argv[1], type=Job))
    except (PsError, WireError) as error:
        report(type(error), error, error.__traceback__)
        sys.exit(1)
