"""Reads the dictionaries of numpy arrays in CIFAR's Python batches, without running any code that a pickle asks for.

A pickle names the functions that rebuild its objects. For the few functions that a numpy array needs, there are stand-ins below,
which only keep the bytes. Any other name is refused. A few bytes can ask for gigabytes, so the pickle is checked before it is
read, and the bytes that it makes are counted.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundtable.common.runtime.errors import UsageError

#: Bytes that a file may have.
_MOST_BYTES = 1 << 30
#: Instructions that a pickle may have: a batch of CIFAR-100 has 200,000.
_MOST_STEPS = 1_000_000
#: Numbers of objects that may be skipped.
_NUMBERS = 1000


class ByteArray:
    """A stand-in for a numpy array of bytes: its shape, and its contents in C order."""

    shape: tuple[int, ...] = ()
    data: bytes | bytearray = b""

    @classmethod
    def empty(cls, *_: object) -> ByteArray:
        """Stand in for numpy's `_reconstruct`. The contents follow by `__setstate__`."""
        return cls()

    @classmethod
    def full(cls, data: bytes, dtype: ByteType, shape: tuple[int, ...], order: str) -> ByteArray:
        """Stand in for numpy's `_frombuffer`."""
        array = cls()
        array._fill(shape, dtype, order != "C", data)
        return array

    def __setstate__(self, state: tuple[int, tuple[int, ...], ByteType, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(shape, dtype, fortran, data)

    def _fill(self, shape: tuple[int, ...], dtype: ByteType, fortran: bool, data: bytes) -> None:
        if not isinstance(dtype, ByteType) or fortran:
            raise pickle.UnpicklingError("an array in it is not of bytes in C order")
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("an array in it has no bytes")
        self.shape, self.data = tuple(shape), data


class ByteType:
    """A stand-in for numpy's dtype uint8, which refuses other dtypes."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array in it is of {code!r}, not of uint8")

    def __setstate__(self, _: object) -> None:
        """Ignore byte order and the like, which mean nothing for bytes."""


_STAND_INS: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): ByteArray,
    ("numpy", "dtype"): ByteType,
    ("numpy.core.multiarray", "_reconstruct"): ByteArray.empty,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray.empty,
    ("numpy.core.numeric", "_frombuffer"): ByteArray.full,
    ("numpy._core.numeric", "_frombuffer"): ByteArray.full,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        #: Bytes that texts may yet be converted to. They cannot be more than the file's, because each of them is in the file.
        self._left = len(data)

    def _encode(self, text: str, _encoding: str) -> bytes:
        """Stand in for `_codecs.encode`, by which Python 3 writes bytes in a pickle that Python 2 can read."""
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("its arrays have more bytes than the file")
        return text.encode("latin-1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs") from None


def read_batch(path: Path) -> dict[str, Any]:
    """Return the dictionary in a pickle of numbers, strings, lists and uint8 arrays. Arrays become ByteArray.

    Raises UsageError if the file cannot be read, is damaged, has no dictionary, or asks for anything else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
        _look_through(data)
        batch = _Unpickler(data).load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise UsageError(f"{path} cannot be read ({str(error) or type(error).__name__}): fetch it again.") from None
    if not isinstance(batch, dict):
        raise UsageError(f"{path} is no CIFAR batch, because there is no dictionary in it: fetch it again.")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}


def _look_through(data: bytes) -> None:
    """Raise UnpicklingError or ValueError if a pickle has more than it says, or asks for more memory than it has bytes."""
    put = 0
    for steps, (code, value, _) in enumerate(pickletools.genops(data)):
        if steps >= _MOST_STEPS:
            raise pickle.UnpicklingError(f"it has more than {_MOST_STEPS} instructions")
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            put += 1
            if not isinstance(value, int) or value > 2 * put + _NUMBERS:  # the unpickler allocates as many places as this number
                raise pickle.UnpicklingError(f"it numbers its {put}. object {value}")
