"""Messages that agree on the model, the plan, the first weights and shared memory."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import Count, Hypers, Many, Name
from roundtable.common.config.worker_facts import Facts
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.model_spec import ClassSpec, TableSpec, TensorSpec
from roundtable.common.protocol.shared_memory import Handle


class Update(msgspec.Struct, frozen=True):
    """How servers turn a merged contribution into new weights.

    `optimizer` names a class of torch.optim; None replaces the weights by the contribution. `groups` are its parameter
    groups' arguments. `clip_norm` bounds the gradient's norm over all servers.
    """

    optimizer: Name | None
    groups: Many[Hypers]
    clip_norm: float | None = None


class InFile(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the model's file, under a name of the model's state_dict. `dtype` is what safetensors calls it.

    `of` says which tensor of a Setup it is, or which several, one after another; none of an empty tensor, which no server has. A
    Setup's tensors are counted first, then its tables, then the weights of its classifiers, then their biases. `counts`: its
    bytes are among those of weights_sha256.
    """

    name: Name
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    of: Annotated[list[Count], msgspec.Meta(max_length=64)]
    counts: bool = False


class Setup(Body, frozen=True):
    """This is the model and its optimizer. The first one defines them; every other must be the same. `file` are the tensors of
    the model's file, in their order there. The coordinator is told of `facts` too, which all workers must have in common."""

    tensors: Many[TensorSpec]
    update: Update
    tables: Many[TableSpec] = []
    classifiers: Many[ClassSpec] = []
    file: Annotated[list[InFile], msgspec.Meta(max_length=1_000_000)] = []
    facts: Facts = []


class Plan(Body, frozen=True):
    """The next rounds are these. The first one defines them; every other must be the same; `facts` as in Setup. Servers take it
    with the `seal` that the coordinator gave."""

    segment: Segment
    seal: Count = 0
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


class Accepted(Body, frozen=True):
    """Request number `id` has arrived, and need not be sent again. The number of initial weights is that of their first chunk."""

    request: Request
    id: Count = 0


class InitialWeights(Body, frozen=True):
    """Weights to start from: one frame of weights (in their own dtype) for each of `chunks`. Only the first copy counts."""

    chunks: Many[Count]


class OfferSharedMemory(Body, frozen=True):
    """My gradients lie in this memory, if any: can you read it?"""

    gradients: Handle | None


class SharedMemoryReply(Body, frozen=True):
    """Whether the worker's gradients can be read here, and the memory in which weights are laid out, if any."""

    reads: bool
    weights: Handle | None
