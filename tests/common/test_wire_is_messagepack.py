"""The wire is MessagePack: the plain package `msgpack` reads every kind of message, and its messages are read here.

docs/protocol.md says what the fields mean. So a client in another language needs no more than a MessagePack library.
"""

from __future__ import annotations

import enum
from typing import Any, get_args

import msgpack
import msgspec
import msgspec.inspect as types
import pytest

from roundtable.common.config.settings import Settings
from roundtable.common.protocol.envelope import Message
from roundtable.common.protocol.messages.base import Body
from roundtable.common.protocol.transport import PROTOCOL, Stamp

KINDS = sorted(get_args(Message), key=lambda kind: kind.__name__)


def example(type_: types.Type, depth: int = 0) -> Any:
    """A value of a type, in every field another than its default."""
    match type_:
        case types.Metadata():
            return example(type_.type, depth)
        case types.StructType() if type_.cls is Settings:
            return Settings(workers=7)
        case types.StructType():
            return type_.cls(**{field.name: other(field, depth + 1) for field in type_.fields})
        case types.ListType():
            return [example(type_.item_type, depth + 1) for _ in range(max(2, type_.min_length or 0))]
        case types.DictType():
            return {example(type_.key_type): example(type_.value_type, depth + 1)}
        case types.TupleType():
            return tuple(example(item, depth + 1) for item in type_.item_types)
        case types.UnionType():
            return example(next(one for one in type_.types if not isinstance(one, types.NoneType)), depth)
        case types.LiteralType():
            return type_.values[-1]
        case types.EnumType():
            return list(type_.cls)[-1]
        case types.IntType():
            return 300 + depth
        case types.FloatType():
            return 0.1 + depth
        case types.BoolType():
            return True
        case types.StrType():
            return "naïve"
        case types.BytesType():
            return b"\x00\xff"
    raise AssertionError(f"no example of {type_}")


def other(field: types.Field, depth: int) -> Any:
    """A value for a field that is not its default."""
    if field.default is True:
        return False
    if isinstance(field.type, types.LiteralType):
        return next(value for value in field.type.values if value not in ("", field.default))
    return example(field.type, depth)


def plain(value: Any) -> Any:
    """A value as MessagePack has it: a map of its fields, or an array of them."""
    if isinstance(value, msgspec.Struct):
        config, fields = value.__struct_config__, msgspec.structs.fields(value)
        if config.array_like:
            return [plain(getattr(value, field.name)) for field in fields]
        tag = {config.tag_field: config.tag} if config.tag is not None else {}
        return tag | {field.encode_name: plain(getattr(value, field.name)) for field in fields if not is_left_out(value, field)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    return value


def is_left_out(value: msgspec.Struct, field: msgspec.structs.FieldInfo) -> bool:
    """Whether a field is not sent because it has its default."""
    if not value.__struct_config__.omit_defaults or field.required:
        return False
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return bool(getattr(value, field.name) == default)


def made(kind: type[Body]) -> Body:
    message: Body = example(types.type_info(kind))
    return message


STAMP = Stamp(sender="worker-1", run="run-1", epoch=3, incarnation=2**47)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_msgpack_reads_every_field_of(kind: type[Body]) -> None:
    message = made(kind)
    envelope = msgpack.unpackb(STAMP.encode(message))
    assert envelope == [PROTOCOL, "run-1", "worker-1", 2**47, 3, plain(message)]
    assert envelope[5]["type"] == kind.__name__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_msgpack_writes_is_read_here_as(kind: type[Body]) -> None:
    message = made(kind)
    header = msgpack.packb([PROTOCOL, "run-1", "worker-1", 2**47, 3, plain(message)])
    assert STAMP.open(header).read() == message


def test_every_field_of_an_example_differs_from_its_default() -> None:
    for kind in KINDS:
        message = made(kind)
        assert not [field.name for field in msgspec.structs.fields(message) if is_left_out(message, field)]
