"""Classifiers and hidden layers too large to move: a server keeps some rows of each, and computes with all of these for whoever
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
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.model.layout import Layout
from roundtable.common.model.row_pages import BLOCK, pages
from roundtable.common.model.sparse_rows import cut, id_of, join, local_of, owner_of
from roundtable.common.protocol.messages.replication import LossTerms, ReplicateLayers
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ClassSpec
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage.tensor_file import Entry, TensorFiles
from roundtable.ps.params.chunk_state import with_tuples
from roundtable.ps.params.clipping import Norm
from roundtable.ps.params.embedding import Rows, optimizer_over, zeros
from roundtable.ps.params.state_part import Part
from roundtable.ps.sharded.column_parallel import Products
from roundtable.ps.sharded.softmax import Best, OnlineSoftmax, Samples, Terms, gradient, normalised, renewed, through_normalised

#: Elements of a tile, and the fewest and most rows that it has: it stays in a core's cache on its way through all steps.
_TILE, _FEWEST, _MOST = 1 << 17, 256, 4096
_CPU = torch.device("cpu")
#: Ids that are drawn from at a time.
_DRAWN = 1 << 20
#: What the tensors of a round that is forwarded are called in a state.
_PENDING = "pending"

#: A message, and its frames.
Answer = tuple[ShardedForwardReply, list[memoryview]]
#: A job, which yields after each tile.
Job = Generator[None, None, Any]
#: Where the rows (T, dim) of a tile are, these rows, and their gradient.
Slope = tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Task:
    """A job that is waited for by nobody, or by the worker `asker`; `changes`: it is an update of rows."""

    job: Job
    asker: str = ""
    changes: bool = False


@dataclass
class Kept:
    """A question of which the answer may be contributed. Once it is answered: how many updates of the classifier there had been
    by then, and the logarithm of the sum of exp(z) over the classes here."""

    version: int
    classifier: int
    samples: Samples
    normalised: bool = False
    updates: int = -1
    log_total: torch.Tensor | None = None
    #: Of a hidden layer, once the way back has been asked for: the gradient by the outputs here.
    slopes: torch.Tensor | None = None


@dataclass(frozen=True)
class Contributed:
    """What samples contribute to a classifier, g x samples of their micro-batch; and the question that it is about."""

    classifier: int
    terms: Terms | Products
    normalised: bool = False
    question: Kept | None = None


@dataclass(frozen=True)
class _Closed:
    """A round that is complete: what counts in it, see `LayerShards.close`."""

    round: int
    parts: Sequence[Contributed]
    samples: int
    hypers: Sequence[Mapping[str, Any]]
    factor: torch.Tensor | None


@dataclass
class _Sender:
    """One worker: questions by number, the newest one's, and its answer once there is one."""

    kept: dict[int, Kept] = field(default_factory=dict)
    newest: int = -1
    answer: Answer | None = None


