"""Messages of what is written to the disk: checkpoints and the model's file."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.field_types import Count, Name, Text
from roundtable.common.protocol.messages.base import Body, sent_reason

#: Tensors that one message names whose values were computed anew.
MOST_RECOMPUTED = 1000


class TakeCheckpoint(Body, frozen=True):
    """Write down your state as it is when every round below `round` is applied and nothing else, into the folder that has the
    file with `token`. `reached`: every server has got that far; `final`: and no worker is left that could take it further.
    Answered by CheckpointStatus."""

    round: Count
    token: Name
    reached: bool = False
    final: bool = False


class CheckpointStatus(Body, frozen=True):
    """Say what has become of a TakeCheckpoint.

    It `waits` for the round, was `missed` as the round is over, is being or was `written`, or `failed` for a reason.
    `done` changes as the server gets on while it is `writing`; its unit is the server's own.
    """

    round: Count
    state: Literal["waits", "missed", "writing", "written", "failed"]
    sha256: Name = ""
    bytes: Count = 0
    reason: Text = ""
    done: Count = 0

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "reason", sent_reason(self.reason))


class Recomputed(Body, frozen=True):
    """From the weights after `round` rounds every worker has computed these tensors of the model's file anew; their bytes follow,
    a frame for each. Only the first copy counts. Answered by Accepted with the same `id`, once they are in the file."""

    id: Count
    round: Count
    names: Annotated[list[Name], msgspec.Meta(max_length=MOST_RECOMPUTED)]


class SendModel(Body, frozen=True):
    """Send me these of your parts of the model, as they are when every round below `round` is applied and nothing else is.
    `ps/model_parts.py` numbers them. Each is answered by a ModelPart."""

    round: Count
    parts: Annotated[list[Count], msgspec.Meta(max_length=4000)]


class ModelPart(Body, frozen=True):
    """Part number `part` of the sender's parts of the model, in the frames that follow."""

    round: Count
    part: Count
