"""Operations that all workers' scripts call in the same order, between two loops over batches."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import torch
from torch import nn
from torch.utils.data import default_collate

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.config.field_types import MOST
from roundtable.common.protocol.effects import COORDINATOR, Send
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.session import MODEL_NAME, Collective, CollectiveOutcome, CollectiveParts, PartDone
from roundtable.common.protocol.transport import ASK_AGAIN_S, Frames
from roundtable.common.runtime.errors import ClusterError, UsageError, at_script_line
from roundtable.common.runtime.failpoints import failpoint
from roundtable.worker.client.context import WorkerContext
from roundtable.worker.data.arguments import Data
from roundtable.worker.data.devices import move
from roundtable.worker.data.loader import samples_of, seed_everything
from roundtable.worker.loop.task_queue import TaskQueue
from roundtable.worker.router import MessageRouter

#: Bytes of a value that workers agree on, at most.
_MOST_BYTES = 1 << 16

_Answer = CollectiveParts | CollectiveOutcome
#: The result of a script's function for a batch: means over the batch, or (means, the batch's weight).
Means = Mapping[str, Any] | tuple[Mapping[str, Any], float]


class Loops(Protocol):
    """The loops over batches that a script has begun."""

    @property
    def begun(self) -> int:
        """How many there are."""

    @property
    def done(self) -> bool:
        """Whether none is under way."""

    @property
    def ends_round(self) -> bool:
        """Whether a function of the script for the end of a round runs now."""

    @property
    def round(self) -> int:
        """The round of the model's weights."""