class LayerShard(Rows):
    """The rows of one classifier on one server, all of which are gone through at a time."""

    spec: ClassSpec

    def __init__(
        self, spec: ClassSpec, server: int, servers: int, update: Update, seed: int, device: torch.device = _CPU
    ) -> None:
        super().__init__(spec, server, servers, seed, device)
        self._update = update
        self._tile_rows = min(max(_TILE // spec.dim, _FEWEST), _MOST) // BLOCK * BLOCK
        #: Whether there was any step before this update.
        self._stepped = False
        #: What steps on all tiles of this update, as it takes long to make one; and its parameter, whose memory is a tile's.
        self._optimizer: tuple[torch.optim.Optimizer, torch.nn.Parameter] | None = None
        #: Updates so far.
        self.updates = 0
        #: The negative classes of a round, and that round.
        self._sampled: tuple[int, torch.Tensor] | None = None

    # ---- rows

    def places(self, labels: torch.Tensor) -> torch.Tensor:
        """Where each label's row is here; -1 where it is on another server."""
        here = owner_of(labels, self._servers) == self._server
        return torch.where(here, local_of(labels, self._servers), -1)

    @property
    def here(self) -> int:
        """How many rows there are here."""
        return len(self._values)

    def has(self, places: torch.Tensor) -> bool:
        """Whether these are places of rows here, or -1."""
        return not len(places) or bool(places.min() >= -1 and places.max() < len(self._values))

    def ids(self, places: torch.Tensor) -> torch.Tensor:
        """The classes of the rows in these places."""
        return id_of(places, self._server, self._servers)

    def read(self, at: torch.Tensor) -> torch.Tensor:
        """A copy (N, dim) of the rows in these places."""
        self._draw(at.cpu().div(BLOCK, rounding_mode="floor").unique())
        return self._values.index_select(0, at.to(self.device))

    def tiles(self, at: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Tiles (T, dim) of all rows, in this table's own memory, or copies of those in the places `at`; and where each begins in
        what is gone through."""
        for start in range(0, len(self._values) if at is None else len(at), self._tile_rows):
            end = start + self._tile_rows
            if at is not None:
                yield start, self.read(at[start:end])
            else:
                self._draw(torch.arange(start // BLOCK, -(-min(end, len(self._values)) // BLOCK)))
                yield start, self._values[start:end]

    # ---- questions

    def samples(self, features: torch.Tensor, labels: torch.Tensor) -> Samples:
        """What the sums over classes need of samples: `features` (B, D) without a bias's column."""
        ones = [features.new_ones(len(features), 1)] * self.spec.bias
        return Samples(torch.cat([features, *ones], 1).to(self.device), self.places(labels).to(self.device))

    def sums(self, samples: Samples, ask: ShardedForward, kept: Kept | None = None) -> Job:
        """Job: the answer about samples; `kept` is to know what it came to."""
        sampled = self._negatives(ask.version) if ask.keeps else None
        softmax = OnlineSoftmax(self._among(samples, sampled), self.spec.dim - self.spec.bias)
        total = torch.zeros(self.spec.dim, device=self.device)
        for start, tile in self.tiles(sampled):
            softmax.add(normalised(tile) if ask.normalised else tile, start)
            if ask.sums:
                total += tile.sum(0)
            yield
        own = self.read(samples.own[samples.own >= 0])
        own = normalised(own) if ask.normalised else own
        if kept is not None:
            kept.updates, kept.log_total = self.updates, softmax.log_total
        parts = [softmax.largest, softmax.total, softmax.rows, *([total] if ask.sums else []), own]
        return ShardedForwardReply(ask.number), [frame for part in parts for frame in cut(part.cpu())]

    def outputs(self, features: torch.Tensor, ask: ShardedForward) -> Job:
        """Job: the answer about a hidden layer's outputs; features have a bias's column."""
        out = torch.empty(len(features), len(self._values), device=self.device)
        for start, tile in self.tiles():
            torch.mm(features, tile.T, out=out[:, start : start + len(tile)])
            yield
        return ShardedForwardReply(ask.number), cut(out.cpu())

    def back_through(self, slopes: torch.Tensor, ask: ShardedForward) -> Job:
        """Job: the answer about the features' gradient, given that by the outputs."""
        dim = self.spec.dim - self.spec.bias
        out = torch.zeros(len(slopes), dim, device=self.device)
        for start, tile in self.tiles():
            out.addmm_(slopes[:, start : start + len(tile)], tile[:, :dim])
            yield
        return ShardedForwardReply(ask.number), cut(out.cpu())

    def best(self, features: torch.Tensor, ask: ShardedForward) -> Job:
        """Job: the answer about the best classes."""
        best = Best(features.to(self.device), ask.top)
        for start, tile in self.tiles():
            best.add(normalised(tile) if ask.normalised else tile, start)
            yield
        return ShardedForwardReply(ask.number), [*cut(best.values.cpu()), *cut(self.ids(best.places).cpu())]

    def _negatives(self, round_: int) -> torch.Tensor | None:
        """Places of the classes that take part in a round, if not all; the same whenever they are asked for."""
        if self.spec.sample_rate >= 1.0:
            return None
        if self._sampled is None or self._sampled[0] != round_:
            seed = derive_seed(self._seed, f"negatives of {self.spec.name}", round_)
            parts = torch.arange(len(self._values)).split(_DRAWN)
            drawn = [part[_chance(self.ids(part), seed) < self.spec.sample_rate] for part in parts]
            self._sampled = round_, torch.cat(drawn).to(self.device)
        return self._sampled[1]

    def _among(self, samples: Samples, at: torch.Tensor | None) -> Samples:
        """The same samples, their classes' places being those in `at`."""
        if at is None:
            return samples
        if not len(at):
            return replace(samples, own=torch.full_like(samples.own, -1))
        place = torch.searchsorted(at, samples.own).clamp_(max=len(at) - 1)
        return replace(samples, own=torch.where(at[place] == samples.own, place, -1))

    # ---- updates

    def _slopes(self, parts: Sequence[Contributed], round_: int, samples: int) -> Iterator[Slope]:
        """The mean gradient over `samples` samples that these contribute, of a tile of the rows that take part in the round at a
        time."""
        if products := [part.terms for part in parts if isinstance(part.terms, Products)]:
            whole = Products.joined(products).mean(samples)
            for start, tile in self.tiles():
                yield slice(start, start + len(tile)), tile, whole.gradient(start, start + len(tile))
            return
        terms = {
            unit: Terms.joined(mine).mean(samples)
            for unit in (False, True)
            if (mine := [p.terms for p in parts if isinstance(p.terms, Terms) and p.normalised is unit])
        }
        places, negative = self._negatives(round_), None
        if places is not None:
            own = torch.cat([one.samples.own for one in terms.values()])
            places, drawn = torch.cat([places, own[own >= 0]]).unique(), places
            negative = torch.isin(places, drawn)
            terms = {unit: replace(one, samples=self._among(one.samples, places)) for unit, one in terms.items()}
        for start, tile in self.tiles(places):
            among = None if negative is None else negative[start : start + len(tile)]
            total: torch.Tensor | None = None
            for unit, one in terms.items():
                found = gradient(one, normalised(tile) if unit else tile, start, among)
                found = through_normalised(found, tile) if unit else found
                total = found if total is None else total.add_(found)
            assert total is not None
            yield slice(start, start + len(tile)) if places is None else places[start : start + len(tile)], tile, total

    def norm(self, parts: Sequence[Contributed], round_: int, samples: int) -> Generator[None, None, float]:
        """Job: the 2-norm of that gradient."""
        squares = 0.0
        for _, _, slope in self._slopes(parts, round_, samples):
            squares += float(torch.linalg.vector_norm(slope)) ** 2
            yield
        return math.sqrt(squares)

    def update(
        self,
        parts: Sequence[Contributed],
        round_: int,
        samples: int,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None = None,
        lr_scale: float = 1.0,
    ) -> Job:
        """Job: step with that gradient, times `factor`; `lr_scale` multiplies the learning rate. Of rows that do not take part in
        the round neither values nor state move."""
        common, stepped, self._optimizer = self._common, self._stepped, None
        for at, tile, slope in self._slopes(parts, round_, samples):
            common, stepped = self._step(at, tile, slope if factor is None else slope.mul_(factor), hypers, lr_scale), True
            yield
        self._common, self._stepped = common, stepped
        self.updates += 1

    def present(self, part: Contributed) -> Generator[None, None, Contributed]:
        """Job: the same contribution, of which what the classes here come to is as of now."""
        question = part.question
        assert question is not None
        if question.updates == self.updates or isinstance(part.terms, Products):
            return part
        assert question.log_total is not None
        sampled = self._negatives(question.version)
        softmax = OnlineSoftmax(self._among(question.samples, sampled), 0)
        for start, tile in self.tiles(sampled):
            softmax.add(normalised(tile) if part.normalised else tile, start)
            yield
        log_total = renewed(part.terms.log_total, question.log_total, softmax.log_total)
        return replace(part, terms=replace(part.terms, log_total=log_total))

    def _step(
        self, at: slice | torch.Tensor, tile: torch.Tensor, slope: torch.Tensor, hypers: Mapping[str, Any], lr_scale: float
    ) -> dict[str, Any]:
        """Have torch.optim step on a tile, the rows `at`; what it keeps besides state of the rows' shape comes back."""
        if self._optimizer is None:
            parameter = torch.nn.Parameter(tile, requires_grad=False)
            optimizer = optimizer_over(parameter, self._update, self.spec.group)
            optimizer.param_groups[0].update(with_tuples(hypers))
            optimizer.param_groups[0]["lr"] *= lr_scale
            first = dict(optimizer.state.get(parameter, {}))
            if self._stepped or not first:
                self._optimizer = optimizer, parameter
        else:
            (optimizer, parameter), first = self._optimizer, {}
            parameter.data = tile
            optimizer.state.clear()
        parameter.grad = slope
        if self._stepped:
            common = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self._common.items()}
            optimizer.state[parameter] = {**common, **{name: whole[at] for name, whole in self._state.items()}}
        elif first:  # the class makes it when it is constructed, so it is not zeros for sure
            first = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.items()}
        optimizer.step()
        common = {}
        for name, value in optimizer.state[parameter].items():
            if not isinstance(value, torch.Tensor) or value.shape != tile.shape:
                common[name] = value
                continue
            if name not in self._state:
                self._make_state(name, first)
            if isinstance(at, torch.Tensor) or value.data_ptr() != self._state[name][at].data_ptr():
                self._state[name][at] = value
        if isinstance(at, torch.Tensor):
            self._values[at] = tile
        return common

    def _make_state(self, name: str, first: Mapping[str, Any]) -> None:
        """Have state of this name, as it is before the first step: `first` is what the class makes when it is constructed."""
        self._state[name] = zeros(self.here, self.spec.dim, self.device)
        if name in first and first[name].any():
            self._state[name].fill_(first[name].flatten()[0])

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        key = name.removeprefix(f"{self._prefix}/each-").removesuffix(f"/{self.spec.name}")
        if "/" not in key and key not in self._state:
            parameter = torch.nn.Parameter(torch.zeros(1, self.spec.dim), requires_grad=False)
            self._make_state(key, optimizer_over(parameter, self._update, self.spec.group).state.get(parameter, {}))
        return super().put(name, first, rows)

    def arrived(self, files: TensorFiles) -> None:
        names = [name for name in files.below(self._prefix, self.spec.name) if name.startswith("common-")]
        self._common = {name.removeprefix("common-"): torch.empty(0) for name in names}
        self._stepped = bool(self._state or self._common)
        super().arrived(files)

    def restore(self, files: TensorFiles, servers: int) -> Job:
        """Job: see Rows.restore."""
        names = [name for name in files.below(f"table-0-of-{servers}", self.spec.name) if "-" in name]
        self._state = {
            n.removeprefix("each-"): zeros(self.here, self.spec.dim, self.device) for n in names if n.startswith("each-")
        }
        self._common = {n.removeprefix("common-"): torch.empty(0) for n in names if n.startswith("common-")}
        self._stepped = bool(names)
        yield from super().restore(files, servers)


class LayerShards:
    """All classifiers on one server: what is asked of them, and what is contributed. Invariants: with `keeps_versions`, `keeps`
    is answered from the version asked for and no other, and the update after a round is begun only when somebody asks about the
    next one; without, an answer holds whole updates, all that were accepted before the question, and nothing of others."""

    def __init__(
        self,
        layout: Layout,
        server: int,
        update: Update,
        seed: int,
        keeps_versions: bool = True,
        device: torch.device = _CPU,
    ) -> None:
        self._server = server
        self._keeps_versions = keeps_versions
        #: What the first classifier is called among norms: there are those of tensors and of tables before.
        self._first_norm = len(layout.tensors) + len(layout.tables)
        self._specs = layout.classifiers
        self._classifiers = [LayerShard(spec, server, layout.servers, update, seed, device) for spec in layout.classifiers]
        self._senders: dict[str, _Sender] = {}
        #: Rounds closed here, or contributions accepted; and the update after the last round, unless it is begun.
        self._closed = 0
        self._pending: _Closed | None = None
        #: Whether rows may change now; a snapshot may have them that is not written yet.
        self.may_update: Callable[[], bool] = lambda: True
        #: What is to be done.
        self._tasks: deque[_Task] = deque()
        #: Norms of the gradient of the round that is still open, once they are known, and that round.
        self._norms: tuple[int, list[Norm] | None] = -1, None
        #: Tiles done so far.
        self.steps = 0

    def __bool__(self) -> bool:
        return bool(self._classifiers)

    # ---- first values

    def awaited(self) -> set[tuple[int, int]]:
        """(classifier, page) of first values that a worker is to send."""
        return {(number, page) for number, spec in enumerate(self._specs) if spec.std is None for page in pages(spec)}

    def load(self, classifier: int, page: int, frames: Frames) -> None:
        """First values of a page. Raises WireError where they do not fit; the page must be one of `awaited`."""
        one = self._classifiers[classifier]
        at = one.on_page(page)
        one.load(at, join(iter(frames), "float32", len(at) * one.spec.dim, f"page {page}").view(len(at), one.spec.dim))

    # ---- questions

    def ask(self, sender: str, ask: ShardedForward, frames: Frames) -> Answer | None:
        """A question. The answer comes from `work`, unless it is known now. Raises WireError where it cannot be meant."""
        if not 0 <= ask.classifier < len(self._classifiers):
            raise WireError(f"there is no classifier {ask.classifier}")
        known = self._senders.setdefault(sender, _Sender())
        if ask.number == known.newest:
            return known.answer
        if ask.number < known.newest or (self._keeps_versions and ask.version > self._closed):
            return None
        one = self._classifiers[ask.classifier]
        parts, what = iter(frames), f"a question of {sender}"
        if ask.back_through >= 0:
            back = self._back(ask, one, known.kept.get(ask.back_through), parts, what)
        else:
            features, labels = self._question(one.spec, ask, parts, what)
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
                known.kept[ask.number] = Kept(ask.version, ask.classifier, samples)
            job = one.outputs(samples.features, ask)
        elif ask.top:
            ones = [features.new_ones(ask.count, 1)] * one.spec.bias
            job = one.best(torch.cat([features, *ones], 1), ask)
        else:
            samples = one.samples(features, labels)
            kept = Kept(ask.version, ask.classifier, samples, ask.normalised) if ask.keeps else None
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
        self._tasks.append(_Task(job, sender))
        return None

    def _back(self, ask: ShardedForward, one: LayerShard, known: Kept | None, parts: Iterator[Any], what: str) -> Kept | None:
        """The way back through a hidden layer, from the next frames; None where it is not known what it was asked before, as the
        round is over."""
        if not one.spec.hidden or not ask.keeps or ask.count < 1:
            raise WireError(f"{what} goes back through '{one.spec.name}', about which nothing of the kind was asked")
        slopes = join(parts, "float32", ask.count * one.here, what).view(ask.count, one.here).to(one.device)
        if ask.with_features:
            samples = one.samples(*self._question(one.spec, ask, parts, what))
        elif known is None:
            return None
        else:
            samples = known.samples
            if (known.version, known.classifier, len(samples.features)) != (ask.version, ask.classifier, ask.count):
                raise WireError(f"{what} goes back through another question")
        return Kept(ask.version, ask.classifier, samples, slopes=slopes)

    def _question(
        self, spec: ClassSpec, ask: ShardedForward, parts: Iterator[Any], what: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (count, D) and labels (count), or none, from the next frames."""
        if ask.count < 1 or not 0 <= ask.top <= spec.rows or (spec.hidden and (ask.top or ask.sums or ask.normalised)):
            raise WireError(f"{what} is about {ask.count} samples and the best {ask.top} of {spec.rows} classes")
        dim = spec.dim - spec.bias
        features = join(parts, "float32", ask.count * dim, what).view(ask.count, dim)
        labels = join(parts, "int64", 0 if ask.top or spec.hidden else ask.count, what)
        if len(labels) and not (labels.min() >= 0 and labels.max() < spec.rows):
            raise WireError(f"{what} has labels that '{spec.name}' has no class for")
        return features, labels

    def page(self, classifier: int, page: int) -> list[torch.Tensor]:
        """This server's rows of a page as they are now, (N, D), and where there is one, the biases (N, 1) apart."""
        one = self._classifiers[classifier]
        rows = one.read(one.on_page(page)).cpu()
        features = one.spec.dim - one.spec.bias
        return [rows[:, :features].contiguous(), *([rows[:, features:].contiguous()] if one.spec.bias else [])]

    # ---- contributions

    def receive(self, sender: str, push: LayerPush, frames: Frames) -> list[Contributed]:
        """A contribution. Raises WireError where it does not fit."""
        what, parts, out = f"a push of {sender}", iter(frames), []
        kept = self._senders[sender].kept if sender in self._senders else {}
        told: dict[int, Kept] = {}
        for ask in push.questions:
            good = 0 <= ask.classifier < len(self._classifiers) and ask.keeps and not ask.top
            if not good or not self._keeps_versions:
                raise WireError(f"{what} has questions that nothing can be contributed through")
            one = self._classifiers[ask.classifier]
            if ask.back_through >= 0:
                back = self._back(ask, one, None, parts, what)
                if back is None:
                    raise WireError(f"{what} does not tell all of a question")
                told[ask.number] = back
                continue
            samples = one.samples(*self._question(one.spec, ask, parts, what))
            told[ask.number] = Kept(ask.version, ask.classifier, samples, ask.normalised)
        for use in push.uses:
            question = told.get(use.number) or kept.get(use.number)
            asked = question is not None and (
                question.slopes is not None
                if self._specs[question.classifier].hidden
                else use.number in told or question.log_total is not None
            )
            if question is None or not asked or question.version != push.round or len(question.samples.features) != use.count:
                raise WireError(f"{what} is about question {use.number}, which was not asked in round {push.round}")
            if question.slopes is not None:
                products = Products(question.samples.features, question.slopes * use.scale)
                out.append(Contributed(question.classifier, products, question=question))
                continue
            device = question.samples.features.device
            log_total, g, own = (join(parts, "float32", use.count, what).to(device) for _ in range(3))
            terms = Terms(question.samples, log_total, g, own, torch.full((use.count,), use.smoothing, device=device))
            out.append(Contributed(question.classifier, terms, question.normalised, question))
        if next(parts, None) is not None:
            raise WireError(f"{what} has too many frames")
        return out

    def norms(self, parts: Sequence[Contributed], samples: int) -> list[Norm] | None:
        """The norms of the round's mean gradient, over the rows here; `parts` as in `close`. None until `work` has gone through
        the rows for them, which is begun by the first call."""
        if self._norms[0] != self._closed:
            self._norms = self._closed, None
            self.begin_update()
            self._tasks.append(_Task(self._measure(parts, samples)))
        return self._norms[1]

    def _measure(self, parts: Sequence[Contributed], samples: int) -> Job:
        norms = []
        for number, one in enumerate(self._classifiers):
            if mine := [part for part in parts if part.classifier == number]:
                norm = yield from one.norm(mine, self._closed, samples)
                norms.append((self._first_norm + number, self._server, norm))
        self._norms = self._closed, norms

    @property
    def measured(self) -> bool:
        """Whether the norms that were asked for are known."""
        return self._norms[0] == self._closed and self._norms[1] is not None

    def close(
        self,
        parts: Sequence[Contributed],
        samples: int,
        hypers: Sequence[Mapping[str, Any]],
        factor: torch.Tensor | None = None,
    ) -> None:
        """The round is complete: `parts` are all that count, in order of the micro-batches, of `samples` samples; `factor` is the
        clipping."""
        self.begin_update()  # it is there still if nobody asked anything in this round
        self._pending = _Closed(self._closed, parts, samples, hypers, factor)
        self._closed += 1
        self.forget_before(self._closed)

    def apply(
        self, parts: Sequence[Contributed], round_: int, samples: int, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> None:
        """Have an update of its own, whose learning rate is multiplied by `lr_scale`, for the contribution `parts` of `samples`
        samples to a round."""
        self._tasks.append(_Task(self._apply(parts, round_, samples, hypers, lr_scale), changes=True))
        self._closed += 1

    def _apply(
        self, parts: Sequence[Contributed], round_: int, samples: int, hypers: Sequence[Mapping[str, Any]], lr_scale: float
    ) -> Job:
        now = []
        for part in parts:
            now.append((yield from self._classifiers[part.classifier].present(part)))
        yield from self._update(_Closed(round_, now, samples, hypers, None), lr_scale)

    def forget(self, sender: str) -> None:
        """It is lost."""
        self._senders.pop(sender, None)

    def forget_before(self, round_: int) -> None:
        """Nothing more will be contributed to rounds before this one."""
        for sender in self._senders.values():
            sender.kept = {number: kept for number, kept in sender.kept.items() if kept.version >= round_}

    def _update(self, closed: _Closed, lr_scale: float = 1.0) -> Job:
        for number, one in enumerate(self._classifiers):
            if mine := [part for part in closed.parts if part.classifier == number]:
                settings = closed.hypers[one.spec.group] if one.spec.group < len(closed.hypers) else {}
                yield from one.update(mine, closed.round, closed.samples, settings, closed.factor, lr_scale)

    def begin_update(self) -> None:
        """Have the update after the last round done soon. Only when all servers have closed that round."""
        if self._pending is not None:
            self._tasks.append(_Task(self._update(self._pending), changes=True))
            self._pending = None

    # ---- jobs

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._tasks) and (not self._tasks[0].changes or self.may_update())

    def work(self) -> tuple[str, Answer] | None:
        """Do the next tile; whom to send an answer to, if that was the last one for it."""
        return self._step() if self.busy else None

    def _step(self) -> tuple[str, Answer] | None:
        task = self._tasks[0]
        self.steps += 1
        try:
            next(task.job)
        except StopIteration as end:
            self._tasks.popleft()
            if not task.asker:
                return None
            answer: Answer = end.value
            known = self._senders.get(task.asker)
            if known is not None and known.newest == answer[0].number:
                known.answer = answer
            return task.asker, answer
        return None

    # ---- copies on other servers

    def received(self, told: ReplicateLayers, frames: Frames, what: str) -> list[Contributed]:
        """What a round contributes, out of `contributed`. Raises WireError naming `what` where it does not fit."""
        parts, out = iter(frames), []
        for terms in told.terms:
            if terms.classifier >= len(self._classifiers):
                raise WireError(f"{what} is about a classifier {terms.classifier}, which is not here")
            one, count = self._classifiers[terms.classifier], terms.count
            features = join(parts, "float32", count * one.spec.dim, what).view(count, one.spec.dim).to(one.device)
            if one.spec.hidden:
                slopes = join(parts, "float32", count * one.here, what).view(count, one.here).to(one.device)
                out.append(Contributed(terms.classifier, Products(features, slopes)))
                continue
            own = join(parts, "int64", count, what)
            if not one.has(own):
                raise WireError(f"{what} has classes that are not here")
            others = [join(parts, "float32", count, what).to(one.device) for _ in range(4)]
            samples = Samples(features, own.to(one.device))
            out.append(Contributed(terms.classifier, Terms(samples, *others), terms.normalised))
        if next(parts, None) is not None:
            raise WireError(f"{what} has too many frames")
        return out

    @property
    def settled(self) -> bool:
        """Whether no update is under way, so that rows are those after some round."""
        return not any(task.changes for task in self._tasks)

    @property
    def pending(self) -> ReplicateLayers | None:
        """The last round, if the update after it is not begun."""
        last = self._pending
        return None if last is None else contributed(last.round, last.parts, last.samples, last.hypers, last.factor)

    def parts(self) -> Iterator[Part]:
        """See Classifier.parts; and what `pending` tells of."""
        tensors = tensors_of(self._pending.parts) if self._pending is not None else []
        pending = (Part(f"{_PENDING}/{number}", tensor) for number, tensor in enumerate(tensors))
        return itertools.chain(pending, *(one.parts() for one in self._classifiers))

    def put(self, name: str, first: int, rows: torch.Tensor) -> bool:
        """See Classifier.put."""
        return any(name.endswith(f"/{one.spec.name}") and one.put(name, first, rows) for one in self._classifiers)

    def arrived(
        self,
        files: TensorFiles,
        version: int,
        pending: ReplicateLayers | None,
        factor: Callable[[float | None], torch.Tensor | None],
    ) -> None:
        """Go on at round `version` from what `parts` gave; see Classifier.arrived."""
        self._closed = version
        for one in self._classifiers:
            one.arrived(files)
        if pending is not None:
            names = itertools.takewhile(files.__contains__, (f"{_PENDING}/{number}" for number in itertools.count()))
            frames = [frame for name in names for frame in cut(files[name])]
            parts = self.received(pending, frames, "the last round of a shard")
            clipping = factor(pending.factor)
            self._pending = _Closed(pending.round, parts, pending.samples, pending.hypers, clipping)

    # ---- what there is to save

    @property
    def accepted(self) -> int:
        """Rounds closed here, or contributions accepted: what `version` is on its way to."""
        return self._closed

    @property
    def version(self) -> int:
        """Of these, how many have their updates done."""
        return self._closed - (self._pending is not None) - sum(task.changes for task in self._tasks)

    def settle(self, version: int | None = None) -> None:
        """Have the updates up to `version`, all by default, done. Only when all servers have closed that round."""
        self.begin_update()
        while self.version < (self._closed if version is None else version):
            self._step()  # who is not told the answer now asks again

    def state(self) -> Iterator[Entry]:
        """See Classifier.state; those of round `version`."""
        return itertools.chain.from_iterable(one.state() for one in self._classifiers)

    def restore(self, files: TensorFiles, servers: int, version: int) -> None:
        """Go on at round `version`; see Classifier.restore. Rows are read before anything else is done."""
        self._closed = version
        for one in self._classifiers:
            job = one.restore(files, servers)
            next(job, None)  # what is missing is found out now
            self._tasks.append(_Task(job, changes=True))


def contributed(
    round_: int, parts: Sequence[Contributed], samples: int, hypers: Sequence[Mapping[str, Any]], factor: torch.Tensor | None
) -> ReplicateLayers:
    """What is told of a round that is complete, see `LayerShards.close`, before its tensors."""
    terms = [LossTerms(part.classifier, len(part.terms.tensors[0]), part.normalised) for part in parts]
    return ReplicateLayers(round_, samples, terms, [dict(one) for one in hypers], None if factor is None else float(factor))


def tensors_of(parts: Sequence[Contributed]) -> list[torch.Tensor]:
    """The tensors that follow it."""
    return [tensor.cpu() for part in parts for tensor in part.terms.tensors]


def _chance(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """A number from 0 to 1 for each id, float64, that looks random and is always the same: by the last steps of SplitMix64
    (Steele et al., 2014)."""
    x = ids.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64)
