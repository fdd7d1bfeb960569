"""Workers' questions to sharded layers. Later contributions refer to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from roundtable.common.model.sparse_rows import join
from roundtable.common.protocol.messages.replication import ReplicateLayers
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward, ShardedForwardReply
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.protocol.transport import Frames
from roundtable.common.runtime.errors import WireError
from roundtable.ps.sharded.column_parallel import Products
from roundtable.ps.sharded.contributions import LayerContribution, OpenQuestion
from roundtable.ps.sharded.layer import LayerShard
from roundtable.ps.sharded.softmax import Samples, Terms

#: An answer: a message and its frames.
Answer = tuple[ShardedForwardReply, list[memoryview]]


@dataclass
class Asker:
    """The questions of one worker."""

    #: By number: questions that the worker may still contribute through.
    kept: dict[int, OpenQuestion] = field(default_factory=dict)
    #: The number of the newest question.
    newest: int = -1
    #: The answer to the newest question, once there is one.
    answer: Answer | None = None


class QuestionCache:
    """The questions of all workers. Parses questions, and pushes that refer to them."""

    def __init__(self, layers: Sequence[LayerShard], keeps_versions: bool) -> None:
        self._layers, self._keeps_versions = layers, keeps_versions
        self.askers: dict[str, Asker] = {}

    def of(self, sender: str) -> Asker:
        """Return the questions of a worker."""
        return self.askers.setdefault(sender, Asker())

    def back(
        self, ask: ShardedForward, one: LayerShard, known: OpenQuestion | None, parts: Iterator[Any], what: str
    ) -> OpenQuestion | None:
        """Return a question for the backward pass through a hidden layer, read from the next frames of `parts`.

        Return None if the forward question `known` is gone because its round is over. Raises WireError, with `what`, if the
        question does not fit.
        """
        if not one.spec.hidden or not ask.keeps or ask.count < 1:
            raise WireError(f"{what} goes back through '{one.spec.name}', about which nothing of the kind was asked")
        slopes = join(parts, "float32", ask.count * one.here, what).view(ask.count, one.here).to(one.device)
        if ask.with_features:
            samples = one.samples(*self.read(one.spec, ask, parts, what))
        elif known is None:
            return None
        else:
            samples = known.samples
            if (known.version, known.layer, len(samples.features)) != (ask.version, ask.layer, ask.count):
                raise WireError(f"{what} goes back through another question")
        return OpenQuestion(ask.version, ask.layer, samples, slopes=slopes)

    def read(
        self, spec: ShardedLayerSpec, ask: ShardedForward, parts: Iterator[Any], what: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (count, D) and labels (count), read from the next frames of `parts`.

        Labels are empty if the question needs none. Raises WireError, with `what`, if they do not fit.
        """
        if ask.count < 1 or not 0 <= ask.top <= spec.rows or (spec.hidden and (ask.top or ask.sums or ask.normalised)):
            raise WireError(f"{what} is about {ask.count} samples and the best {ask.top} of {spec.rows} classes")
        dim = spec.dim - spec.bias
        features = join(parts, "float32", ask.count * dim, what).view(ask.count, dim)
        labels = join(parts, "int64", 0 if ask.top or spec.hidden else ask.count, what)
        if len(labels) and not (labels.min() >= 0 and labels.max() < spec.rows):
            raise WireError(f"{what} has labels that '{spec.name}' has no class for")
        return features, labels

    def receive(self, sender: str, push: LayerPush, frames: Frames) -> list[LayerContribution]:
        """Return the contributions in a push. Raises WireError if the push does not fit."""
        what, parts, out = f"a push of {sender}", iter(frames), []
        kept = self.askers[sender].kept if sender in self.askers else {}
        told: dict[int, OpenQuestion] = {}
        for ask in push.questions:
            good = 0 <= ask.layer < len(self._layers) and ask.keeps and not ask.top
            if not good or not self._keeps_versions:
                raise WireError(f"{what} has questions that nothing can be contributed through")
            one = self._layers[ask.layer]
            if ask.back_through >= 0:
                back = self.back(ask, one, None, parts, what)
                if back is None:
                    raise WireError(f"{what} does not tell all of a question")
                told[ask.number] = back
                continue
            samples = one.samples(*self.read(one.spec, ask, parts, what))
            told[ask.number] = OpenQuestion(ask.version, ask.layer, samples, ask.normalised)
        for use in push.uses:
            question = told.get(use.number) or kept.get(use.number)
            asked = question is not None and (
                question.slopes is not None
                if self._layers[question.layer].spec.hidden
                else use.number in told or question.log_total is not None
            )
            if question is None or not asked or question.version != push.round or len(question.samples.features) != use.count:
                raise WireError(f"{what} is about question {use.number}, which was not asked in round {push.round}")
            if question.slopes is not None:
                products = Products(question.samples.features, question.slopes * use.scale)
                out.append(LayerContribution(question.layer, products, question=question))
                continue
            device = question.samples.features.device
            log_total, g, own = (join(parts, "float32", use.count, what).to(device) for _ in range(3))
            terms = Terms(question.samples, log_total, g, own, torch.full((use.count,), use.smoothing, device=device))
            out.append(LayerContribution(question.layer, terms, question.normalised, question))
        if next(parts, None) is not None:
            raise WireError(f"{what} has too many frames")
        return out

    def forget(self, sender: str) -> None:
        """Forget the questions of a lost worker."""
        self.askers.pop(sender, None)

    def forget_before(self, round_: int) -> None:
        """Forget questions of rounds before `round_`. Workers contribute nothing more to those rounds."""
        for sender in self.askers.values():
            sender.kept = {number: kept for number, kept in sender.kept.items() if kept.version >= round_}

    def answered(self, sender: str, answer: Answer) -> None:
        """Keep the answer to a worker's newest question, because the worker may ask again."""
        known = self.askers.get(sender)
        if known is not None and known.newest == answer[0].number:
            known.answer = answer


def read_replicated(layers: Sequence[LayerShard], told: ReplicateLayers, frames: Frames, what: str) -> list[LayerContribution]:
    """Return the contributions of a replicated round to `layers`. Raises WireError, with `what`, if they do not fit."""
    parts, out = iter(frames), []
    for terms in told.terms:
        if terms.layer >= len(layers):
            raise WireError(f"{what} is about a sharded layer {terms.layer}, which is not here")
        one, count = layers[terms.layer], terms.count
        features = join(parts, "float32", count * one.spec.dim, what).view(count, one.spec.dim).to(one.device)
        if one.spec.hidden:
            slopes = join(parts, "float32", count * one.here, what).view(count, one.here).to(one.device)
            out.append(LayerContribution(terms.layer, Products(features, slopes)))
            continue
        own = join(parts, "int64", count, what)
        if not one.has(own):
            raise WireError(f"{what} has classes that are not here")
        others = [join(parts, "float32", count, what).to(one.device) for _ in range(4)]
        samples = Samples(features, own.to(one.device))
        out.append(LayerContribution(terms.layer, Terms(samples, *others), terms.normalised))
    if next(parts, None) is not None:
        raise WireError(f"{what} has too many frames")
    return out
