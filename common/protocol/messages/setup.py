"""Messages that agree on the model, the plan, the first weights and shared memory."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import Count, Hypers, Many, Name
from roundtable.common.config.worker_facts import Facts
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.model_spec import ShardedLayerSpec, TableSpec, TensorSpec
from roundtable.common.protocol.shared_memory import Handle


class Update(msgspec.Struct, frozen=True):
    """How servers turn a merged contribution into new weights."""

    #: A class of torch.optim, or the import path of another one. None: the contribution replaces the weights.
    optimizer: Name | None
    #: The arguments of each parameter group.
    groups: Many[Hypers]
    #: Bounds the gradient's norm over all servers.
    clip_norm: float | None = None
    #: The class of each parameter group, if they have not all the same one.
    classes: Many[Name] = []

    def class_of(self, group: int) -> str | None:
        """Return the name of a parameter group's class."""
        return self.classes[group] if self.classes else self.optimizer


class InFile(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the model's file, under its name in the model's state_dict."""

    name: Name
    #: The dtype's name in safetensors.
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    #: The tensors of the Setup that it consists of, in order. Tensors are counted first, then embedding tables, then weights of
    #: sharded layers, then their biases. An empty tensor consists of none.
    of: Annotated[list[Count], msgspec.Meta(max_length=64)]
    #: Its bytes are among those of weights_sha256.
    counts: bool = False


class Setup(Body, frozen=True):
    """This is the model and its optimizer. The first Setup defines them, and every other must be the same."""

    tensors: Many[TensorSpec]
    update: Update
    tables: Many[TableSpec] = []
    sharded_layers: Many[ShardedLayerSpec] = []
    #: The tensors of the model's file, in their order there.
    file: Annotated[list[InFile], msgspec.Meta(max_length=1_000_000)] = []
    #: To the coordinator only: what all workers must have in common.
    facts: Facts = []


class Plan(Body, frozen=True):
    """The next rounds. The first Plan defines them, and every other must be the same."""

    segment: Segment
    #: Servers take the plan only with the seal that the coordinator gave.
    seal: Count = 0
    #: As in Setup.
    facts: Facts = []


class SetupReply(Body, frozen=True):
    """The model of a Setup is known here."""

    #: Of a server: it has no first weights yet. Of the coordinator: the worker that asks is to send the first weights.
    needs_weights: bool = False
    #: Of the coordinator: the worker that is to send the first weights.
    first: Name = ""


class PlanReply(Body, frozen=True):
    """Plan number `segment` is known here. Servers take the Plan only with the coordinator's `seal`."""

    segment: Count
    seal: Count = 0


class Request(enum.Enum):
    """A message to which the answer is just that it has arrived."""

    INITIAL_WEIGHTS = "initial weights"
    INITIAL_ROWS = "initial rows"
    METRICS = "metrics"
    RECOMPUTED = "recomputed"
    STATE = "state"


class Accepted(Body, frozen=True):
    """Request number `id` has arrived, and need not be sent again. The number of initial weights is that of their first chunk."""

    request: Request
    id: Count = 0


class InitialWeights(Body, frozen=True):
    """Weights to start from: a frame for each of `chunks`, in the chunk's own dtype. Only the first copy counts."""

    chunks: Many[Count]


class OfferSharedMemory(Body, frozen=True):
    """My gradients are in this memory, if any. Can you read it?"""

    gradients: Handle | None


class SharedMemoryReply(Body, frozen=True):
    """Whether the server can read the worker's gradients, and the memory in which weights are, if any."""

    reads: bool
    weights: Handle | None
