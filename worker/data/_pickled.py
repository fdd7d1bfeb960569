"""Reads the dictionaries of numpy arrays that CIFAR's Python batches are, without running anything a pickle may ask for.

A pickle names the functions that rebuild its objects. The few that a numpy array needs are answered with the stand-ins
below, which only keep the bytes; any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UsageError


class ByteArray:
    """Stands in for a numpy array of bytes: its shape, and its contents in C order."""

    shape: tuple[int, ...] = ()
    data: bytes = b""

    @classmethod
    def empty(cls, *_: object) -> ByteArray:
        """In place of numpy's `_reconstruct`; the contents follow by `__setstate__`."""
        return cls()

    @classmethod
    def full(cls, data: bytes, dtype: ByteType, shape: tuple[int, ...], order: str) -> ByteArray:
        """In place of numpy's `_frombuffer`."""
        array = cls()
        array._fill(shape, dtype, order != "C", data)
        return array

    def __setstate__(self, state: tuple[int, tuple[int, ...], ByteType, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(shape, dtype, fortran, data)

    def _fill(self, shape: tuple[int, ...], dtype: ByteType, fortran: bool, data: bytes) -> None:
        if not isinstance(dtype, ByteType) or fortran:
            raise pickle.UnpicklingError("an array in it is not of bytes in C order")
        self.shape, self.data = tuple(shape), bytes(data)


class ByteType:
    """Stands in for numpy's dtype uint8, and refuses to be another."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array in it is of {code!r}, not of uint8")

    def __setstate__(self, _: object) -> None:
        """Byte order and the like, which mean nothing for bytes."""


def _encode(text: str, _encoding: str) -> bytes:
    """In place of `_codecs.encode`: how Python 3 writes bytes in a pickle that Python 2 could read."""
    return text.encode("latin-1")


_STAND_INS: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): ByteArray,
    ("numpy", "dtype"): ByteType,
    ("numpy.core.multiarray", "_reconstruct"): ByteArray.empty,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray.empty,
    ("numpy.core.numeric", "_frombuffer"): ByteArray.full,
    ("numpy._core.numeric", "_frombuffer"): ByteArray.full,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs") from None


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of numbers, strings, lists and uint8 arrays; arrays come as ByteArray.

    Raises UsageError where the file can't be read, is damaged, is no dictionary, or asks for anything else.
    """
    try:
        batch = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise UsageError(f"{path} cannot be read ({str(error) or type(error).__name__}): fetch it again.") from None
    if not isinstance(batch, dict):
        raise UsageError(f"{path} is no CIFAR batch, because there is no dictionary in it: fetch it again.")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}
