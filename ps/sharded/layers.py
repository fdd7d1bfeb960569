"""Layers too large to move: a server keeps some rows of each, and computes with all of these for whoever
asks.

A round's contributions are kept until somebody asks about the next round. Workers go there only when every server has closed
the round before, so nobody can need its rows any more: a micro-batch that another server still lacks is computed again from the
rows that it would have been computed from at first, and rows are updated in place, with no second copy of them.

Where each contribution is applied on its own, its turn comes after whatever was asked or contributed before, and it is applied to
the rows as they are then. That is the gradient at these rows, if the other servers' classes came to what they did when the worker
asked: what this server's come to is computed anew where they have moved since (`renewed`), so that no p is above 1.

Whatever takes time is a job that goes a tile of rows at a time, so that a server gives signs of life meanwhile. Jobs are done in
the order in which they came up.
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

#: What the tensors of a round that is forwarded are called in a state.
_PENDING = "pending"


class LayerShards:
    """All sharded layers on one server: questions about them, and contributions to them.

    With `keeps_versions`, a question is answered from the version that it names and no other. The update after a round begins
    only when somebody asks about the next round. Without `keeps_versions`, an answer has whole updates: all that were accepted
    before the question, and no others.
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
        #: What the first layer is called among norms: there are those of tensors and of tables before.
        self._first_norm = len(layout.tensors) + len(layout.tables)
        self._specs = layout.sharded_layers
        self._layers = [LayerShard(spec, server, layout.servers, update, seed, device) for spec in layout.sharded_layers]
        self._questions = QuestionCache(self._layers, keeps_versions)
        self._jobs = JobQueue()
        #: Rounds closed here, or contributions accepted; and the update after the last round, unless it is begun.
        self._closed = 0
        self._pending: ClosedRound | None = None
        #: Norms of the gradient of the round that is still open, once they are known, and that round.
        self._norms: tuple[int, list[Norm] | None] = -1, None

    def __bool__(self) -> bool:
        return bool(self._layers)

    # ---- first values

    def awaited(self) -> set[tuple[int, int]]:
        """(layer, page) of first values that a worker is to send."""
        return {(number, page) for number, spec in enumerate(self._specs) if spec.std is None for page in pages(spec)}

    def load(self, layer: int, page: int, frames: Frames) -> None:
        """First values of a page. Raises WireError where they do not fit; the page must be one of `awaited`."""
        one = self._layers[layer]
        at = one.on_page(page)
        one.load(at, join(iter(frames), "float32", len(at) * one.spec.dim, f"page {page}").view(len(at), one.spec.dim))

    # ---- questions

    def ask(self, sender: str, ask: ShardedForward, frames: Frames) -> Answer | None:
        """A question. The answer comes from `work`, unless it is known now. Raises WireError where it cannot be meant."""
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
            pass  # the rows are what they are when its turn comes
        elif ask.version == self._closed:
            self.begin_update()
        elif ask.keeps and (ask.version < self._closed - 1 or self._pending is None):
            known.answer = ShardedForwardReply(ask.number, gone=True), []
            return known.answer
        self._jobs.answer(job, sender)
        return None

    def page(self, layer: int, page: int) -> list[torch.Tensor]:
        """This server's rows of a page as they are now, (N, D), and where there is one, the biases (N, 1) apart."""
        one = self._layers[layer]
        rows = one.read(one.on_page(page)).cpu()
        features = one.spec.dim - one.spec.bias
        return [rows[:, :features].contiguous(), *([rows[:, features:].contiguous()] if one.spec.bias else [])]

    # ---- contributions

    def norms(self, parts: Sequence[LayerContribution], samples: int) -> list[Norm] | None:
        """The norms of the round's mean gradient, over the rows here; `parts` as in `close`. None until `work` has gone through
        the rows for them, which is begun by the first call."""
        if self._norms[0] != self._closed:
            self._norms = self._closed, None
            self.begin_update()
            self._jobs.measure(self._measure(parts, samples))
        return self._norms[1]

    def _measure(self, parts: Sequence[LayerContribution], samples: int) -> Job:
        norms = []
        for number, one in enumerate(self._layers):
            if mine := [part for part in parts if part.layer == number]:
                norm = yield from one.norm(mine, self._closed, samples)
                norms.append((self._first_norm + number, self._server, norm))
        self._norms = self._closed, norms

    @property
    def measured(self) -> bool:
        """Whether the norms that were asked for are known."""
        return self._norms[0] == self._closed and self._norms[1] is not None

    def close(
        self,
        parts: Sequence[LayerContribution],
        samples: int,
        hypers: Sequence[Mapping[str, Any]],
        factor: torch.Tensor | None = None,
    ) -> None:
        """The round is complete: `parts` are all that count, in order of the micro-batches, of `samples` samples; `factor` is the
        clipping."""
        self.begin_update()  # it is there still if nobody asked anything in this round
        self._pending = ClosedRound(self._closed, parts, samples, hypers, factor)
        self._closed += 1
        self.forget_before(self._closed)

    def apply(
        self, parts: Sequence[LayerContribution], round_: int, samples: int, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> None:
        """Have an update of its own, whose learning rate is multiplied by `lr_scale`, for the contribution `parts` of `samples`
        samples to a round."""
        self._jobs.update(self._apply(parts, round_, samples, hypers, lr_scale))
        self._closed += 1

    def _apply(
        self, parts: Sequence[LayerContribution], round_: int, samples: int, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> Job:
        now = []
        for part in parts:
            now.append((yield from self._layers[part.layer].present(part)))
        yield from self._update(ClosedRound(round_, now, samples, hypers, None), lr_scale)

    def _update(self, closed: ClosedRound, lr_scale: float = 1.0) -> Job:
        for number, one in enumerate(self._layers):
            if mine := [part for part in closed.parts if part.layer == number]:
                settings = of_group(closed.hypers, one.spec.group)
                yield from one.update(mine, closed.round, closed.samples, settings, closed.factor, lr_scale)

    def begin_update(self) -> None:
        """Have the update after the last round done soon. Only when all servers have closed that round."""
        if self._pending is not None:
            self._jobs.update(self._update(self._pending))
            self._pending = None

    # ---- jobs

    @property
    def busy(self) -> bool:
        """Return True if there is something to do."""
        return self._jobs.busy

    @property
    def steps(self) -> int:
        """Return how many tiles were done so far."""
        return self._jobs.steps

    def work(self) -> tuple[str, Answer] | None:
        """Do the next tile. Returns the worker and the answer, if that was the last tile of an answer."""
        return self._step() if self._jobs.busy else None

    def _step(self) -> tuple[str, Answer] | None:
        done = self._jobs.step()
        if done is None:
            return None
        asker, answer = done
        self._questions.answered(asker, answer)
        return asker, answer

    def forget(self, sender: str) -> None:
        """Let go of a lost worker."""
        self._questions.forget(sender)

    def forget_before(self, round_: int) -> None:
        """Let go of questions of rounds before this one: nothing more will be contributed to them."""
        self._questions.forget_before(round_)

    def receive(self, sender: str, push: LayerPush, frames: Frames) -> list[LayerContribution]:
        """Return a contribution. Raises WireError if it does not fit."""
        return self._questions.receive(sender, push, frames)

    def let_update(self, may_update: Callable[[], bool]) -> None:
        """Have rows change only while `may_update` returns True."""
        self._jobs.may_update = may_update

    # ---- copies on other servers

    def received(self, told: ReplicateLayers, frames: Frames, what: str) -> list[LayerContribution]:
        """Return what a round contributes to all layers. Raises WireError naming `what` if it does not fit."""
        return read_replicated(self._layers, told, frames, what)

    @property
    def is_between_rounds(self) -> bool:
        """Whether no update is under way, so that rows are those after some round."""
        return not self._jobs.updates

    @property
    def pending(self) -> ReplicateLayers | None:
        """The last round, if the update after it is not begun."""
        last = self._pending
        return None if last is None else replicated(last.round, last.parts, last.samples, last.hypers, last.factor)

    def parts(self) -> Iterator[Part]:
        """See LayerShard.parts; and what `pending` tells of."""
        tensors = tensors_of(self._pending.parts) if self._pending is not None else []
        pending = (Part(f"{_PENDING}/{number}", tensor) for number, tensor in enumerate(tensors))
        return itertools.chain(pending, *(one.parts() for one in self._layers))

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        """See LayerShard.put."""
        return any(name.endswith(f"/{one.spec.name}") and one.put(name, first, rows) for one in self._layers)

    def arrived(
        self,
        files: TensorFiles,
        version: int,
        pending: ReplicateLayers | None,
        factor: Callable[[float | None], torch.Tensor | None],
    ) -> None:
        """Go on at round `version` from what `parts` gave; see LayerShard.arrived."""
        self._closed = version
        for one in self._layers:
            one.arrived(files)
        if pending is not None:
            names = itertools.takewhile(files.__contains__, (f"{_PENDING}/{number}" for number in itertools.count()))
            frames = [frame for name in names for frame in cut(files[name])]
            parts = self.received(pending, frames, "the last round of a shard")
            clipping = factor(pending.factor)
            self._pending = ClosedRound(pending.round, parts, pending.samples, pending.hypers, clipping)

    # ---- what there is to save

    @property
    def accepted(self) -> int:
        """Rounds closed here, or contributions accepted: what `version` is on its way to."""
        return self._closed

    @property
    def version(self) -> int:
        """Of these, how many have their updates done."""
        return self._closed - (self._pending is not None) - self._jobs.updates

    def finish_updates(self, version: int | None = None) -> None:
        """Have the updates up to `version`, all by default, done. Only when all servers have closed that round."""
        self.begin_update()
        while self.version < (self._closed if version is None else version):
            self._step()  # who is not told the answer now asks again

    def state(self) -> Iterator[Entry]:
        """See LayerShard.state; those of round `version`."""
        return itertools.chain.from_iterable(one.state() for one in self._layers)

    def restore(self, files: TensorFiles, servers: int, version: int) -> None:
        """Go on at round `version`; see LayerShard.restore. Rows are read before anything else is done."""
        self._closed = version
        for one in self._layers:
            job = one.restore(files, servers)
            next(job, None)  # what is missing is found out now
            self._jobs.update(job)
