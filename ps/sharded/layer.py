"""One sharded layer on one server: answers computed from its rows, and updates of the rows."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.model.row_pages import BLOCK
from roundtable.common.model.sparse_rows import cut, id_of, local_of, owner_of
from roundtable.common.protocol.messages.setup import Update
from roundtable.common.protocol.messages.sharded import ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.params.embedding import Rows, optimizer_over, zeros
from roundtable.ps.params.optimizer_classes import with_tuples
from roundtable.ps.sharded.column_parallel import Products
from roundtable.ps.sharded.contributions import LayerContribution, OpenQuestion
from roundtable.ps.sharded.softmax import Best, OnlineSoftmax, Samples, Terms, gradient, normalised, renewed, through_normalised

#: Elements of a tile, and its fewest and most rows. A tile of this size stays in a core's cache through all steps.
_TILE, _FEWEST, _MOST = 1 << 17, 256, 4096
CPU = torch.device("cpu")
#: Random numbers for negative classes are drawn for this many ids at a time.
_DRAWN = 1 << 20

#: A job: a generator that yields after each tile. Its return value is the result.
Job = Generator[None, None, Any]
#: The places of a tile's rows, the rows (T, dim), and their gradient (T, dim).
Slope = tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]


class LayerShard(Rows):
    """The rows of one sharded layer on one server. Each question and each update goes through all of them, tile by tile."""

    spec: ShardedLayerSpec

    def __init__(
        self, spec: ShardedLayerSpec, server: int, servers: int, update: Update, seed: int, device: torch.device = CPU
    ) -> None:
        super().__init__(spec, server, servers, seed, device)
        self._update = update
        self._tile_rows = min(max(_TILE // spec.dim, _FEWEST), _MOST) // BLOCK * BLOCK
        #: True if any update came before the current one.
        self._stepped = False
        #: The optimizer for all tiles of one update, because it is slow to make, and its parameter, which lies in a tile.
        self._optimizer: tuple[torch.optim.Optimizer, torch.nn.Parameter] | None = None
        #: The number of updates done.
        self.updates = 0
        #: The newest round that drew negative classes, and the places of these classes.
        self._sampled: tuple[int, torch.Tensor] | None = None

    # ---- rows

    def places(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the place of each label's row on this server, or -1 if the row is on another server."""
        here = owner_of(labels, self._servers) == self._server
        return torch.where(here, local_of(labels, self._servers), -1)

    @property
    def here(self) -> int:
        """Return the number of this server's rows."""
        return len(self._values)

    def has(self, places: torch.Tensor) -> bool:
        """Return True if each of `places` is a place of a row on this server, or -1."""
        return not len(places) or bool(places.min() >= -1 and places.max() < len(self._values))

    def ids(self, places: torch.Tensor) -> torch.Tensor:
        """Return the classes of the rows in `places`."""
        return id_of(places, self._server, self._servers)

    def read(self, at: torch.Tensor) -> torch.Tensor:
        """Return a copy (N, dim) of the rows in the places `at`, on the layer's device."""
        self._draw(at.cpu().div(BLOCK, rounding_mode="floor").unique())
        return self._values.index_select(0, at.to(self.device))

    def tiles(self, at: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield tiles (T, dim), each with the index of its first row.

        Without `at`, the tiles are views of all rows. With `at`, they are copies of the rows in these places, and the index
        counts within `at`.
        """
        for start in range(0, len(self._values) if at is None else len(at), self._tile_rows):
            end = start + self._tile_rows
            if at is not None:
                yield start, self.read(at[start:end])
            else:
                self._draw(torch.arange(start // BLOCK, -(-min(end, len(self._values)) // BLOCK)))
                yield start, self._values[start:end]

    # ---- questions

    def samples(self, features: torch.Tensor, labels: torch.Tensor) -> Samples:
        """Return samples on the layer's device, for `sums` and `outputs`. `features` (B, D) have no column for a bias."""
        ones = [features.new_ones(len(features), 1)] * self.spec.bias
        return Samples(torch.cat([features, *ones], 1).to(self.device), self.places(labels).to(self.device))

    def sums(self, samples: Samples, ask: ShardedForward, kept: OpenQuestion | None = None) -> Job:
        """Job: return the answer about samples. Notes the result in `kept` if that is not None."""
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
        """Job: return the answer with a hidden layer's outputs. `features` include a column of ones if the layer has a bias."""
        out = torch.empty(len(features), len(self._values), device=self.device)
        for start, tile in self.tiles():
            torch.mm(features, tile.T, out=out[:, start : start + len(tile)])
            yield
        return ShardedForwardReply(ask.number), cut(out.cpu())

    def back_through(self, slopes: torch.Tensor, ask: ShardedForward) -> Job:
        """Job: return the answer with the gradient by the features. `slopes` (B, R) is the gradient by this server's outputs."""
        dim = self.spec.dim - self.spec.bias
        out = torch.zeros(len(slopes), dim, device=self.device)
        for start, tile in self.tiles():
            out.addmm_(slopes[:, start : start + len(tile)], tile[:, :dim])
            yield
        return ShardedForwardReply(ask.number), cut(out.cpu())

    def best(self, features: torch.Tensor, ask: ShardedForward) -> Job:
        """Job: return the answer with the `ask.top` best classes of each sample. `features` include a bias's column."""
        best = Best(features.to(self.device), ask.top)
        for start, tile in self.tiles():
            best.add(normalised(tile) if ask.normalised else tile, start)
            yield
        return ShardedForwardReply(ask.number), [*cut(best.values.cpu()), *cut(self.ids(best.places).cpu())]

    def _negatives(self, round_: int) -> torch.Tensor | None:
        """Return the places of the negative classes of a round, None if all classes take part. They depend on the seed alone."""
        if self.spec.sample_rate >= 1.0:
            return None
        if self._sampled is None or self._sampled[0] != round_:
            seed = derive_seed(self._seed, f"negatives of {self.spec.name}", round_)
            parts = torch.arange(len(self._values)).split(_DRAWN)
            drawn = [part[_chance(self.ids(part), seed) < self.spec.sample_rate] for part in parts]
            self._sampled = round_, torch.cat(drawn).to(self.device)
        return self._sampled[1]

    def _among(self, samples: Samples, at: torch.Tensor | None) -> Samples:
        """Return samples whose own classes are given as places within `at`, which is sorted. None: all rows."""
        if at is None:
            return samples
        if not len(at):
            return replace(samples, own=torch.full_like(samples.own, -1))
        place = torch.searchsorted(at, samples.own).clamp_(max=len(at) - 1)
        return replace(samples, own=torch.where(at[place] == samples.own, place, -1))

    # ---- updates

    def _slopes(self, parts: Sequence[LayerContribution], round_: int, weight: float) -> Iterator[Slope]:
        """Yield the mean gradient of `parts` of weight `weight`, for one tile at a time of the rows that take part."""
        if products := [part.terms for part in parts if isinstance(part.terms, Products)]:
            whole = Products.joined(products).mean(weight)
            for start, tile in self.tiles():
                yield slice(start, start + len(tile)), tile, whole.gradient(start, start + len(tile))
            return
        terms = {
            unit: Terms.joined(mine).mean(weight)
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

    def norm(self, parts: Sequence[LayerContribution], round_: int, weight: float) -> Generator[None, None, float]:
        """Job: return the 2-norm of the mean gradient over this server's rows."""
        squares = 0.0
        for _, _, slope in self._slopes(parts, round_, weight):
            squares += float(torch.linalg.vector_norm(slope)) ** 2
            yield
        return math.sqrt(squares)

    def update(
        self,
        parts: Sequence[LayerContribution],
        round_: int,
        weight: float,
        hypers: Mapping[str, Any],
        factor: torch.Tensor | None = None,
        lr_scale: float = 1.0,
    ) -> Job:
        """Job: make an optimizer step with the mean gradient, multiplied by the clipping factor `factor`.

        `lr_scale` multiplies the learning rate. Rows that do not take part in the round keep their values and state.
        """
        common, stepped, self._optimizer = self._common, self._stepped, None
        for at, tile, slope in self._slopes(parts, round_, weight):
            common, stepped = self._step(at, tile, slope if factor is None else slope.mul_(factor), hypers, lr_scale), True
            yield
        self._common, self._stepped = common, stepped
        self.updates += 1

    def present(self, part: LayerContribution) -> Generator[None, None, LayerContribution]:
        """Job: return the contribution with this server's part of log Σ exp(z) computed from the current rows."""
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
        """Make an optimizer step on a tile, whose rows have the places `at`. Return the state that has not the tile's shape."""
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
        elif first:  # state that the optimizer made in its constructor may be other than zeros
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
        """Make the state called `name` for all rows. `first` is the state that the optimizer's constructor makes for one tile."""
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
        """Job: load a checkpoint of `servers` servers (see `Rows.restore`)."""
        names = [name for name in files.below(f"table-0-of-{servers}", self.spec.name) if "-" in name]
        self._state = {
            n.removeprefix("each-"): zeros(self.here, self.spec.dim, self.device) for n in names if n.startswith("each-")
        }
        self._common = {n.removeprefix("common-"): torch.empty(0) for n in names if n.startswith("common-")}
        self._stepped = bool(names)
        yield from super().restore(files, servers)


def _chance(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a pseudorandom number in [0, 1] for each id, float64, which depends on the id and `seed` alone.

    The last steps are those of SplitMix64 (Steele et al., 2014).
    """
    x = ids.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64)
