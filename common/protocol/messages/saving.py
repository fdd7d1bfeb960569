"""Messages of what is written to the disk: checkpoints and the model's file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.field_types import Count, Name, Text
from roundtable.common.protocol.messages.base import Body, sent_reason

#: Tensors that one message names whose values were computed anew.
MOST_RECOMPUTED = 1000


class TakeCheckpoint(Body, frozen=True):
    """Write your state when every round below `round` is applied, and no other. Answered by CheckpointStatus."""

    round: Count
    #: The content of a file in the folder to write to.
    token: Name
    #: Every server has reached the round.
    reached: bool = False
    #: No worker is left that could take a server further.
    final: bool = False


class CheckpointStatus(Body, frozen=True):
    """The progress of a TakeCheckpoint.

    The server `waits` for the round, has `missed` it, is `writing`, has `written`, or has `failed` for a reason.
    """

    round: Count
    state: Literal["waits", "missed", "writing", "written", "failed"]
    sha256: Name = ""
    bytes: Count = 0
    reason: Text = ""
    #: Grows while the server is writing, in a unit of the server's own.
    done: Count = 0

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class Recomputed(Body, frozen=True):
    """Every worker has computed these tensors of the model's file anew, from the weights after `round` rounds.

    A frame with its bytes follows for each. Only the first copy counts. Answered by Accepted once they are in the file.
    """

    id: Count
    round: Count
    names: Annotated[list[Name], msgspec.Meta(max_length=MOST_RECOMPUTED)]


class SendModel(Body, frozen=True):
    """Send these of your parts of the model, when every round below `round` is applied, and no other.

    `ps/model_parts.py` numbers them. Each is answered by a ModelPart.
    """

    round: Count
    parts: Annotated[list[Count], msgspec.Meta(max_length=4000)]


class ModelPart(Body, frozen=True):
    """Part number `part` of the sender's parts of the model, in the frames that follow."""

    round: Count
    part: Count
