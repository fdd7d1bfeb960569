"""The types of messages: nothing in them is of any type, or as long as its sender likes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from roundtable.common.protocol.envelope import Envelope, Message
from roundtable.common.protocol.messages.gradients import Push
from roundtable.common.protocol.messages.session import MOST_MICRO_BATCHES, Goodbye, Heartbeat, Hello, Refused, Stop
from roundtable.common.protocol.transport import PROTOCOL, Stamp
from roundtable.common.runtime.errors import WireError

HERE = Stamp("coordinator", "abc")


def loose(kind: Any, where: str, seen: set[Any]) -> Iterator[str]:
    """Places in a type where what is decoded is of any type or size."""
    match kind:
        case inspect.StructType():
            if kind.cls not in seen:
                seen.add(kind.cls)
                for field in kind.fields:
                    yield from loose(field.type, f"{kind.cls.__name__}.{field.name}", seen)
        case inspect.UnionType():
            for one in kind.types:
                yield from loose(one, where, seen)
        case inspect.StrType() | inspect.BytesType():
            if kind.max_length is None:
                yield where
        case inspect.ListType():
            if kind.max_length is None:
                yield where
            yield from loose(kind.item_type, where, seen)
        case inspect.DictType():
            if kind.max_length is None or not isinstance(kind.key_type, inspect.StrType | inspect.LiteralType):
                yield where
            yield from loose(kind.key_type, where, seen)
            yield from loose(kind.value_type, where, seen)
        case inspect.TupleType():
            for one in kind.item_types:
                yield from loose(one, where, seen)
        case inspect.IntType() | inspect.FloatType() | inspect.BoolType() | inspect.NoneType():
            pass
        case inspect.LiteralType() | inspect.EnumType():
            pass
        case inspect.Metadata():
            yield from loose(kind.type, where, seen)
        case inspect.RawType():  # whoever decodes it says of what type
            pass
        case _:  # Any, sets, and whatever else nobody has thought of
            yield where


def test_every_field_of_every_message_is_bounded() -> None:
    seen: set[Any] = set()
    assert [*loose(inspect.type_info(Message), "", seen), *loose(inspect.type_info(Envelope), "", seen)] == []
    assert {Heartbeat, Push, Hello, Envelope} <= seen


def test_the_look_at_bounds_finds_what_has_none() -> None:
    class Bad(msgspec.Struct):
        a: str
        b: list[int]
        c: dict[str, Any]
        d: tuple[int, ...]
        e: set[int]
        f: bytes

    found = set(loose(inspect.type_info(Bad), "", set()))
    assert found == {f"Bad.{name}" for name in "abcdef"}


def header(body: Any, sender: str = "worker-0", run: str = "abc") -> bytes:
    return msgspec.msgpack.encode([PROTOCOL, run, sender, 1, 0, body])


def test_what_would_take_long_to_hash_is_refused_at_once() -> None:
    """Tuples of -1 and -2 all have the same hash, so a map of them takes the square of its size."""
    size = 17
    pairs = b"".join(b"\x9a" + bytes(0xFF - (n >> bit & 1) for bit in range(10)) + b"\xc0" for n in range(1 << 10))
    bomb = b"\xdf" + (size << 10).to_bytes(4, "big") + pairs * size
    push = msgspec.msgpack.encode(
        msgspec.structs.asdict(Push(1, 0, 2, 4, 2, [0], [1])) | {"type": "Push", "hypers": [msgspec.Raw(bomb)]}
    )
    stranger = header(msgspec.Raw(push), "x")
    began = time.process_time()
    envelope = HERE.open(stranger)
    with pytest.raises(WireError, match="could not be read"):
        envelope.read()
    assert time.process_time() - began < 0.5


def test_of_somebody_unknown_only_a_small_hello_is_decoded() -> None:
    assert HERE.open(header({"type": "Hello", "role": "worker"}, run=""), joining=True).read_hello() == Hello("worker")
    for body in ({"type": "Heartbeat"}, {"type": "Hello", "role": "worker", "nonsense": "x" * 100_000}):
        with pytest.raises(WireError):
            HERE.open(header(body, run=""), joining=True).read_hello()
    with pytest.raises(WireError) as raised:
        HERE.open(header({"type": "Hello", "role": "worker"}, run=""))
    assert raised.value.kind == "run"


@pytest.mark.parametrize(
    "fields",
    [
        {"not_started": [0] * (MOST_MICRO_BATCHES + 1)},
        {"reassigned_here": [[0, 0]] * (MOST_MICRO_BATCHES + 1)},
        {"missing_later": [[]] * (MOST_MICRO_BATCHES + 1)},
        {"missing_later": [[0] * 200] * 200},
        {"refused": {"a kind that there is not": 1}},
        {"replicas_held": [0] * 2000},
    ],
)
def test_a_beat_of_more_than_anybody_has_to_tell_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="could not be read"):
        HERE.open(header({"type": "Heartbeat", **fields})).read()


@pytest.mark.parametrize("message", [Refused("x", "{}"), Stop(False, "{}"), Goodbye("{}")])
def test_reasons_are_letters_only_and_fit_whatever_they_were_made_of(message: Refused | Stop | Goodbye) -> None:
    nasty = "\x1b]0;pwned\x07\x1b[2J\u202egnp.exe\nnext" + "x" * 100_000
    sent = msgspec.structs.replace(message, reason=nasty)
    forged = msgspec.msgpack.decode(msgspec.msgpack.encode(message)) | {"reason": nasty[:5000]}
    for made in (HERE.encode(sent), header(forged)):
        got = HERE.open(made).read()
        assert isinstance(got, type(message))
        assert got.reason.startswith("?]0;pwned??[2J?gnp.exe next") and len(got.reason) <= 4000
