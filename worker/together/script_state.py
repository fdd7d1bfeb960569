"""A script's own state, which is there again when the run is resumed or a worker joins late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import msgspec
import torch
from safetensors.torch import load, save

from roundtable.common.protocol.messages.session import MOST_STATE_BYTES
from roundtable.common.runtime.errors import at_script_line

#: The number of the MessagePack extension that holds a tensor, as a safetensors file of that tensor.
_TENSOR = 1


class ScriptState(MutableMapping[str, Any]):
    """Values by name. All scripts set the same ones, and the chief's are kept."""

    def __init__(self, kept: bytes, keep: Callable[[bytes], None]) -> None:
        """`kept` is the state to begin with. `keep` is called with each new state."""
        self._values: dict[str, Any] = msgspec.msgpack.decode(kept, ext_hook=_decode) if kept else {}
        self._keep = keep

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setitem__(self, name: str, value: Any) -> None:
        self._change({**self._values, name: value})

    def __delitem__(self, name: str) -> None:
        values = dict(self._values)
        del values[name]
        self._change(values)

    def update(self, *others: Any, **values: Any) -> None:
        """Set several values at once."""
        self._change(self._values | dict(*others, **values))

    def _change(self, values: dict[str, Any]) -> None:
        encoded = _encoded(values)
        self._values = values
        self._keep(encoded)


def _encoded(values: dict[str, Any]) -> bytes:
    """Return the state in MessagePack. Raises UsageError, with the script's line, if it cannot be kept."""
    try:
        encoded = msgspec.msgpack.encode(values, enc_hook=_encode)
        msgspec.msgpack.decode(encoded, type=dict[str, Any], ext_hook=_decode)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise at_script_line(
            f"run.state keeps None, numbers, strings, bytes, tensors, and lists and dicts of these, by name ({error})."
        ) from None
    if len(encoded) > MOST_STATE_BYTES:
        raise at_script_line(
            f"run.state would have {len(encoded) / 1e6:.1f} MB, and {MOST_STATE_BYTES >> 20} MiB are the most: "
            "keep large tensors as parameters or buffers of the model."
        )
    return encoded


def _encode(value: Any) -> msgspec.msgpack.Ext:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"not {type(value).__name__}")
    return msgspec.msgpack.Ext(_TENSOR, save({"": value.detach().cpu().contiguous()}))


def _decode(number: int, data: memoryview) -> torch.Tensor:
    if number != _TENSOR:
        raise ValueError(f"extension {number} is unknown")
    return load(bytes(data))[""]