class Collectives:
    """This worker's part in the collectives of a run."""

    def __init__(self, context: WorkerContext, router: MessageRouter, tasks: TaskQueue, segments: Loops) -> None:
        self._context, self._tasks, self._segments = context, tasks, segments
        #: The place of the next collective in the script: loops begun, and collectives since then.
        self._place = (0, 0)
        self._answer: _Answer | None = None
        router.listen(self._hear, CollectiveParts, CollectiveOutcome)

    def agree(self, value: Any) -> Any:
        """Return the chief's value; see `Run.agree`."""
        encoded = _encoded(value)
        question = self._begin("agree", 1)

        def done() -> list[PartDone]:
            return [PartDone(0, encoded)] if self._tasks.is_chief else []

        outcome = self._until_outcome(question, done, lambda parts: [])
        return msgspec.msgpack.decode(outcome.value)

    def save(self, name: str) -> None:
        """Have the model saved as `name`; see `Run.save`."""
        if not name or not re.fullmatch(MODEL_NAME, name) or len(name) > 100:
            raise at_script_line(
                f"run.save() takes a name of letters, digits, - and _, other than 'model', but got {name!r:.60}."
            )
        self._until_outcome(self._begin("save", 1, name=name), list, lambda parts: [])

    def evaluate(self, function: Callable[[Any], Means], data: Data, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return weighted means over all batches of `data`; see `Run.evaluate`."""
        seed, order, places = self._context.settings.seed, data.order.indices(0), data.order.places
        samples = samples_of(data.dataset, seed, data.shuffle_window)
        size = data.micro_batch or self._context.settings.micro_batch
        batches = [range(start, min(start + size, places)) for start in range(0, places, size)]
        if len(batches) > MOST:
            raise at_script_line(f"run.evaluate() takes {MOST} batches at most, but got {len(batches)}: set micro_batch.")
        question = self._begin("evaluate", len(batches), places)
        collate = data.collate_fn or default_collate

        def compute(part: int) -> PartDone:
            failpoint("evaluating", question.round)
            batch = collate([samples[0, int(order[place])] for place in batches[part]])
            seed_everything(derive_seed(seed, "evaluation", *self._place, part))
            found = function(move(batch, device, data.pins(device)))
            return PartDone(part, sums=_weighed(found, len(batches[part])))

        with _evaluating(model):
            outcome = self._until_outcome(question, list, lambda parts: [compute(part) for part in parts])
        return outcome.means

    def _begin(self, kind: Any, parts: int, samples: int = 0, name: str = "") -> Collective:
        """Return the question at the script's next collective. Raises UsageError inside a loop over batches."""
        if self._segments.ends_round:
            raise at_script_line(
                f"run.{kind}() was called in a function of run.on_round(), which a worker that is far behind "
                "misses: call it between two loops over run.batches()."
            )
        if not self._segments.done:
            raise at_script_line(
                f"run.{kind}() was called inside a loop over run.batches(), where workers come by a different "
                "number of times: call it between two loops."
            )
        loops = self._segments.begun
        with self._context.io.lock:
            self._place = (loops, self._place[1] + 1) if self._place[0] == loops else (loops, 0)
            self._answer = None
        return Collective(*self._place, kind, parts, name, samples, self._segments.round)

    def _until_outcome(
        self, question: Collective, given: Callable[[], list[PartDone]], compute: Callable[[list[int]], list[PartDone]]
    ) -> CollectiveOutcome:
        """Compute what the coordinator says until there is an outcome. Raises ClusterError if nothing moves in time.

        `given()` are results that this worker has without being asked.
        """
        timeout, moved_at, missing, done = self._context.timeout_s, time.monotonic(), -1, given()
        while True:
            answer = self._ask(msgspec.structs.replace(question, done=done))
            if isinstance(answer, CollectiveOutcome):
                return answer
            if answer is not None and (answer.parts or answer.missing != missing):
                moved_at, missing = time.monotonic(), answer.missing
            if time.monotonic() > moved_at + timeout:
                raise ClusterError(f"waited {timeout:.0f} s (--progress-timeout) for {_waited_for(question)}.")
            done = (compute(answer.parts) if answer is not None and answer.parts else []) or given()
            if not done:
                self._context.wait(self._has_outcome, lambda: _waited_for(question), every=ASK_AGAIN_S)

    def _ask(self, question: Collective) -> _Answer | None:
        """Return the coordinator's answer; None if it does not come in time."""
        with self._context.io.lock:
            outcome, self._answer = self._answer if self._has_outcome() else None, None
        if outcome is not None:
            return outcome
        self._context.io.send(Send(COORDINATOR, question))
        heard = self._context.wait(lambda: self._answer, lambda: _waited_for(question), every=ASK_AGAIN_S)
        return heard if isinstance(heard, _Answer) else None

    def _has_outcome(self) -> bool:
        return isinstance(self._answer, CollectiveOutcome)

    def _hear(self, sender: str, body: Body, frames: Frames) -> None:
        assert isinstance(body, CollectiveParts | CollectiveOutcome)
        if (body.loops, body.number) == self._place and not self._has_outcome():
            self._answer = body


def _waited_for(question: Collective) -> str:
    if question.kind == "save":
        return f"the coordinator to save the model as '{question.name}'"
    if question.kind == "agree":
        return "the chief to come to run.agree()"
    return "other workers to compute their batches of run.evaluate()"


def _encoded(value: Any) -> bytes:
    """Return `value` in MessagePack. Raises UsageError, with the script's line, if it cannot be sent."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    try:
        encoded = msgspec.msgpack.encode(value)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise at_script_line(
            "run.agree() takes None, numbers, strings, bytes, and lists and dicts of these, but got "
            f"{type(value).__name__} ({error})."
        ) from None
    if len(encoded) > _MOST_BYTES:
        raise at_script_line(f"run.agree() takes {_MOST_BYTES >> 10} KiB at most, but got {len(encoded) >> 10} KiB.")
    return encoded


def _weighed(found: Any, samples: int) -> dict[str, tuple[float, float]]:
    """Return (mean x weight, weight) by metric. Raises UsageError if `found` is not what `run.evaluate` wants."""
    values, weight = found if isinstance(found, tuple) and len(found) == 2 else (found, samples)
    try:
        number = float(weight)
        if not (isinstance(values, Mapping) and values and 0 <= number < float("inf")):
            raise TypeError
        means = {str(name): float(value) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            "the function of run.evaluate() must return a dict of numbers, the means over its batch, or a pair of such a dict "
            f"and the batch's weight; it returned {found!r:.60}."
        ) from None
    return {name: (value * number if number else 0.0, number) for name, value in means.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have all of `model` in evaluation mode, without gradients, and as it was afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in before.items():
            module.training = was_training
