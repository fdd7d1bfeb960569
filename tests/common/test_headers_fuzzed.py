"""Whatever comes as a header, it is an envelope of this run and protocol, or refused: nothing else comes out of the parser."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roundtable.common.config.batch_plan import make_segment
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.messages.gradients import Ack, Pull, Push, Weights
from roundtable.common.protocol.messages.saving import CheckpointStatus, TakeCheckpoint
from roundtable.common.protocol.messages.session import Heartbeat, Hello, Reassign
from roundtable.common.protocol.messages.setup import Plan
from roundtable.common.protocol.messages.sharded import LayerPush, LayerUse, ShardedForward
from roundtable.common.protocol.transport import MAX_HEADER_BYTES, PROTOCOL, Stamp
from roundtable.common.runtime.errors import WireError

HERE = Stamp(sender="server-0", run="abc", epoch=3, incarnation=5)
BODIES: list[Body] = [
    Hello("worker", 1, "tcp://127.0.0.1:1", "host", 7, {"torch": "2"}),
    Heartbeat("computing", 3, 1, [1, 2], [3], 0.1, 2.0, 0.3, reassigned_here=[(1, 2)], missing_later=[[1], []]),
    Plan(make_segment(before=None, samples=64, global_batch=8, micro_batch=2, epochs=2, round_limit=None)),
    Push(1, 0, 2, 4, 2, [0, 1], [1, 1], 1, {"loss": (1.0, 4.0)}, [{"lr": 0.1}], scale=0.5, coded=[1]),
    Ack(1, 0, 2, [0], True, ignored=[0]),
    Pull(3, 1, [0], weight_buffer=2),
    Weights(3, 3, [0, 1], True, changed_frozen=[1]),
    ShardedForward(1, 0, 3, 8, True, back_through=0),
    LayerPush(1, 0, 1, 4, [LayerUse(1, 4, scale=4.0)], questions=[ShardedForward(1, 0, 1, 4, True)]),
    Reassign(1, 2, "worker-1", "worker-0"),
    TakeCheckpoint(4, "token", final=True),
    CheckpointStatus(4, "written", "00", 9),
]
HEADERS = [HERE.encode(body) for body in BODIES]

many = settings(max_examples=300, deadline=None)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=9), inner, max_size=6),
    max_leaves=6,
)


def look(header: bytes) -> None:
    try:
        envelope = HERE.open(header, joining=True)
        body = envelope.read() if envelope.run else envelope.read_hello()
    except WireError as error:
        assert str(error).isprintable()  # it is logged, and names in it are the sender's
        return
    assert envelope.protocol == PROTOCOL
    assert envelope.run == HERE.run or (not envelope.run and isinstance(body, Hello))


@many
@given(st.binary(max_size=300))
def test_random_bytes(header: bytes) -> None:
    look(header)


@many
@given(st.sampled_from(HEADERS), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=4))
def test_headers_some_of_whose_bytes_are_others(header: bytes, changes: list[tuple[float, bytes]]) -> None:
    for where, instead in changes:
        at = int(where * len(header)) if header else 0
        header = header[:at] + instead + header[at + 1 :]
    look(header)


@pytest.mark.slow
@many
@given(values, st.sampled_from(range(6)), st.sampled_from(HEADERS))
def test_envelopes_one_of_whose_fields_is_something_else(value: Any, field: int, header: bytes) -> None:
    envelope = msgspec.msgpack.decode(header)
    envelope[field] = value
    look(msgspec.msgpack.encode(envelope))


@pytest.mark.slow
@many
@given(values, st.data(), st.sampled_from(HEADERS))
def test_bodies_one_of_whose_fields_is_something_else(value: Any, data: st.DataObject, header: bytes) -> None:
    envelope = msgspec.msgpack.decode(header)
    envelope[5][data.draw(st.sampled_from(sorted(envelope[5])))] = value
    look(msgspec.msgpack.encode(envelope))


def test_nothing_is_read_of_what_is_too_long_or_too_deep() -> None:
    look(b"\x91" * (MAX_HEADER_BYTES + 1))
    look(b"\x91" * 100_000)
