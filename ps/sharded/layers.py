"""All sharded layers on one server. The server keeps some rows of each layer and answers workers' questions about them.

If servers apply once per round, a server keeps a round's contributions until a worker asks about the next round. A worker does so
only when every server has closed the round. Until then another server may lack a micro-batch, and a worker may compute that
micro-batch again from the same rows. So rows can be updated in place, without a second copy.

If servers apply each push at once, the update for a push waits for all earlier questions and pushes. The gradient is computed at
the rows as they are at that moment. If this server's rows have changed since the worker's question, the server computes their
part of log Σ exp(z) again (`renewed`). So no p is above 1. The other servers' parts stay as they were when the worker asked.

Long work is a job. A job does one tile of rows at a time, so that the server can send heartbeats in between. Jobs run in the
order in which they were added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from roundtable.common.model.layout import Layout
from roundtable.common.model.row_pages import pages
from roundtable.common.model.sparse_rows import cut, join
from roundtable.common.protocol.messages.replication import ReplicateLayers
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.clipping import Norm
from roundtable.ps.params.planned_rates import of_group
from roundtable.ps.params.state_part import Part
from roundtable.ps.sharded.contributions import ClosedRound, LayerContribution, OpenQuestion, replicated, tensors_of
from roundtable.ps.sharded.jobs import JobQueue
from roundtable.ps.sharded.layer import CPU, Job, LayerShard
from roundtable.ps.sharded.questions import Answer, QuestionCache, read_replicated

#: Prefix of the names of the pending round's tensors in a shard's state.
_PENDING = "pending"


class LayerShards:
    """All sharded layers on one server: questions about them, and contributions to them.

    With `keeps_versions`, a question is answered from exactly the version that it names. The update after a round begins only
    when a worker asks about the next round. Without `keeps_versions`, an answer reflects exactly the updates that were accepted
    before the question.
    """

    def __init__(
        self,
        layout: Layout,
        server: int,
        update: Update,
        seed: int,
        keeps_versions: bool = True,
        device: torch.device = CPU,
    ) -> None:
        self._server = server
        self._keeps_versions = keeps_versions
        #: The number of the first layer among norms, which count tensors and tables first.
        self._first_norm = len(layout.tensors) + len(layout.tables)
        self._specs = layout.sharded_layers
        self._layers = [LayerShard(spec, server, layout.servers, update, seed, device) for spec in layout.sharded_layers]
        self._questions = QuestionCache(self._layers, keeps_versions)
        self._jobs = JobQueue()
        #: Rounds closed here. If each push is applied at once: contributions accepted.
        self._closed = 0
        #: The last closed round, if its update has not begun.
        self._pending: ClosedRound | None = None
        #: The round whose norms were asked for last, and the norms once they are known.
        self._norms: tuple[int, list[Norm] | None] = -1, None

    def __bool__(self) -> bool:
        return bool(self._layers)

    # ---- first values

    def awaited(self) -> set[tuple[int, int]]:
        """Return (layer, page) of the first values that a worker has to send."""
        return {(number, page) for number, spec in enumerate(self._specs) if spec.std is None for page in pages(spec)}

    def load(self, layer: int, page: int, frames: Frames) -> None:
        """Load the first values of a page, which must be one of `awaited`. Raises WireError if they do not fit."""
        one = self._layers[layer]
        at = one.on_page(page)
        one.load(at, join(iter(frames), "float32", len(at) * one.spec.dim, f"page {page}").view(len(at), one.spec.dim))

    # ---- questions

    def ask(self, sender: str, ask: ShardedForward, frames: Frames) -> Answer | None:
        """Take a question. Return its answer if it is known already, else None: `work` returns the answer later.

        Raises WireError if the question makes no sense.
        """
        if not 0 <= ask.layer < len(self._layers):
            raise WireError(f"there is no sharded layer {ask.layer}")
        known = self._questions.of(sender)
        if ask.number == known.newest:
            return known.answer
        if ask.number < known.newest or (self._keeps_versions and ask.version > self._closed):
            return None
        one = self._layers[ask.layer]
        parts, what = iter(frames), f"a question of {sender}"
        if ask.back_through >= 0:
            back = self._questions.back(ask, one, known.kept.get(ask.back_through), parts, what)
        else:
            features, labels = self._questions.read(one.spec, ask, parts, what)
        if next(parts, None) is not None:
            raise WireError(f"{what} has too many frames")
        if ask.back_through >= 0:
            if back is None:
                known.newest, known.answer = ask.number, (ShardedForwardReply(ask.number, gone=True), [])
                return known.answer
            known.kept[ask.number] = back
            assert back.slopes is not None
            job = one.back_through(back.slopes, ask)
        elif one.spec.hidden:
            samples = one.samples(features, labels)
            if ask.keeps:
                known.kept[ask.number] = OpenQuestion(ask.version, ask.layer, samples)
            job = one.outputs(samples.features, ask)
        elif ask.top:
            ones = [features.new_ones(ask.count, 1)] * one.spec.bias
            job = one.best(torch.cat([features, *ones], 1), ask)
        else:
            samples = one.samples(features, labels)
            kept = OpenQuestion(ask.version, ask.layer, samples, ask.normalised) if ask.keeps else None
            job = one.sums(samples, ask, kept)
            if kept is not None:
                known.kept[ask.number] = kept
        known.newest, known.answer = ask.number, None
        if not self._keeps_versions:
            pass  # the job reads the rows as they are when its turn comes
        elif ask.version == self._closed:
            self.begin_update()
        elif ask.keeps and (ask.version < self._closed - 1 or self._pending is None):
            known.answer = ShardedForwardReply(ask.number, gone=True), []
            return known.answer
        self._jobs.answer(job, sender)
        return None

    def page(self, layer: int, page: int) -> list[torch.Tensor]:
        """Return this server's current rows of a page, (N, D). If the layer has a bias, return the biases (N, 1) as well."""
        one = self._layers[layer]
        rows = one.read(one.on_page(page)).cpu()
        features = one.spec.dim - one.spec.bias
        return [rows[:, :features].contiguous(), *([rows[:, features:].contiguous()] if one.spec.bias else [])]

    # ---- contributions

    def norms(self, parts: Sequence[LayerContribution], weight: float) -> list[Norm] | None:
        """Return the norms of the open round's mean gradient over this server's rows. `parts` and `weight` are as in `close`.

        The first call adds a job and returns None. Later calls return None until `work` has done the job.
        """
        if self._norms[0] != self._closed:
            self._norms = self._closed, None
            self.begin_update()
            self._jobs.measure(self._measure(parts, weight))
        return self._norms[1]

    def _measure(self, parts: Sequence[LayerContribution], weight: float) -> Job:
        norms = []
        for number, one in enumerate(self._layers):
            if mine := [part for part in parts if part.layer == number]:
                norm = yield from one.norm(mine, self._closed, weight)
                norms.append((self._first_norm + number, self._server, norm))
        self._norms = self._closed, norms

    @property
    def measured(self) -> bool:
        """Return True if the norms of the open round are known."""
        return self._norms[0] == self._closed and self._norms[1] is not None

    def close(
        self,
        parts: Sequence[LayerContribution],
        weight: float,
        hypers: Sequence[Mapping[str, Any]],
        factor: torch.Tensor | None = None,
    ) -> None:
        """Close the round. Its update is pending from now on.

        `parts` are all contributions that count, in the order of the micro-batches, of weight `weight`. `factor` is the
        clipping factor.
        """
        self.begin_update()  # the round before is still pending if no worker asked anything in this round
        self._pending = ClosedRound(self._closed, parts, weight, hypers, factor)
        self._closed += 1
        self.forget_before(self._closed)

    def apply(
        self, parts: Sequence[LayerContribution], round_: int, weight: float, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> None:
        """Add an update for one contribution, `parts`, of weight `weight`. `lr_scale` multiplies the learning rate."""
        self._jobs.update(self._apply(parts, round_, weight, hypers, lr_scale))
        self._closed += 1

    def _apply(
        self, parts: Sequence[LayerContribution], round_: int, weight: float, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> Job:
        now = []
        for part in parts:
            now.append((yield from self._layers[part.layer].present(part)))
        yield from self._update(ClosedRound(round_, now, weight, hypers, None), lr_scale)

    def _update(self, closed: ClosedRound, lr_scale: float = 1.0) -> Job:
        for number, one in enumerate(self._layers):
            if mine := [part for part in closed.parts if part.layer == number]:
                settings = of_group(closed.hypers, one.spec.group)
                yield from one.update(mine, closed.round, closed.weight, settings, closed.factor, lr_scale)

    def begin_update(self) -> None:
        """Add the pending update to the jobs. Call this only when all servers have closed the pending round."""
        if self._pending is not None:
            self._jobs.update(self._update(self._pending))
            self._pending = None

    # ---- jobs

    @property
    def busy(self) -> bool:
        """Return True if `work` has something to do."""
        return self._jobs.busy

    @property
    def steps(self) -> int:
        """Return how many tiles were done so far."""
        return self._jobs.steps

    def work(self) -> tuple[str, Answer] | None:
        """Do the next tile. If that completes an answer, return the worker and the answer."""
        return self._step() if self._jobs.busy else None

    def _step(self) -> tuple[str, Answer] | None:
        done = self._jobs.step()
        if done is None:
            return None
        asker, answer = done
        self._questions.answered(asker, answer)
        return asker, answer

    def forget(self, sender: str) -> None:
        """Forget the questions of a lost worker."""
        self._questions.forget(sender)

    def forget_before(self, round_: int) -> None:
        """Forget questions of rounds before `round_`. Workers contribute nothing more to those rounds."""
        self._questions.forget_before(round_)

    def receive(self, sender: str, push: LayerPush, frames: Frames) -> list[LayerContribution]:
        """Return the contributions in a push. Raises WireError if the push does not fit."""
        return self._questions.receive(sender, push, frames)

    def let_update(self, may_update: Callable[[], bool]) -> None:
        """Set the condition for updates: rows change only while `may_update` returns True."""
        self._jobs.may_update = may_update

    # ---- copies on other servers

    def received(self, told: ReplicateLayers, frames: Frames, what: str) -> list[LayerContribution]:
        """Return the contributions of a round that another server sent. Raises WireError, with `what`, if they do not fit."""
        return read_replicated(self._layers, told, frames, what)

    @property
    def is_between_rounds(self) -> bool:
        """Return True if no update is queued or in progress. Then all rows have the same version."""
        return not self._jobs.updates

    @property
    def pending(self) -> ReplicateLayers | None:
        """Return the message about the last closed round if its update has not begun, else None."""
        last = self._pending
        return None if last is None else replicated(last.round, last.parts, last.weight, last.hypers, last.factor)

    def parts(self) -> Iterator[Part]:
        """Return the tensors of the pending round and the rows of all layers (see `Rows.parts`)."""
        tensors = tensors_of(self._pending.parts) if self._pending is not None else []
        pending = (Part(f"{_PENDING}/{number}", tensor) for number, tensor in enumerate(tensors))
        return itertools.chain(pending, *(one.parts() for one in self._layers))

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        """Store received rows. Return False if no layer has a tensor of this name (see `Rows.put`)."""
        return any(name.endswith(f"/{one.spec.name}") and one.put(name, first, rows) for one in self._layers)

    def arrived(
        self,
        files: TensorFiles,
        version: int,
        pending: ReplicateLayers | None,
        factor: Callable[[float | None], torch.Tensor | None],
    ) -> None:
        """Continue at round `version` from the tensors that `parts` gave. `factor` makes a tensor of a clipping factor.

        Raises WireError if the pending round does not fit.
        """
        self._closed = version
        for one in self._layers:
            one.arrived(files)
        if pending is not None:
            names = itertools.takewhile(files.__contains__, (f"{_PENDING}/{number}" for number in itertools.count()))
            frames = [frame for name in names for frame in cut(files[name])]
            parts = self.received(pending, frames, "the last round of a shard")
            clipping = factor(pending.factor)
            self._pending = ClosedRound(pending.round, parts, pending.weight, pending.hypers, clipping)

    # ---- saving

    @property
    def accepted(self) -> int:
        """Return the number of rounds closed here or, if each push is applied at once, of contributions accepted."""
        return self._closed

    @property
    def version(self) -> int:
        """Return how many of `accepted` have their updates done."""
        return self._closed - (self._pending is not None) - self._jobs.updates

    def finish_updates(self, version: int | None = None) -> None:
        """Do the updates up to `version`, by default all. Call this only when all servers have closed that round."""
        self.begin_update()
        while self.version < (self._closed if version is None else version):
            self._step()  # an answer that this completes is not sent; its worker asks again

    def state(self) -> Iterator[Entry]:
        """Return the checkpoint's tensors of all layers, as of `version` (see `Rows.state`)."""
        return itertools.chain.from_iterable(one.state() for one in self._layers)

    def restore(self, files: TensorFiles, servers: int, version: int) -> None:
        """Add jobs that load a checkpoint of `servers` servers, and continue at round `version`. Later jobs wait for them.

        Raises KeyError if a tensor is missing.
        """
        self._closed = version
        for one in self._layers:
            job = one.restore(files, servers)
            next(job, None)  # a missing tensor raises now
            self._jobs.update(job)
