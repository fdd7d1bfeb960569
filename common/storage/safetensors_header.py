"""The beginning of a safetensors file, without torch, which the coordinator does not load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

#: Key of a model file's metadata: the rule that merges each buffer, by name, as JSON.
BUFFERS = "buffers"
#: Bits of an element, by safetensors' name of its dtype.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor whose dtype safetensors calls `dtype`. Raise KeyError for an unknown dtype."""
    size = _BITS[dtype] // 8
    for length in shape:
        size *= length
    return size


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes that stand before the tensors. `tensors` has the name, dtype, shape and bytes of each, in order."""
    fields: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, size in tensors:
        start, end = end, end + size
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
