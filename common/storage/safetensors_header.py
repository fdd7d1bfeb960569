"""The beginning of a safetensors file, without torch, which the coordinator does not load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

#: Key of a model file's metadata: what merges each buffer in it, as JSON, by name.
BUFFERS = "buffers"
#: Bits that an element has, by what safetensors calls its dtype.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose dtype safetensors calls `dtype`. Raises KeyError where it has no such dtype."""
    size = _BITS[dtype] // 8
    for length in shape:
        size *= length
    return size


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensors, which follow in this order; of each, its name, dtype, shape and size in bytes."""
    fields: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
